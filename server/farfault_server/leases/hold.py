"""How long a suspended VM stands still for a destination that is not heard of. No I/O: time is a parameter."""

from __future__ import annotations

import math


class Hold:
    """Begins with Suspend and is renewed by each sign of life. It means something while the VM is suspended."""

    def __init__(self) -> None:
        self._until = math.inf

    def renew(self, now: float, silence_s_max: float) -> None:
        """The destination is there.

        Args:
            now: seconds of a monotonic clock.
            silence_s_max: how long it may be silent from now on; 0: for ever.
        """
        self._until = now + silence_s_max if silence_s_max else math.inf

    def left_s(self, now: float) -> float:
        """Until the VM is to be taken back; none left: now. Infinite where it waits for ever."""
        return max(0.0, self._until - now)
