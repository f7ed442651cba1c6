"""A part of the chaos suite and of the soak; `make chaos` and `make soak` run all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import soak
from chaos_plan import kinds, make_plan
from chaos_run import RUN_MARK, play

pytestmark = pytest.mark.e2e

SEEDS = range(1001, 1013)


@pytest.fixture(autouse=True)
def no_mark_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run marks its children through the environment, which is not the next test's."""
    monkeypatch.setenv(RUN_MARK, "none")


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost(seed: int) -> None:
    plan = make_plan(seed)
    result = play(plan)
    assert not result.problem, f"{result.problem}\n{plan}\n{result.logs}"


def test_a_guest_moves_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "MOVES_MIN", 4)
    samples = soak.play(kinds()[-1], minutes=0)
    assert [sample.move for sample in samples] == [0, 1, 2, 3]
    assert soak.growth(samples) == []


def test_growth_is_found() -> None:
    steady = soak.Sample(0, 1.0, 1.0, 20, 4, 15.0, 26, 13, 24.0)
    leaking = [replace(steady, move=move, vmm_descriptors=20 + move) for move in range(40)]
    assert soak.growth([replace(steady, move=move) for move in range(40)]) == []
    assert soak.growth(leaking) == ["vmm_descriptors: 25.5 at first, 54.5 at last"]


def test_a_seed_says_it_all() -> None:
    assert make_plan(7) == make_plan(7)
    assert make_plan(7) != make_plan(8)
