"""Service level objectives, and the search for the highest rate at which they hold. No I/O and no clock."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from farfault_cli.errors import UsageError
from hdrh.histogram import HdrHistogram

from farfault_client.load.tally import PRECISION, Tally

UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6}
ACHIEVED_SHARE_MIN = 0.98
"""A rate holds only if at least this share of the faults that fell due in the run were answered in it."""
STEPS_MAX = 40
"""Measurements of one search."""
TRIES = 2
"""A rate breaks the objective if it does so this many times in a row: one disturbance does not end a search."""
HALVINGS_MAX = 5
"""Where the first rate breaks, a rate that holds is looked for down to this many halves of it."""
RATE_MAX_PER_S = 10_000_000.0


@dataclass(frozen=True, slots=True)
class Objective:
    """A bound on one figure of the latency.

    Attributes:
        figure: ``p50`` to ``p99.999``, ``max`` or ``mean``.
        bound_us: in microseconds.
        text: as the user wrote it.
    """

    figure: str
    bound_us: float
    text: str

    def measure_us(self, latency: HdrHistogram) -> float:
        """What the bound is compared with; 0 where nothing was counted."""
        if not latency.get_total_count():
            return 0.0
        if self.figure == "max":
            return float(latency.get_max_value())
        if self.figure == "mean":
            return float(latency.get_mean_value())
        return float(latency.get_value_at_percentile(float(self.figure[1:])))


def parse_objectives(texts: Iterable[str]) -> tuple[Objective, ...]:
    """Reads ``p99=1ms``; several, also separated by commas.

    Raises:
        UsageError: with an example.
    """
    objectives = []
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"(p\d{1,2}(?:\.\d+)?|max|mean)<?=(\d+(?:\.\d+)?)(us|ms|s)", text.strip().lower())
        if match is None or float(match[2]) <= 0:
            raise UsageError(f"{text!r} is no objective", "for example --slo p99=1ms, --slo p99.9=5ms,max=50ms")
        objectives.append(Objective(match[1], float(match[2]) * UNITS_US[match[3]], text.strip()))
    return tuple(objectives)


def broken(objectives: Iterable[Objective], tally: Tally) -> list[str]:
    """What does not hold, in words; empty: all does."""
    found = []
    for objective in objectives:
        measured_us = objective.measure_us(tally.latency)
        if measured_us > objective.bound_us * (1 + PRECISION):
            found.append(
                f"{objective.figure} is {measured_us / 1000:,.3f} ms, more than {objective.bound_us / 1000:g} ms"
            )
    if tally.errors:
        found.append(f"{tally.errors:,} faults failed")
    if not tally.faults:
        found.append("no fault was answered")
    elif tally.offered and tally.faults < ACHIEVED_SHARE_MIN * tally.offered:
        found.append(f"only {tally.faults:,} of {tally.offered:,} faults were answered in time")
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement of a search."""

    rate_per_s: float
    holds: bool


@dataclass(slots=True)
class RateSearch:
    """Finds the highest rate that holds: doubles until one breaks, then halves the gap.

    Args:
        first_per_s: where it begins; where that breaks already, it halves instead.
        last_per_s: no rate above this is tried.
        precision: it ends when the gap between a rate that holds and one that breaks is this share of it.
        tries: a rate breaks if it does so this many times in a row.
        steps_max: measurements, at most.

    Attributes:
        steps: measurements so far.
        holds_per_s: the highest rate that held; 0: none yet.
    """

    first_per_s: float
    last_per_s: float = RATE_MAX_PER_S
    precision: float = 0.05
    tries: int = TRIES
    steps_max: int = STEPS_MAX
    steps: list[Step] = field(default_factory=list)
    holds_per_s: float = 0.0
    _breaks_per_s: float = float("inf")
    _breaks_in_a_row: int = 0
    _rate_per_s: float = 0.0

    def next_rate(self) -> float | None:
        """The rate to measure now; None: the search is over."""
        if len(self.steps) >= self.steps_max:
            return None
        if self._breaks_in_a_row:
            return self._rate_per_s
        self._rate_per_s = self._choose()
        return self._rate_per_s or None

    def tell(self, *, holds: bool) -> None:
        """What the measurement of `next_rate` came to."""
        self.steps.append(Step(self._rate_per_s, holds))
        if holds:
            self._breaks_in_a_row = 0
            self.holds_per_s = max(self.holds_per_s, self._rate_per_s)
            return
        self._breaks_in_a_row += 1
        if self._breaks_in_a_row >= self.tries:
            self._breaks_in_a_row = 0
            self._breaks_per_s = min(self._breaks_per_s, self._rate_per_s)

    def _choose(self) -> float:
        """0: nothing is left to learn."""
        low, high = self.holds_per_s, self._breaks_per_s
        if not self.steps:
            return min(self.first_per_s, self.last_per_s)
        if high == float("inf"):
            return 0.0 if low >= self.last_per_s else min(2 * low, self.last_per_s)
        if not low:
            lowest = self.first_per_s / 2**HALVINGS_MAX
            return high / 2 if high / 2 >= lowest else 0.0
        return (low + high) / 2 if high - low > self.precision * low else 0.0
