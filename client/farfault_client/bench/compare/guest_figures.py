"""What the guest noticed of a move, from its own counters. No I/O.

The guest takes the TSC before and after the first load from each page that it visits, and counts the difference in a
histogram of powers of two, and their sum. An access of at least `SLOW_TICKS` counts as a fault: none that had to be
fetched can be shorter (waking another process and coming back takes longer), and few that were not are longer: of two
million accesses of a guest that misses nothing, on a busy host, some hundreds are, where the host ran something else.
They count against every mode alike. The time in faults is the sum less the quick accesses, which are taken from the
middle of their buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

SLOW_BUCKET: Final = 16
SLOW_TICKS: Final = 1 << SLOW_BUCKET
FIRST_SECOND_US: Final = 1_000_000


class GuestSample(NamedTuple):
    """The guest's counters at one moment, over all vCPUs.

    Attributes:
        unix_us: when they were read.
        touched: pages visited.
        access_ticks: time that all of these first loads took.
        accesses: their number by bucket; bucket b counts those of 2^b to 2^(b+1) - 1 ticks.
    """

    unix_us: int
    touched: int
    access_ticks: int
    accesses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GuestFigures:
    """What the guest noticed between the switchover and the last page.

    Attributes:
        faults: slow accesses.
        mean_fault_us, p50_fault_us, p99_fault_us: of them; None without any.
        blocked_share: time in slow accesses, of all vCPUs' time in the phase.
        touched_first_second: pages visited in the first second after the switchover, whatever the phase lasted.
    """

    faults: int
    mean_fault_us: float | None
    p50_fault_us: float | None
    p99_fault_us: float | None
    blocked_share: float
    touched_first_second: float


def guest_figures(
    stopped: GuestSample,
    samples: Sequence[GuestSample],
    *,
    vcpus: int,
    ticks_per_us: float,
    resumed_us: int,
    all_there_us: int,
) -> GuestFigures:
    """The figures of one move.

    Args:
        stopped: the counters as the source left them.
        samples: read on the destination, in order of time.
        vcpus: of the guest.
        ticks_per_us: of its TSC.
        resumed_us, all_there_us: begin and end of the phase, Unix time.

    Raises:
        ValueError: the samples do not reach the end of the phase, or of the first second.
    """
    last = _first_at(samples, all_there_us)
    accesses = [max(0, after - before) for before, after in zip(stopped.accesses, last.accesses, strict=True)]
    slow = [0] * SLOW_BUCKET + accesses[SLOW_BUCKET:]
    faults = sum(slow)
    quick_ticks = sum(count * 1.5 * 2**bucket for bucket, count in enumerate(accesses[:SLOW_BUCKET]))
    slow_us = max(0.0, last.access_ticks - stopped.access_ticks - quick_ticks) / ticks_per_us if faults else 0.0
    percentile = lambda share: percentile_ticks(slow, share) / ticks_per_us if faults else None  # noqa: E731
    return GuestFigures(
        faults=faults,
        mean_fault_us=slow_us / faults if faults else None,
        p50_fault_us=percentile(0.50),
        p99_fault_us=percentile(0.99),
        blocked_share=min(1.0, slow_us / ((all_there_us - resumed_us) * vcpus)),
        touched_first_second=touched_at(samples, resumed_us + FIRST_SECOND_US) - stopped.touched,
    )


def percentile_ticks(counts: Sequence[int], share: float) -> float:
    """The value that `share` (0..1) of the accesses do not exceed, interpolated within its bucket's logarithm."""
    rank, seen = share * sum(counts), 0
    for bucket, count in enumerate(counts):
        if count and seen + count >= rank:
            return float(2 ** (bucket + (rank - seen) / count))
        seen += count
    return 0.0


def touched_at(samples: Sequence[GuestSample], unix_us: int) -> float:
    """Pages visited at a moment, between the samples around it. Raises ValueError past the last sample."""
    before = None
    for sample in samples:
        if sample.unix_us >= unix_us:
            if before is None or sample.unix_us == before.unix_us:
                return sample.touched
            part = (unix_us - before.unix_us) / (sample.unix_us - before.unix_us)
            return before.touched + part * (sample.touched - before.touched)
        before = sample
    raise ValueError(f"no sample at or after {unix_us}")


def _first_at(samples: Sequence[GuestSample], unix_us: int) -> GuestSample:
    for sample in samples:
        if sample.unix_us >= unix_us:
            return sample
    raise ValueError(f"no sample at or after {unix_us}")
