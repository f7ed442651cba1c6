"""Which pages of a RAM file are in memory: the kernel's own word, for a receiver that was restarted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from farfault_shim.install.installer import BASE_PAGE_BYTES
from farfault_shim.layout import PageIndex, PageRun, Region


def resident_runs(ram_fd: int, region: Region) -> Iterator[PageRun]:
    """The runs of pages that have data, from SEEK_DATA and SEEK_HOLE (lseek(2)); fills no hole.

    Nothing is known of regions with large pages: hugetlbfs calls every hole data (its lseek is the generic
    one, fs/hugetlbfs/inode.c). Their pages are fetched again, and those that are there answer EEXIST.
    """
    page_size = region.page_size_bytes
    if page_size != BASE_PAGE_BYTES:
        return
    position = 0
    while position < region.size_bytes:
        try:
            data = os.lseek(ram_fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        hole = min(os.lseek(ram_fd, data, os.SEEK_HOLE), region.size_bytes)
        first, end = -(-data // page_size), hole // page_size
        if end > first:
            yield PageRun(PageIndex(region.first_page + first), end - first)
        position = hole
