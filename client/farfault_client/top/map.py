"""The memory map as lines of characters."""

from __future__ import annotations

from typing import Final, NamedTuple

ABSENT, MOVING, INSTALLED, ZERO = range(4)
"""The bytes of `MigrationStatus.map`."""


class Glyph(NamedTuple):
    """How a cell looks: a character of any terminal that speaks UTF-8, one of any other, and a colour."""

    text: str
    ascii: str
    style: str
    meaning: str


GLYPHS: Final = {
    ABSENT: Glyph("·", ".", "dim", "absent"),
    MOVING: Glyph("▒", "*", "bold yellow", "in flight"),
    INSTALLED: Glyph("█", "#", "green", "installed"),
    ZERO: Glyph("░", "-", "cyan", "zero or removed"),
}


def resample(cells: bytes, count: int) -> bytes:
    """A row of `count` cells that shows what `cells` shows: a cell moves where one of its parts does, else it is what
    most of its parts are."""
    if not cells:
        return bytes(count)
    result = bytearray()
    for index in range(count):
        first = index * len(cells) // count
        part = cells[first : max(first + 1, (index + 1) * len(cells) // count)]
        result.append(MOVING if MOVING in part else max(set(part), key=part.count))
    return bytes(result)
