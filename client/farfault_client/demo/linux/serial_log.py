"""What the guest says on its serial console: ticks of the worker, reads of the disk. No I/O.

A move cuts the console in two, at any byte: one line may begin in the source's log and end in the destination's.
So join the two (source + destination) before `parse_serial`: the ticks of a guest that lost nothing are gapless.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    rb"^(?:T (?P<tick>\d+) (?P<hash>[0-9a-f]{16}) bad=(?P<bad>\d+)|D \d+ (?P<verdict>ok|BAD))\r*$",
    re.MULTILINE,
)
_PANIC = re.compile(rb"Kernel panic[^\r\n]*")


@dataclass(frozen=True)
class Tick:
    """One tick of the memory worker.

    Attributes:
        number: from 1.
        hash: of every word that it has read so far.
        bad: words that it has found wrong so far.
    """

    number: int
    hash: int
    bad: int


@dataclass(frozen=True)
class SerialLog:
    """All complete lines of interest, in order.

    Attributes:
        ticks: of the memory worker.
        disk_reads_ok, disk_reads_bad: reads of the disk whose contents were right, wrong.
        panic: the kernel's last words; empty while it lives.
    """

    ticks: tuple[Tick, ...] = ()
    disk_reads_ok: int = 0
    disk_reads_bad: int = 0
    panic: str = ""

    @property
    def last_tick(self) -> int:
        """Number of the last tick, 0 before the first."""
        return self.ticks[-1].number if self.ticks else 0

    @property
    def problems(self) -> list[str]:
        """What the guest itself found wrong; the hash of the last tick must be compared on top of this."""
        found = [f"the guest's kernel died: {self.panic}"] if self.panic else []
        for place, tick in enumerate(self.ticks, start=1):
            if tick.number != place:
                found.append(f"tick {tick.number} where {place} was due: ticks are lost, twice there, or start again")
                break
        if self.ticks and self.ticks[-1].bad:
            found.append(f"{self.ticks[-1].bad} words of memory were found wrong")
        if self.disk_reads_bad:
            found.append(f"{self.disk_reads_bad} reads of the disk were wrong")
        return found


def parse_serial(data: bytes) -> SerialLog:
    """Reads the console's bytes; a last line that is not complete yet is left out, others are ignored."""
    complete = data[: data.rfind(b"\n") + 1]
    ticks = []
    reads = {b"ok": 0, b"BAD": 0}
    for line in _LINE.finditer(complete):
        if line["tick"]:
            ticks.append(Tick(int(line["tick"]), int(line["hash"], 16), int(line["bad"])))
        else:
            reads[line["verdict"]] += 1
    panic = _PANIC.search(complete)
    return SerialLog(tuple(ticks), reads[b"ok"], reads[b"BAD"], panic[0].decode(errors="replace") if panic else "")
