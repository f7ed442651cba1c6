"""The working set of a guest: which pages it missed, in the order in which it missed them.

A later move of the same guest fetches them first (`--hints`). The file is text, one run of pages a line, so that it
can be read, cut and merged with ordinary tools::

    # farfault working set 1
    # pages 131072
    4096 1
    5120 3
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from farfault_cli.errors import UsageError
from farfault_shim.layout import PageIndex, PageRun

HEADER = "# farfault working set 1"
PAGES_MAX = 1 << 20
"""Pages that are remembered: 4 GiB of 4 KiB pages, 8 MiB of memory. Later ones are no part of the set."""


class WorkingSet:
    """The pages that threads missed, each once, in order."""

    def __init__(self) -> None:
        self._pages = array("Q")

    def __len__(self) -> int:
        return len(self._pages)

    def missed(self, page: int) -> None:
        """A thread missed a page that was absent; the caller says so once a page."""
        if len(self._pages) < PAGES_MAX:
            self._pages.append(page)

    def pack(self) -> bytes:
        """64-bit little-endian page numbers."""
        return self._pages.tobytes()


def runs_of(packed: bytes) -> Iterator[PageRun]:
    """The runs of a packed working set; pages that follow one another make one run."""
    first = end = -1
    pages = array("Q", packed)
    for page in pages:
        if page == end:
            end += 1
            continue
        if end > first:
            yield PageRun(PageIndex(first), end - first)
        first, end = page, page + 1
    if end > first:
        yield PageRun(PageIndex(first), end - first)


def write_hints(path: Path, page_count: int, runs: Iterable[PageRun]) -> int:
    """Writes a working set; returns how many pages it has.

    Args:
        path: replaced whole.
        page_count: pages of the guest, for the reader's check.
        runs: in the order in which they are wanted.
    """
    lines, pages = [HEADER, f"# pages {page_count}"], 0
    for run in runs:
        lines.append(f"{run.first} {run.count}")
        pages += run.count
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text("\n".join(lines) + "\n")
    scratch.rename(path)
    return pages


def read_hints(path: Path, page_count: int) -> list[PageRun]:
    """Reads a working set.

    Args:
        path: of the file.
        page_count: pages of this guest.

    Raises:
        UsageError: it cannot be read, is something else, or is of a guest of another size.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"hints {path}: {error}", "name a file that `farfault record` wrote") from None
    if not lines or lines[0] != HEADER:
        raise UsageError(f"{path} is no working set", "name a file that `farfault record` wrote")
    runs = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split()
        if line.startswith("# pages ") and words[2] != str(page_count):
            raise UsageError(
                f"{path} is of a guest of {words[2]} pages, this one has {page_count}",
                "record a working set of this guest, or leave --hints out",
            )
        if not words or line.startswith("#"):
            continue
        if len(words) != 2 or not all(word.isdigit() for word in words):
            raise UsageError(f"{path}, line {number}: {line!r} is not `FIRST COUNT`")
        first, count = map(int, words)
        if count == 0 or first + count > page_count:
            raise UsageError(f"{path}, line {number}: pages {first}+{count} of {page_count}")
        runs.append(PageRun(PageIndex(first), count))
    return runs
