"""What a receiver tells Prometheus: the counters that it keeps anyway, read when they are asked for."""
