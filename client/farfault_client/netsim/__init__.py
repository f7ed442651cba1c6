"""A bad network between two honest programs: delay, bandwidth, and faults, as a TCP proxy."""
