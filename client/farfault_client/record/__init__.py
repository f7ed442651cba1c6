"""`farfault record`: the working set of a move, kept for the next one."""
