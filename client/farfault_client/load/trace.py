"""Recorded traces: who touched which page when.

One access a line, in order of time: ``seconds vcpu page``, and optionally ``r`` or ``w``; or a JSON object with
``seconds``, ``vcpu``, ``page`` and optionally ``write``. Empty lines and lines that begin with ``#`` are skipped.
``page`` counts through all regions.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from pathlib import Path

from farfault_cli.errors import UsageError

ACCESSES_MAX = 20_000_000
"""Accesses of one trace; each takes 17 bytes of memory."""
VCPU_MAX = (1 << 32) - 1
KINDS = {"r": 0, "w": 1}


class Trace:
    """Accesses in order of time; arrays of equal length.

    Attributes:
        seconds: since the first access.
        vcpus: who.
        pages: which page.
        writes: 1 for a write.
    """

    def __init__(self) -> None:
        self.seconds = array("d")
        self.vcpus = array("L")
        self.pages = array("Q")
        self.writes = array("B")

    def __len__(self) -> int:
        return len(self.pages)

    def append(self, seconds: float, vcpu: int, page: int, write: int) -> None:
        """Adds one access. Raises ValueError where time runs backwards or a number is out of range."""
        if not 0 <= vcpu <= VCPU_MAX or not 0 <= page < 1 << 64:
            raise ValueError(f"vcpu {vcpu} or page {page} is out of range")
        if not 0 <= seconds < float("inf") or (self.seconds and seconds < self.seconds[-1]):
            raise ValueError(f"time {seconds} comes after a later one; sort the trace by time")
        self.seconds.append(seconds)
        self.vcpus.append(vcpu)
        self.pages.append(page)
        self.writes.append(write)

    def share(self, index: int, count: int) -> Trace:
        """The accesses of the vCPUs whose number is `index` modulo `count`, at their own times."""
        if count == 1:
            return self
        part = Trace()
        for seconds, vcpu, page, write in zip(self.seconds, self.vcpus, self.pages, self.writes, strict=True):
            if vcpu % count == index:
                part.append(seconds, vcpu, page, write)
        return part


def read_trace(path: Path) -> Trace:
    """Reads a trace file; its times are shifted so that the first is 0.

    Raises:
        UsageError: with file, line and what is wrong.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return parse_trace(lines, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"trace {path}: {error}", "name a readable text file") from None


def parse_trace(lines: Iterable[str], name: str) -> Trace:
    """Reads a trace from lines; see `read_trace`."""
    trace = Trace()
    origin: float | None = None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            seconds, vcpu, page, write = _from_json(text) if text.startswith("{") else _from_columns(text)
            origin = seconds if origin is None else origin
            trace.append(seconds - origin, vcpu, page, write)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"trace {name}, line {number}: {error}",
                "a line is `seconds vcpu page [r|w]` or a JSON object with these names",
            ) from None
        if len(trace) > ACCESSES_MAX:
            raise UsageError(f"trace {name} has more than {ACCESSES_MAX:,} accesses", "split it")
    if not trace:
        raise UsageError(f"trace {name} holds no access", "a line is `seconds vcpu page [r|w]`")
    return trace


def _from_columns(text: str) -> tuple[float, int, int, int]:
    columns = text.split()
    if len(columns) not in {3, 4}:
        raise ValueError(f"{len(columns)} columns")
    kind = columns[3] if len(columns) == 4 else "r"
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is neither r nor w")
    return float(columns[0]), int(columns[1]), int(columns[2], 0), KINDS[kind]


def _from_json(text: str) -> tuple[float, int, int, int]:
    values = json.loads(text)
    return float(values["seconds"]), int(values["vcpu"]), int(values["page"]), int(bool(values.get("write", False)))
