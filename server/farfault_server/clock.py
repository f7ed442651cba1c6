"""The clock of the lanes."""

from __future__ import annotations

import time


def clock_us() -> int:
    """Monotonic microseconds."""
    return time.monotonic_ns() // 1000
