"""The background lane in a process of its own, so that bulk never stands before a fault on the event loop."""
