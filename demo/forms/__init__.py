"""What is asked for: controls, and the job that comes of them."""
