"""``farfault probe``: what this host can do for far memory, what is missing, and the remedy."""
