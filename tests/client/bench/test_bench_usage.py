"""CPU time and memory from /proc, of this very process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from farfault_client.bench.compare.usage import busy_cpu_s, cpu_s, memory, tree
from farfault_client.bench.machine import describe_machine


def test_a_process_and_its_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= set(tree(os.getpid()))
    finally:
        child.communicate(b"\n")


def test_cpu_time_grows_by_what_was_used() -> None:
    before, busy_before = cpu_s([os.getpid()]), busy_cpu_s()
    ours = os.times()
    while sum(os.times()[:2]) - sum(ours[:2]) < 0.3:
        sum(range(10_000))
    # The kernel counts in ticks, and leaves out what the hypervisor gave to others.
    assert cpu_s([os.getpid()]) - before >= 0.2
    assert busy_cpu_s() - busy_before >= 0.2


def test_memory_of_a_process() -> None:
    used = memory([os.getpid()])
    assert used.rss >= used.pss >= used.own > 1 << 20


def test_a_process_that_is_gone_counts_nothing() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert cpu_s([child.pid]) == 0
    assert memory([child.pid]) == (0, 0, 0)


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"].startswith(f"{os.cpu_count()} x")
    assert re.fullmatch(r"\d+\.\d GB/s \(again: \d+\.\d GB/s\)", machine["first use of memory"])
