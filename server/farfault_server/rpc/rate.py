"""How often each host may call Open."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

OPENS_PER_S_MAX: Final = 50.0
OPENS_BURST: Final = 100.0
PEERS_MAX: Final = 1024
"""Hosts that are remembered; the one that called the longest ago is forgotten first."""


class OpenRate:
    """A token bucket for each host. The clock is the caller's.

    Args:
        per_s: tokens a second.
        burst: tokens at most.
    """

    def __init__(self, per_s: float = OPENS_PER_S_MAX, burst: float = OPENS_BURST) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, peer: str, now_s: float) -> bool:
        """Whether a call of this host may go on now."""
        host = peer.rpartition(":")[0] or peer
        tokens, since_s = self._buckets.pop(host, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - since_s) * self._per_s)
        is_admitted = tokens >= 1
        self._buckets[host] = (tokens - is_admitted, now_s)
        if len(self._buckets) > PEERS_MAX:
            self._buckets.popitem(last=False)
        return is_admitted
