"""What is shown: a page a file, and the words and pictures on them."""
