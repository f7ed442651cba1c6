"""The demonstration: a real VM moves by post-copy on this machine, and its guest proves that nothing was lost."""
