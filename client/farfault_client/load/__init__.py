"""The load generator: virtual vCPUs that fault on a page server, and what they saw."""
