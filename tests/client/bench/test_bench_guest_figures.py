"""Figures from the guest's counters."""

from __future__ import annotations

import pytest
from farfault_client.bench.compare.guest_figures import GuestSample, guest_figures, percentile_ticks, touched_at

TICKS_PER_US = 1000.0
SECOND_US = 1_000_000


def counts(**by_bucket: int) -> tuple[int, ...]:
    """``b20=3``: three accesses of 2^20 to 2^21 - 1 ticks."""
    return tuple(by_bucket.get(f"b{bucket}", 0) for bucket in range(64))


def test_only_slow_accesses_since_the_switchover_count() -> None:
    stopped = GuestSample(0, 1000, 5_000_000, counts(b7=900, b20=100))
    end = GuestSample(2 * SECOND_US, 3000, 5_000_000 + 192 * 10 + 4_000_000, counts(b7=910, b20=104))
    figures = guest_figures(
        stopped, [stopped, end], vcpus=2, ticks_per_us=TICKS_PER_US, resumed_us=0, all_there_us=2 * SECOND_US
    )
    assert figures.faults == 4
    assert figures.mean_fault_us == pytest.approx(1000)  # (sum - 10 quick ones of 192 ticks) / 4 / 1000
    assert figures.blocked_share == pytest.approx(4_000 / (2 * 2 * SECOND_US))
    assert figures.touched_first_second == pytest.approx(1000)  # half of what was touched in two seconds


def test_without_faults_there_is_no_mean() -> None:
    still = [GuestSample(at, 0, 0, counts()) for at in (0, SECOND_US)]
    figures = guest_figures(still[0], still, vcpus=1, ticks_per_us=1, resumed_us=0, all_there_us=10)
    assert (figures.faults, figures.mean_fault_us, figures.p99_fault_us, figures.blocked_share) == (0, None, None, 0)


def test_samples_must_reach_the_end() -> None:
    samples = [GuestSample(0, 0, 0, counts())]
    with pytest.raises(ValueError, match="no sample"):
        guest_figures(samples[0], samples, vcpus=1, ticks_per_us=1, resumed_us=0, all_there_us=10)


def test_percentiles_lie_within_their_bucket() -> None:
    values = counts(b16=50, b20=50)
    assert percentile_ticks(values, 0.5) == 2**17
    assert percentile_ticks(values, 0.25) == pytest.approx(2**16.5)
    assert percentile_ticks(values, 1) == 2**21
    assert percentile_ticks(counts(), 0.5) == 0


def test_touched_is_interpolated() -> None:
    samples = [GuestSample(at, touched, 0, counts()) for at, touched in ((0, 0), (10, 100), (10, 120), (20, 220))]
    assert [touched_at(samples, at) for at in (0, 5, 10, 15, 20)] == [0, 50, 100, 170, 220]
