"""Which page each vCPU touches next. No I/O; randomness comes from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Protocol

from farfault_client.load.plan import PatternKind, PatternPlan
from farfault_client.load.zipf import ZipfRanks

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbours in rank land far apart in memory


class Pattern(Protocol):
    """The accesses of one vCPU."""

    def next_page(self) -> int | None:
        """The page that is touched next; None: nothing more, ever."""


class Sequential:
    """Upwards from a start, for ever round the memory."""

    def __init__(self, page_count: int, first: int) -> None:
        self._page_count = page_count
        self._next = first % page_count

    def next_page(self) -> int:
        page = self._next
        self._next = page + 1 if page + 1 < self._page_count else 0
        return page


class Stride:
    """Every `stride`-th page; each turn round the memory begins one page further, so that it covers all of it."""

    def __init__(self, page_count: int, first: int, stride: int) -> None:
        self._page_count = page_count
        self._stride = max(1, stride % page_count)
        self._first = first % page_count
        self._next = self._first

    def next_page(self) -> int:
        page = self._next
        self._next += self._stride
        if self._next >= self._page_count:
            self._first = (self._first + 1) % self._stride
            self._next = self._first
        return page


class Uniform:
    """Every page alike, independently."""

    def __init__(self, page_count: int, source: random.Random) -> None:
        self._page_count = page_count
        self._random = source.random

    def next_page(self) -> int:
        return int(self._random() * self._page_count)


class Zipf:
    """Few pages often, most rarely. All vCPUs have the same hot pages, spread over the memory."""

    def __init__(self, page_count: int, exponent: float, source: random.Random) -> None:
        self._page_count = page_count
        self._ranks = ZipfRanks(page_count, exponent, source.random)
        self._step = coprime_step(page_count)

    def next_page(self) -> int:
        return (self._ranks.draw() - 1) * self._step % self._page_count


class Listed:
    """Pages in a given order, once; numbers past the memory's end wrap round."""

    def __init__(self, page_count: int, pages: Callable[[int], int | None]) -> None:
        self._page_count = page_count
        self._pages = pages
        self._position = 0

    def next_page(self) -> int | None:
        page = self._pages(self._position)
        self._position += 1
        return None if page is None else page % self._page_count


def coprime_step(count: int) -> int:
    """A step that visits every number below `count` once, far from its neighbours."""
    step = GOLDEN % count or 1
    while math.gcd(step, count) != 1:
        step += 1
    return step


def pattern_for(plan: PatternPlan, page_count: int, vcpu: int, vcpus_total: int) -> Pattern:
    """The pattern of one vCPU, except for REPLAY, which needs its trace.

    Args:
        plan: of the test.
        page_count: of the memory.
        vcpu: its number, below `vcpus_total`. Sequential and strided vCPUs start evenly spread.
    """
    first = vcpu * page_count // vcpus_total
    source = random.Random(f"farfault load {plan.random_seed} {vcpu}")
    match plan.kind:
        case PatternKind.SEQUENTIAL:
            return Sequential(page_count, first)
        case PatternKind.STRIDE:
            return Stride(page_count, first, plan.stride_pages)
        case PatternKind.RANDOM:
            return Uniform(page_count, source)
        case PatternKind.ZIPF:
            return Zipf(page_count, plan.zipf_exponent, source)
        case PatternKind.REPLAY:
            raise ValueError("a replay needs its trace")
