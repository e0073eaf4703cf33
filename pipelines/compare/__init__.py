"""Dense attention and methods on the same prompts and seeds: pictures side by side, and figures."""
