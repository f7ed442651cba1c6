"""A token bucket for the background lane's bandwidth cap. Time is a parameter."""

from __future__ import annotations

BURST_S = 0.02
"""The bucket holds this much time's worth of bytes."""


class RateLimit:
    """At most `bytes_per_s` bytes a second on average.

    Args:
        bytes_per_s: 0 means no limit.
    """

    def __init__(self, bytes_per_s: int = 0) -> None:
        self.bytes_per_s = bytes_per_s
        self._debt_bytes = 0.0
        self._at = 0.0

    def allows(self, now: float) -> bool:
        """True if something may be sent at `now` (seconds)."""
        if self.bytes_per_s == 0:
            return True
        self._debt_bytes = max(-BURST_S * self.bytes_per_s, self._debt_bytes - (now - self._at) * self.bytes_per_s)
        self._at = now
        return self._debt_bytes <= 0

    def spend(self, size_bytes: int) -> None:
        """Counts what was asked for."""
        if self.bytes_per_s:
            self._debt_bytes += size_bytes

    def wait_s(self) -> float:
        """How long until `allows` is true again, as of the last call; 0: now."""
        if self.bytes_per_s == 0:
            return 0.0
        return max(0.0, self._debt_bytes / self.bytes_per_s)
