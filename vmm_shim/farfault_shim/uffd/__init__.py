"""userfaultfd: the kernel interface by which missing pages are noticed and installed."""
