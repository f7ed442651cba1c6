"""The gRPC face of the page server: thin handlers over lanes and leases."""
