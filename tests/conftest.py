"""Loaded before every test, and so before anything that loads gRPC."""

from __future__ import annotations

import os

# gRPC's fork handlers abort children that are forked while its threads run; all of ours call exec at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
