"""The page server: serves the RAM of one stopped VM, or of a snapshot, page by page."""
