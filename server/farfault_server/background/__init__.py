"""The background lane in a process of its own, so that bulk takes no turn of the loop that answers faults.

The parent starts the child with the memory's descriptors and one end of a socket pair, and tells it each change of
the lease record; the child acknowledges each before the parent goes on, so a page is never read from a VM that is
about to run. The child ends when the socket does. While there is no child, clients use Background on the main port.
"""

from farfault_server.background.process import BackgroundProcess

__all__ = ["BackgroundProcess"]
