"""The page client: one lease on a page server, its streams, and coming back after a loss."""
