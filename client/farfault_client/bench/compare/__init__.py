"""Whole moves, side by side: farfault and QEMU's own post-copy, same machine, same guest, in turn."""
