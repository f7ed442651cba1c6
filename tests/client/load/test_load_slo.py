"""Objectives and the search for the highest rate that holds them."""

import pytest
from farfault_cli.errors import UsageError
from farfault_client.load.slo import STEPS_MAX, TRIES, RateSearch, broken, parse_objectives
from farfault_client.load.tally import Tally, record


def tally_of(*latencies_s: float, offered: int | None = None, errors: int = 0) -> Tally:
    tally = Tally(faults=len(latencies_s), offered=len(latencies_s) if offered is None else offered, errors=errors)
    for latency_s in latencies_s:
        record(tally.latency, latency_s)
    return tally


def test_objectives_are_read_in_every_unit() -> None:
    objectives = parse_objectives(["p99=1ms,max<=2s", "P99.9=250us", "mean=0.5ms"])
    bounds = [(objective.figure, objective.bound_us) for objective in objectives]
    assert bounds == [("p99", 1e3), ("max", 2e6), ("p99.9", 250.0), ("mean", 500.0)]


@pytest.mark.parametrize("text", ["p99", "p99=1", "p99=0ms", "p100=1ms", "rate=5s", "", "p99=1ms,"])
def test_no_objective_is_guessed(text: str) -> None:
    with pytest.raises(UsageError, match="is no objective"):
        parse_objectives([text])


def test_an_objective_holds_up_to_its_bound() -> None:
    objectives = parse_objectives(["p50=2ms", "max=5ms"])
    assert broken(objectives, tally_of(0.001, 0.002, 0.005)) == []
    assert broken(objectives, tally_of(0.001, 0.002, 0.006)) == ["max is 6.003 ms, more than 5 ms"]


@pytest.mark.parametrize(
    ("tally", "problem"),
    [
        (tally_of(0.001, errors=2), "2 faults failed"),
        (tally_of(), "no fault was answered"),
        (tally_of(*[0.001] * 97, offered=100), "only 97 of 100 faults were answered in time"),
    ],
)
def test_a_fast_answer_to_some_faults_is_not_enough(tally: Tally, problem: str) -> None:
    assert broken(parse_objectives(["p50=1s"]), tally) == [problem]


@pytest.mark.parametrize("limit", [130.0, 500.0, 777.0, 4000.0, 123_456.0])
def test_the_search_ends_just_below_the_limit(limit: float) -> None:
    search = RateSearch(1000.0)
    while (rate := search.next_rate()) is not None:
        search.tell(holds=rate <= limit)
    assert limit / 1.06 <= search.holds_per_s <= limit
    assert len(search.steps) < STEPS_MAX


def test_the_search_ends_at_its_last_rate() -> None:
    search = RateSearch(1000.0, last_per_s=5000.0)
    rates = []
    while (rate := search.next_rate()) is not None:
        rates.append(rate)
        search.tell(holds=True)
    assert rates == [1000.0, 2000.0, 4000.0, 5000.0]
    assert search.holds_per_s == 5000.0


def test_the_search_gives_up_where_nothing_holds() -> None:
    search = RateSearch(1024.0)
    while search.next_rate() is not None:
        search.tell(holds=False)
    assert search.holds_per_s == 0.0
    assert search.steps[-1].rate_per_s == 32.0
    assert len(search.steps) == 6 * TRIES


def test_one_disturbance_does_not_end_the_search() -> None:
    search = RateSearch(1000.0, last_per_s=8000.0)
    disturbed = {1, 3}
    while (rate := search.next_rate()) is not None:
        search.tell(holds=len(search.steps) not in disturbed and rate <= 8000.0)
    assert search.holds_per_s == 8000.0


def test_the_search_is_bounded_whatever_it_is_told() -> None:
    search = RateSearch(1.0, last_per_s=1e300, steps_max=7)
    while search.next_rate() is not None:
        search.tell(holds=True)
    assert len(search.steps) == 7
