"""Which pages of a RAM file are in memory, by the kernel's word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from farfault_shim.install.resident import resident_runs
from farfault_shim.layout import Layout
from uffd_memory import HUGE, PAGE, huge_pages, memfd_memory, pattern


@pytest.mark.parametrize("pages", [[], [0], [15], [0, 1, 2, 5, 8, 9, 15], list(range(16))])
def test_pages_with_data_are_found_and_no_hole_is_filled(pages: list[int]) -> None:
    region = Layout([(4 * PAGE, PAGE), (16 * PAGE, PAGE)]).regions[1]
    descriptor = os.memfd_create("farfault-test-ram")
    os.ftruncate(descriptor, 16 * PAGE)
    for page in pages:
        os.pwrite(descriptor, pattern(page, 1), page * PAGE)
    for _ in range(2):
        found = [page - 4 for run in resident_runs(descriptor, region) for page in range(run.first, run.end)]
        assert found == pages
    assert os.fstat(descriptor).st_blocks * 512 == len(pages) * PAGE
    os.close(descriptor)


def test_zero_pages_that_were_written_count(tmp_path: Path) -> None:
    descriptor = os.memfd_create("farfault-test-ram")
    os.ftruncate(descriptor, 4 * PAGE)
    os.pwrite(descriptor, bytes(PAGE), PAGE)
    assert [tuple(run) for run in resident_runs(descriptor, Layout([(4 * PAGE, PAGE)]).regions[0])] == [(1, 1)]
    os.close(descriptor)


def test_a_file_longer_than_its_region() -> None:
    descriptor = os.memfd_create("farfault-test-ram")
    os.pwrite(descriptor, pattern(0, 8), 0)
    assert [tuple(run) for run in resident_runs(descriptor, Layout([(4 * PAGE, PAGE)]).regions[0])] == [(0, 4)]
    os.close(descriptor)


def test_holes_of_hugetlbfs_are_never_taken_for_pages() -> None:
    with huge_pages(2), memfd_memory(2 * HUGE, os.MFD_HUGETLB) as (descriptor, memory):
        memory.map[0] = 1
        assert os.lseek(descriptor, HUGE, os.SEEK_DATA) == HUGE, "the kernel calls the hole data"
        assert list(resident_runs(descriptor, Layout([(2 * HUGE, HUGE)]).regions[0])) == []
