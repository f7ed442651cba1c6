"""A zipf-like order of visits, exponent 1, whose counts follow from one number a class. No I/O.

Ranks from 0 on fall into classes: class c has the 2^c ranks from ``2^c - 1`` on, the last one fewer where the pages
end. Each visit is to a class that the guest draws at random, all alike, and within a class every page is visited once a
round of the class, each round from another start: a page of rank r gets about ``1 / (r + 1)`` of the visits of rank 0,
as zipf's law says, in steps of an octave. A permutation spreads ranks over the pages. How often a page was visited thus
follows from the steps that its class has gone, ranks past the pages included, which ``guest.S`` counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

GOLDEN = 0x9E3779B97F4A7C15
"""Odd, so that its multiples go through every start of a round."""
_PERMUTATIONS = 2
_MASK_64 = (1 << 64) - 1


def skew_classes(pages: int) -> int:
    """Classes that so many pages have."""
    return pages.bit_length()


@dataclass(frozen=True, slots=True)
class Skew:
    """The law for one vCPU's slice; pages are numbered from its beginning.

    Attributes:
        pages: of the slice.
        classes: that are visited; pages of ranks past them are not.
        multiplier, increment, mask, shift: of the permutation, those of the order of a round.
    """

    pages: int
    classes: int
    multiplier: int
    increment: int
    mask: int
    shift: int

    @property
    def used_pages(self) -> int:
        """Pages that are visited at all."""
        return min(self.pages, (1 << self.classes) - 1)

    def page_of(self, rank: int) -> int:
        """The page of a rank; different ranks have different ones."""
        page = rank
        while True:
            for _ in range(_PERMUTATIONS):
                page = (page * self.multiplier + self.increment + 1) & self.mask
                page ^= page >> self.shift
            if page < self.pages:
                return page

    def page_at(self, number: int, step: int) -> int | None:
        """The page that a class visits at a step, from 0 on; None: the step leads past the pages."""
        rank = self._rank(number, step)
        return self.page_of(rank) if rank < self.pages else None

    def visits(self, steps: Sequence[int]) -> list[int]:
        """How often each page was visited.

        Args:
            steps: that each class has gone.
        """
        found = [0] * self.pages
        for number in range(self.classes):
            mask = (1 << number) - 1
            rounds, done = steps[number] >> number, steps[number] & mask
            for index in range(min(mask + 1, self.pages - mask)):
                is_done = ((index - rounds * GOLDEN) & mask) < done
                found[self.page_of(index + mask)] = rounds + is_done
        return found

    def upcoming(self, steps: Sequence[int]) -> set[int]:
        """The page that each class visits next."""
        return {next(self._pages_from(number, steps[number])) for number in range(self.classes)}

    def _pages_from(self, number: int, step: int) -> Iterator[int]:
        for at in count(step):
            page = self.page_at(number, at)
            if page is not None:
                yield page

    def _rank(self, number: int, step: int) -> int:
        mask = (1 << number) - 1
        start = ((step >> number) * GOLDEN) & _MASK_64
        return ((step + start) & mask) + mask
