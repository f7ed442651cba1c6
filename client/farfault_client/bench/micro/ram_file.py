"""Memory for benchmarks: a file in which page n begins with (n + 1) * GOLDEN, as the toucher in C expects."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

GOLDEN: Final = 0x9E3779B97F4A7C15
PAGE_BYTES: Final = 4096
_WORD: Final = struct.Struct("<Q")
_REST: Final = b"far" * ((PAGE_BYTES - _WORD.size) // 3) + b"!" * ((PAGE_BYTES - _WORD.size) % 3)
_PAGES_AT_ONCE: Final = 4096


def page(index: int) -> bytes:
    """What a page holds; never zero."""
    return _WORD.pack((index + 1) * GOLDEN & (1 << 64) - 1) + _REST


def make_ram_file(path: Path, pages: int) -> None:
    """Writes the file."""
    with path.open("wb") as file:
        for first in range(0, pages, _PAGES_AT_ONCE):
            file.write(b"".join(map(page, range(first, min(first + _PAGES_AT_ONCE, pages)))))
