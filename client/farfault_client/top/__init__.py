"""`farfault top`: a running move in a terminal."""
