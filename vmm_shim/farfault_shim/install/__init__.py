"""Putting pages into guest memory: by userfaultfd, or by file for the simulated KVM."""
