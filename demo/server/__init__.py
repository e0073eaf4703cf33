"""What visitors do not see: who they are, what they may ask for, and the one device that works for them."""
