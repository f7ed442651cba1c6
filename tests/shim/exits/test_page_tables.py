"""Page-table walks over a guest made of bytes."""

from __future__ import annotations

import struct

import pytest
from farfault_shim.exits import page_tables
from farfault_shim.exits.page_tables import TABLE_BYTES, PageTableWalk
from farfault_shim.layout import Gpa

PG, PSE, PAE, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
PRESENT, LARGE = 1, 1 << 7

Ram = dict[int, bytes]


def table(entries: dict[int, int], entry_bytes: int = 8, base: int = 0) -> bytes:
    page = bytearray(TABLE_BYTES)
    for index, entry in entries.items():
        struct.pack_into("<Q" if entry_bytes == 8 else "<I", page, base + index * entry_bytes, entry)
    return bytes(page)


def walk(ram: Ram, cr0: int, cr3: int, cr4: int = 0, efer: int = 0) -> list[set[int]]:
    """The pages of each level."""
    levels: list[set[int]] = []
    walking = PageTableWalk.of_registers(cr0, cr3, cr4, efer)
    while pages := walking.next_level():
        levels.append({int(page) for page in pages})
        walking.feed({Gpa(page): ram[page] for page in pages if page in ram})
        assert len(levels) <= 5
    return levels


def test_without_paging_there_is_nothing_to_walk() -> None:
    assert walk({}, 0, 0x1000) == []


def test_four_levels() -> None:
    ram = {
        0x1000: table({0: 0x2000 | PRESENT, 511: 0x3000 | PRESENT | 1 << 63, 5: 0x9000}),
        0x2000: table({0: 0x4000 | PRESENT, 1: 0x4000_0000 | PRESENT | LARGE}),
        0x3000: table({}),
        0x4000: table({0: 0x5000 | PRESENT, 1: 0x20_0000 | PRESENT | LARGE}),
        0x5000: table({index: index << 12 | PRESENT for index in range(512)}),
    }
    assert walk(ram, PG, 0x1000 | 0x18, PAE, LMA) == [{0x1000}, {0x2000, 0x3000}, {0x4000}, {0x5000}]


def test_five_levels() -> None:
    ram = {page << 12: table({0: (page + 1) << 12 | PRESENT}) for page in range(1, 6)}
    assert walk(ram, PG, 0x1000, PAE | LA57, LMA) == [{0x1000}, {0x2000}, {0x3000}, {0x4000}, {0x5000}]


def test_bit_7_of_the_top_level_is_no_large_page() -> None:
    ram = {0x1000: table({0: 0x2000 | PRESENT | LARGE}), 0x2000: table({})}
    assert walk(ram, PG, 0x1000, PAE, LMA) == [{0x1000}, {0x2000}]


def test_pae_has_four_root_entries_at_a_32_byte_boundary() -> None:
    ram = {
        0x1000: table({0: 0x2000 | PRESENT, 3: 0x3000 | PRESENT, 4: 0x7000 | PRESENT}, base=0x20),
        0x2000: table({0: 0x4000 | PRESENT, 1: 0x20_0000 | PRESENT | LARGE}),
        0x3000: table({}),
        0x4000: table({0: 0x8000 | PRESENT}),
    }
    assert walk(ram, PG, 0x1020, PAE) == [{0x1000}, {0x2000, 0x3000}, {0x4000}]


@pytest.mark.parametrize(("cr4", "expected"), [(PSE, {0x2000}), (0, {0x2000, 0x40_0000})])
def test_32_bit_large_pages_need_pse(cr4: int, expected: set[int]) -> None:
    ram = {0x1000: table({0: 0x2000 | PRESENT, 1023: 0x40_0000 | PRESENT | LARGE}, 4), 0x2000: table({}, 4)}
    assert walk(ram, PG, 0x1000, cr4) == [{0x1000}, expected]


def test_a_table_outside_of_ram_ends_its_branch() -> None:
    ram = {0x1000: table({0: 0x2000 | PRESENT, 1: 0xF000_0000 | PRESENT}), 0x2000: table({})}
    assert walk(ram, PG, 0x1000, PAE, LMA) == [{0x1000}, {0x2000, 0xF000_0000}]
    assert walk({}, PG, 0x1000, PAE, LMA) == [{0x1000}]


def test_a_table_that_names_itself_is_walked_once() -> None:
    ram = {0x1000: table({0: 0x2000 | PRESENT, 510: 0x1000 | PRESENT}), 0x2000: table({0: 0x1000 | PRESENT})}
    assert walk(ram, PG, 0x1000, PAE, LMA) == [{0x1000}, {0x2000}]


def test_a_walk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_tables, "TABLES_MAX", 4)
    ram = {0x1000: table({index: (index + 2) << 12 | PRESENT for index in range(512)})}
    assert [len(level) for level in walk(ram, PG, 0x1000, PAE, LMA)] == [1, 3]
