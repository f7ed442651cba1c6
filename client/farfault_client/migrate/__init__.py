"""`farfault migrate`: starts a move, shows it, gives the verdict. It only orchestrates."""
