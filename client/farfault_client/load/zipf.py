"""Zipf-distributed ranks in constant time and memory, whatever the number of items.

Rejection-inversion: W. Hoermann, G. Derflinger, "Rejection-inversion to generate variates from monotone discrete
distributions", ACM TOMACS 6 (1996). About one draw in eight is rejected at worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable


class ZipfRanks:
    """Draws ranks 1..count with probability proportional to ``rank ** -exponent``.

    Args:
        count: number of ranks, at least 1.
        exponent: above 0; 1 is Zipf's own law.
        random: returns a float in [0, 1).
    """

    def __init__(self, count: int, exponent: float, random: Callable[[], float]) -> None:
        if count < 1 or exponent <= 0:
            raise ValueError(f"no Zipf distribution over {count} ranks with exponent {exponent}")
        self._count = count
        self._exponent = exponent
        self._random = random
        self._low = self._integral(1.5) - 1.0
        self._high = self._integral(count + 0.5)
        self._sure = 2.0 - self._inverse(self._integral(2.5) - self._density(2.0))

    def draw(self) -> int:
        """One rank."""
        while True:
            area = self._high + self._random() * (self._low - self._high)
            x = self._inverse(area)
            rank = min(self._count, max(1, int(x + 0.5)))
            if rank - x <= self._sure or area >= self._integral(rank + 0.5) - self._density(rank):
                return rank

    def _density(self, x: float) -> float:
        return math.exp(-self._exponent * math.log(x))

    def _integral(self, x: float) -> float:
        """The integral of the density, up to a constant: ``(x ** (1 - s) - 1) / (1 - s)``, ``log x`` for s = 1."""
        log_x = math.log(x)
        scaled = (1.0 - self._exponent) * log_x
        return log_x * (math.expm1(scaled) / scaled if abs(scaled) > 1e-8 else 1.0 + scaled / 2)

    def _inverse(self, area: float) -> float:
        scaled = max(-1.0, area * (1.0 - self._exponent))
        return math.exp(area * (math.log1p(scaled) / scaled if abs(scaled) > 1e-8 else 1.0 - scaled / 2))
