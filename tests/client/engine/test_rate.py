"""The bandwidth cap of the background lane."""

from __future__ import annotations

import pytest
from farfault_client.engine.rate import BURST_S, RateLimit


def _spent(rate: RateLimit, begin: float, seconds: float, batch_bytes: int, step_s: float = 0.0005) -> int:
    spent, now = 0, begin
    while now < begin + seconds:
        while rate.allows(now):
            rate.spend(batch_bytes)
            spent += batch_bytes
        now += step_s
    return spent


@pytest.mark.parametrize("bytes_per_s", [1_000_000, 50_000_000, 1_000_000_000])
@pytest.mark.parametrize("begin", [0.0, 1e6])
def test_the_average_is_the_cap(bytes_per_s: int, begin: float) -> None:
    batch = 256 << 10
    spent = _spent(RateLimit(bytes_per_s), begin, 2.0, batch)
    assert spent == pytest.approx(2 * bytes_per_s, abs=BURST_S * bytes_per_s + 2 * batch)


def test_no_cap() -> None:
    rate = RateLimit(0)
    for _ in range(100):
        rate.spend(1 << 30)
        assert rate.allows(0.0)
    assert rate.wait_s() == 0.0


def test_idle_time_is_not_saved_up() -> None:
    rate = RateLimit(1_000_000)
    assert rate.allows(0.0)
    assert rate.allows(1000.0)
    spent = 0
    while rate.allows(1000.0):
        rate.spend(1000)
        spent += 1000
    assert spent <= BURST_S * 1_000_000 + 1000


def test_the_cap_may_change_while_it_runs() -> None:
    rate = RateLimit(1_000_000)
    _spent(rate, 0.0, 1.0, 1000)
    rate.bytes_per_s = 10_000_000
    assert _spent(rate, 1.0, 1.0, 1000) == pytest.approx(10_000_000, rel=0.05)
    rate.bytes_per_s = 0
    assert rate.allows(2.0)


def test_wait_says_when_it_is_allowed_again() -> None:
    rate = RateLimit(1000)
    assert rate.allows(5.0)
    rate.spend(520)
    assert not rate.allows(5.0)
    assert rate.wait_s() == pytest.approx(0.5)
    assert not rate.allows(5.4)
    assert rate.allows(5.51)
