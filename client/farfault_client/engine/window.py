"""How many background bytes may be in flight: grows while the guest is quiet, shrinks at a fault."""

from __future__ import annotations

from dataclasses import dataclass

QUIET_S = 0.005
"""A guest without a demand fault for this long is quiet."""


@dataclass
class BackgroundWindow:
    """The credit of the background lane.

    The window doubles for each window's worth of bytes that arrives while the guest is quiet (slow start:
    it finds the bandwidth-delay product in a few round trips) and halves at a demand fault, at most once
    in `QUIET_S`. The floor keeps the background moving under a guest that faults without pause.

    Attributes:
        floor_bytes: never less than this.
        ceiling_bytes: never more than this.
    """

    floor_bytes: int = 512 << 10
    ceiling_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        self.size_bytes = self.floor_bytes
        self._last_fault_at = float("-inf")
        self._last_shrink_at = float("-inf")

    def fault(self, now: float) -> None:
        """A demand fault came at `now` (seconds)."""
        self._last_fault_at = now
        if now - self._last_shrink_at >= QUIET_S:
            self._last_shrink_at = now
            self.size_bytes = max(self.floor_bytes, self.size_bytes // 2)

    def arrived(self, size_bytes: int, now: float) -> None:
        """Background bytes arrived at `now`."""
        if now - self._last_fault_at >= QUIET_S:
            self.size_bytes = min(self.ceiling_bytes, self.size_bytes + size_bytes)
