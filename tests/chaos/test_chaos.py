"""A part of the chaos suite; `make chaos` runs all of it."""

from __future__ import annotations

import pytest
from chaos_plan import make_plan
from chaos_run import play

pytestmark = pytest.mark.e2e

SEEDS = range(1001, 1013)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost(seed: int) -> None:
    plan = make_plan(seed)
    result = play(plan)
    assert not result.problem, f"{result.problem}\n{plan}\n{result.logs}"


def test_a_seed_says_it_all() -> None:
    assert make_plan(7) == make_plan(7)
    assert make_plan(7) != make_plan(8)
