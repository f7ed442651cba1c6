"""The receive daemon: VMMs attach on one side, a page server answers on the other."""
