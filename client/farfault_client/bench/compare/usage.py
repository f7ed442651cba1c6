"""CPU time and memory of processes and their children, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")
PROCESSES_MAX: Final = 256
# Positions after the command's name in /proc/PID/stat (proc(5)): utime, stime, cutime, cstime; guest_time.
_TIMES: Final = slice(11, 15)
_GUEST_TIME: Final = 40


class Memory(NamedTuple):
    """Resident memory in bytes.

    Attributes:
        rss: all that is mapped and there; what several processes share counts for each.
        pss: the same, shared pages divided by their users.
        own: `pss` without shared memory files, which is where a VM's RAM lies.
    """

    rss: int
    pss: int
    own: int


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants that live now."""
    waiting = [pid]
    for _ in range(PROCESSES_MAX):
        if not waiting:
            return
        current = waiting.pop()
        yield current
        try:
            for task in (_PROC / str(current) / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has just ended


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time of processes, their descendants and children that ended, without the time in which a guest ran.

    Kept by the kernel in ticks of 10 ms. A process that has ended and been waited for counts nothing.
    """
    total = 0.0
    for pid in pids:
        for member in tree(pid):
            fields = _stat(member)
            if fields:
                total += sum(map(int, fields[_TIMES])) - int(fields[_GUEST_TIME])
    return total * _TICK_S


def busy_cpu_s() -> float:
    """CPU time of the whole machine in which something ran, guests included."""
    fields = [int(value) for value in (_PROC / "stat").read_text().partition("\n")[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def guest_s(pids: Iterable[int]) -> float:
    """CPU time in which processes ran a guest."""
    return sum(int(fields[_GUEST_TIME]) for pid in pids if (fields := _stat(pid))) * _TICK_S


def memory(pids: Iterable[int]) -> Memory:
    """Of processes and their descendants."""
    rss = pss = own = 0
    for pid in pids:
        for member in tree(pid):
            values = _rollup(member)
            rss += values.get("Rss", 0)
            pss += values.get("Pss", 0)
            own += values.get("Pss", 0) - values.get("Pss_Shmem", 0)
    return Memory(rss, pss, own)


def _stat(pid: int) -> list[str]:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def _rollup(pid: int) -> dict[str, int]:
    """Field names and bytes of /proc/PID/smaps_rollup; empty for a process that has ended."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
