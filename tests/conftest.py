"""Loaded before every test, and so before anything that loads gRPC."""

from __future__ import annotations

import os
import signal

import hypothesis  # noqa: F401 - imported late, it can meet python/cpython#106905

# gRPC's fork handlers abort children that are forked while its threads run; all of ours call exec at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A shell that runs the tests in the background has SIGINT ignored, and children inherit that; some are sent one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
