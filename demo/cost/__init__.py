"""What a picture or clip will cost, before it is made."""
