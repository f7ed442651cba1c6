"""Starting an unmodified VMM under the preload library."""
