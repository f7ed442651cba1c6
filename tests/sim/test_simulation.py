"""Thousands of whole-system runs, each from its seed; and proof that they would notice a mistake.

A failure prints its seed. ``FARFAULT_SIM_SEED=123 pytest tests/sim -k replay`` runs it again, and
``FARFAULT_SIM_SEEDS=100000`` runs more of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sim_bugs import BUGS
from simulation import Outcome, replay

SEEDS = int(os.environ.get("FARFAULT_SIM_SEEDS", "10000"))
BUG_SEEDS_MAX = 2000
"""A planted bug shows within this many seeds."""
PROGRAM = Path(__file__).with_name("simulation.py")


@pytest.mark.timeout(600)
def test_seeds() -> None:
    """All seeds hold, in one process a CPU."""
    parts = os.cpu_count() or 1
    edges = [part * SEEDS // parts for part in range(parts + 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(first), str(end)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for first, end in itertools.pairwise(edges)
    ]
    total = Outcome()
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        total.add(Outcome(**json.loads(output)))
    print(f"{total}")
    assert total.runs == SEEDS
    assert total.crashes > SEEDS // 20
    assert total.bad_answers > SEEDS // 20
    assert total.faults > SEEDS


def test_replay() -> None:
    """One seed, by default the first."""
    replay(int(os.environ.get("FARFAULT_SIM_SEED", "0")))


def test_a_seed_decides_everything() -> None:
    assert [replay(seed) for seed in range(20)] == [replay(seed) for seed in range(20)]


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    for seed in range(BUG_SEEDS_MAX):
        try:
            replay(seed, BUGS[name])
        except AssertionError as error:
            assert f"FARFAULT_SIM_SEED={seed}" in error.__notes__[0]  # noqa: PT017
            return
    pytest.fail(f"{name}: {BUG_SEEDS_MAX} seeds did not notice")
