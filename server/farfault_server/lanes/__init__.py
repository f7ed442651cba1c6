"""Lanes: requests for pages in, batches of pages out. A core without I/O, and drivers for gRPC and plain streams."""
