"""Medians and how far single runs lie around them. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple


class Spread(NamedTuple):
    """A figure over several runs.

    Attributes:
        median: of the runs that have the figure.
        low, high: the least and the largest of them.
        runs: how many.
    """

    median: float
    low: float
    high: float
    runs: int


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """The spread of what was measured; None where no run has the figure."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(median(known), min(known), max(known), len(known))
