"""Due times of an open loop."""

import itertools
import random

import pytest
from farfault_client.load.schedule import BACKLOG_STEPS_MAX, ConstantRate, PoissonRate, Recorded, Schedule, spread
from farfault_client.load.trace import parse_trace


def due_before(schedule: Schedule, until: float) -> list[float]:
    found = []
    while (due := schedule.peek()) is not None and due < until:
        found.append(due)
        schedule.advance()
    return found


def test_a_constant_rate_does_not_drift() -> None:
    due = due_before(ConstantRate(10.0, 3.0), 1010.0)
    assert len(due) == 3000
    assert due[-1] == pytest.approx(10.0 + 2999 / 3)


def test_poisson_arrivals_keep_the_rate_with_gaps_of_all_sizes() -> None:
    due = due_before(PoissonRate(0.0, 1000.0, random.Random(1)), 20.0)
    assert len(due) == pytest.approx(20_000, rel=0.03)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert sum(gap > 0.001 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)


def test_a_replay_keeps_the_recorded_times() -> None:
    trace = parse_trace(["7 0 1", "8 0 2", "10 0 3"], "t")
    schedule = Recorded(100.0, trace, 2.0)
    assert schedule.backlog(101.0) == [(100.0, 1), (100.5, 1)]
    assert due_before(schedule, 1000.0) == [100.0, 100.5, 101.5]
    assert schedule.peek() is None


@pytest.mark.parametrize("issued", [0, 3])
def test_the_backlog_of_a_constant_rate_counts_every_fault_that_was_due(issued: int) -> None:
    schedule = ConstantRate(0.0, 10.0)
    for _ in range(issued):
        schedule.advance()
    backlog = schedule.backlog(1.0)
    assert sum(count for _, count in backlog) == 10 - issued
    assert backlog[0][0] == pytest.approx(issued / 10)
    assert schedule.backlog(0.0) == []


def test_a_large_backlog_is_told_in_few_groups() -> None:
    groups = spread(0.0, 10.0, 1_000_003)
    assert len(groups) <= BACKLOG_STEPS_MAX
    assert sum(count for _, count in groups) == 1_000_003
    assert all(0.0 <= due < 10.0 for due, _ in groups)
