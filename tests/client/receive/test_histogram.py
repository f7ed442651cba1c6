"""The latency histogram against exact percentiles."""

from __future__ import annotations

import math

import pytest
from farfault_client.receive.histogram import LatencyFigures, LatencyHistogram
from hypothesis import given
from hypothesis import strategies as st

BUCKET = 2 ** (1 / 32)


def test_nothing_observed() -> None:
    assert LatencyHistogram().figures() == LatencyFigures(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e-6, 1e-3, 1.0, 999.0])
def test_one_observation(seconds: float) -> None:
    histogram = LatencyHistogram()
    histogram.observe(seconds)
    us = max(0.0, seconds * 1e6)
    figures = histogram.figures()
    assert (figures.count, figures.max_us, figures.mean_us) == (1, us, us)
    assert figures.p50_us == pytest.approx(us, rel=0.025, abs=0)


def test_longer_than_the_last_bucket() -> None:
    histogram = LatencyHistogram()
    histogram.observe(1e6)
    assert histogram.figures().max_us == 1e12


@given(
    st.lists(st.floats(1e-6, 1000.0), min_size=1, max_size=200),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_percentiles_are_within_a_bucket(durations: list[float], share: float) -> None:
    histogram = LatencyHistogram()
    for seconds in durations:
        histogram.observe(seconds)
    exact_us = sorted(durations)[max(1, math.ceil(share * len(durations))) - 1] * 1e6
    found_us = histogram.percentile_us(share)
    assert exact_us * (1 - 1e-9) <= found_us <= exact_us * BUCKET * (1 + 1e-9)
    assert histogram.figures().mean_us == pytest.approx(sum(durations) / len(durations) * 1e6)


def test_a_sum_is_as_if_one_had_seen_all() -> None:
    durations = [[0.0001, 0.02], [0.5], []]
    parts, whole = [LatencyHistogram() for _ in durations], LatencyHistogram()
    for part, seconds in zip(parts, durations, strict=True):
        for value in seconds:
            part.observe(value)
            whole.observe(value)
    total = LatencyHistogram.sum_of(parts)
    assert (total.figures(), total.counts()) == (whole.figures(), whole.counts())
