"""Which pages hold the page tables that a vCPU's CR3 reaches. No I/O.

A KVM with shadow paging reads guest page tables itself; an absent one becomes a #PF *inside* the guest
instead of an exit. So on such hosts the tables are installed before the vCPU's first KVM_RUN:

    walk = PageTableWalk.of_registers(cr0, cr3, cr4, efer)
    while tables := walk.next_level():
        install those pages, read each, then walk.feed({gpa: its 4096 bytes, ...})

Formats: Intel SDM volume 3, chapter 4 (32-bit, PAE, 4-level, 5-level paging).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from farfault_shim.layout import Gpa

TABLE_BYTES = 4096
TABLES_MAX = 65536
"""Tables of one walk; a guest with more (256 MiB of tables) gets the first ones only."""

_CR0_PG = 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
_EFER_LMA = 1 << 10
_PRESENT, _LARGE = 1, 1 << 7
_ADDRESS_64 = 0x000F_FFFF_FFFF_F000


class PageTableWalk:
    """A walk from the root, one level at a time.

    Args:
        root: guest physical address of the root table; None: paging is off, nothing to walk.
        levels: levels of tables below and including the root.
        entry_bytes: 8, or 4 for 32-bit paging.
        root_entries: entries of the root table.
        large_pages: bit 7 of an entry above the last level names a large page; ignored by the processor
            where it is off (32-bit paging without CR4.PSE).
    """

    def __init__(
        self,
        root: int | None,
        levels: int,
        *,
        entry_bytes: int = 8,
        root_entries: int = 512,
        large_pages: bool = True,
    ) -> None:
        self._large_pages = large_pages
        self._level = levels
        self._entry_bytes = entry_bytes
        self._entries = root_entries
        self._tables: set[int] = set() if root is None else {root}
        self._seen: set[int] = set()

    @classmethod
    def of_registers(cls, cr0: int, cr3: int, cr4: int, efer: int) -> PageTableWalk:
        """The walk that a processor with these control registers does."""
        if not cr0 & _CR0_PG:
            return cls(None, 0)
        if efer & _EFER_LMA:
            return cls(cr3 & _ADDRESS_64, 5 if cr4 & _CR4_LA57 else 4)
        if cr4 & _CR4_PAE:
            return cls(cr3 & 0xFFFF_FFE0, 3, root_entries=4)
        return cls(cr3 & 0xFFFF_F000, 2, entry_bytes=4, root_entries=1024, large_pages=bool(cr4 & _CR4_PSE))

    def next_level(self) -> frozenset[Gpa]:
        """Page addresses of the tables to install and read now; empty: the walk is over."""
        if self._level <= 0:
            return frozenset()
        return frozenset(Gpa(table & ~(TABLE_BYTES - 1)) for table in self._tables)

    def feed(self, pages: Mapping[Gpa, bytes]) -> None:
        """The contents of the pages that `next_level` named; those outside of RAM may be missing."""
        below: set[int] = set()
        for table in self._tables:
            page = pages.get(Gpa(table & ~(TABLE_BYTES - 1)))
            if page is not None:
                below |= self._entries_of(page, table & (TABLE_BYTES - 1))
        self._seen |= self._tables
        self._tables = set(sorted(below - self._seen)[: max(0, TABLES_MAX - len(self._seen))])
        self._level = self._level - 1 if self._tables else 0
        self._entries = TABLE_BYTES // self._entry_bytes

    def _entries_of(self, page: bytes, offset: int) -> set[int]:
        if self._level == 1:
            return set()
        code = "Q" if self._entry_bytes == 8 else "I"
        entries = struct.unpack_from(f"<{self._entries}{code}", page, offset)
        leaves_possible = self._large_pages and self._level <= 3
        return {
            entry & (_ADDRESS_64 if self._entry_bytes == 8 else 0xFFFF_F000)
            for entry in set(entries)
            if entry & _PRESENT and not (leaves_possible and entry & _LARGE)
        }
