"""Bulk leaves a processor while faults come one after the other, and only then."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator

import pytest
from farfault_cli.processors import (
    CALM_LOOKS,
    CROWDED_PER_S,
    LOOK_S,
    FaultCrowd,
    leave_faults_a_processor,
    processors_for_bulk,
)
from hypothesis import given
from hypothesis import strategies as st

WAIT_S = 20.0


def test_faults_before_the_first_look_are_no_crowd() -> None:
    assert not FaultCrowd().look(1_000_000, now=5.0)


def test_a_crowd_begins_at_once_and_ends_when_it_has_been_calm_for_a_while() -> None:
    crowd, now, faults = FaultCrowd(), 0.0, 0
    crowd.look(faults, now)

    def look(more: int) -> bool:
        nonlocal now, faults
        now, faults = now + 1.0, faults + more
        return crowd.look(faults, now)

    assert not look(CROWDED_PER_S - 1)
    assert look(CROWDED_PER_S)
    assert [look(0) for _ in range(CALM_LOOKS)] == [True] * (CALM_LOOKS - 1) + [False]
    assert look(CROWDED_PER_S)


@given(st.sets(st.integers(0, 1023), min_size=1), st.booleans())
def test_bulk_always_has_a_processor_and_leaves_one_where_there_are_two(usable: set[int], is_crowded: bool) -> None:
    left = processors_for_bulk(usable, is_crowded=is_crowded)

    assert left
    assert left <= usable
    assert len(usable - left) == (is_crowded and len(usable) > 1)


@pytest.fixture
def bulk() -> Iterator[int]:
    """A process of ours, as the bulk process is one."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process may use a single processor")
def test_a_bulk_process_is_moved_away_and_let_back(bulk: int) -> None:
    usable = os.sched_getaffinity(0)
    faults_a_look: int | None = 0
    faults = 0

    def count() -> int | None:
        nonlocal faults
        if faults_a_look is None:
            return None
        faults += faults_a_look
        return faults

    async def until(processors: set[int]) -> None:
        for _ in range(int(WAIT_S / LOOK_S)):
            if os.sched_getaffinity(bulk) == processors:
                return
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"bulk runs on {os.sched_getaffinity(bulk)} instead of {processors}")

    async def play() -> None:
        nonlocal faults_a_look
        moving = asyncio.create_task(leave_faults_a_processor(lambda: bulk, count))
        faults_a_look = 1_000_000
        await until(usable - {max(usable)})
        faults_a_look = 0
        await until(usable)
        faults_a_look = 1_000_000
        await until(usable - {max(usable)})
        faults_a_look = None  # nobody is connected any more
        await until(usable)
        assert not moving.done()
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)

    asyncio.run(play())


def test_a_bulk_process_that_is_gone_is_no_matter() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    faults = iter(range(0, 1 << 40, 1_000_000))

    async def play() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5 * LOOK_S):
                await leave_faults_a_processor(lambda: process.pid, lambda: next(faults))

    asyncio.run(play())
