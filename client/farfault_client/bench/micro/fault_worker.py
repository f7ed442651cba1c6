"""A process whose threads miss pages, as a VMM's do, and measure how long they waited.

    python -m farfault_client.bench.micro.fault_worker OPTIONS

`OPTIONS` is a JSON object with the fields of `Options`. It prints one JSON object. The threads are the same code in C
whoever resolves their faults, but those of ``vcpu``: these ask for verdicts as vCPUs do, from Python.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import subprocess
import sys
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns, perf_counter, sleep
from typing import Final

from farfault_cli.errors import FarfaultError
from farfault_shim.attach.client import AttachClient, RamBlock, VcpuLink
from farfault_shim.attach.wire import AddressSource, FaultSource, Report, ReportKind, Slot, VerdictKind
from farfault_shim.kvm.abi import EXIT_MEMORY_FAULT
from farfault_shim.layout import FlatOffset, Gpa
from farfault_shim.uffd.userfaultfd import Userfaultfd

from farfault_client.bench.micro.ram_file import page
from farfault_client.bench.micro.settle import SETTLE_S

READY_TIMEOUT_S: Final = 30.0
SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Options:
    """What to do.

    Attributes:
        pager: ``c``, ``uffd`` (a farfault receiver, blocking userfaultfd) or ``vcpu`` (the same, by vCPU exits).
        programs: folder of the compiled C programs.
        ram: the RAM file that the C pager serves.
        attach: socket of the receiver.
        pages: size of the memory.
        each: pages that every thread visits.
        threads: how many.
        socket: of the C pager: ``unix`` or ``tcp``.
    """

    pager: str
    programs: str
    ram: str
    attach: str
    pages: int
    each: int
    threads: int
    socket: str


class Memory:
    """The memory whose pages are missed: a mapping, and a second one for KVM's part."""

    def __init__(self, pages: int) -> None:
        self.size_bytes = pages * 4096
        self.descriptor = os.memfd_create("farfault-bench", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.size_bytes)
        self._maps = [mmap.mmap(self.descriptor, self.size_bytes, flags=mmap.MAP_SHARED) for _ in range(2)]
        self.base, self.alias = (ctypes.addressof(ctypes.c_char.from_buffer(map_)) for map_ in self._maps)

    def block(self, *, with_alias: bool) -> RamBlock:
        """As an `AttachClient` takes it."""
        return RamBlock(self.descriptor, self.size_bytes, self.base, self.alias if with_alias else 0)


def measure(options: Options) -> dict[str, float]:
    """Percentiles of one fault, faults a second.

    Raises:
        FarfaultError: a page held something else than it must.
    """
    memory = Memory(options.pages)
    order = array("I", range(options.pages))
    random.Random(SEED).shuffle(order)
    order = order[: options.each * options.threads]
    if options.pager == "c":
        return _with_c_pager(options, memory, order)
    if options.pager == "uffd":
        client = AttachClient(Path(options.attach), [memory.block(with_alias=False)])
        _attach(client)
        return _touch(options, memory, order)
    return _ask(options, memory, order)


def _with_c_pager(options: Options, memory: Memory, order: array[int]) -> dict[str, float]:
    uffd = Userfaultfd.create()
    uffd.register(memory.base, memory.size_bytes)
    arguments = [uffd.fileno(), memory.base, options.ram, options.socket]
    os.set_inheritable(uffd.fileno(), True)
    command = [str(Path(options.programs) / "pager"), *map(str, arguments)]
    with subprocess.Popen(command, pass_fds=[uffd.fileno()], stdout=subprocess.PIPE) as pager:
        try:
            assert pager.stdout is not None
            if pager.stdout.readline() != b"ready\n":
                raise FarfaultError("the C pager did not start")
            return _touch(options, memory, order)
        finally:
            pager.kill()


def _touch(options: Options, memory: Memory, order: array[int]) -> dict[str, float]:
    """Threads in C load a word of each page."""
    library = ctypes.CDLL(str(Path(options.programs) / "toucher.so"))
    library.touch.restype = ctypes.c_long
    took_ns = (ctypes.c_uint64 * len(order))()
    pages = (ctypes.c_uint32 * len(order)).from_buffer(order)
    arguments = (ctypes.c_size_t(options.each), options.threads, took_ns)
    began_at = perf_counter()
    wrong = library.touch(ctypes.c_void_p(memory.base), pages, *arguments)
    elapsed_s = perf_counter() - began_at
    if wrong:
        raise FarfaultError(f"{wrong} pages of {len(order)} hold something else than they must")
    return _figures([value / 1e3 for value in took_ns], elapsed_s)


def _attach(client: AttachClient) -> None:
    client.start()
    client.wait_ready(READY_TIMEOUT_S)
    sleep(SETTLE_S)


def _ask(options: Options, memory: Memory, order: array[int]) -> dict[str, float]:
    """Threads in Python report exits and wait for verdicts; a page is looked at when all have ended."""
    slots = [Slot(0, 0, Gpa(0), memory.size_bytes, FlatOffset(0))]
    blocks = [memory.block(with_alias=True)]
    client = AttachClient(Path(options.attach), blocks, FaultSource.STOCK_NOWAIT, slots)
    _attach(client)
    took_us: list[list[float]] = [[] for _ in range(options.threads)]
    begin = threading.Barrier(options.threads + 1)

    def work(number: int) -> None:
        link = client.vcpu(number)
        mine = order[number * options.each : (number + 1) * options.each]
        begin.wait()
        for index in mine:
            began_at = perf_counter()
            _miss(link, number, index)
            took_us[number].append((perf_counter() - began_at) * 1e6)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(options.threads)]
    for thread in threads:
        thread.start()
    begin.wait()
    began_at = perf_counter()
    for thread in threads:
        thread.join()
    elapsed_s = perf_counter() - began_at
    if any(os.pread(memory.descriptor, 4096, index * 4096) != page(index) for index in order):
        raise FarfaultError("a page holds something else than it must")
    return _figures([value for values in took_us for value in values], elapsed_s)


def _miss(link: VcpuLink, vcpu: int, index: int) -> None:
    report = Report(
        ReportKind.EXIT,
        vcpu,
        seq=0,
        address_source=AddressSource.KVM_RUN,
        ret=-1,
        err=errno.EFAULT,
        exit_reason=EXIT_MEMORY_FAULT,
        gpa=index * 4096,
        size=4096,
        exit_ns=monotonic_ns(),
    )
    verdict = link.ask(report, lambda: False)
    if verdict is None or verdict.verdict is not VerdictKind.RETRY:
        raise FarfaultError(f"verdict {verdict} for page {index}")


def _figures(took_us: list[float], elapsed_s: float) -> dict[str, float]:
    took_us.sort()
    return {
        "p50_us": took_us[len(took_us) // 2],
        "p99_us": took_us[len(took_us) * 99 // 100],
        "mean_us": sum(took_us) / len(took_us),
        "faults_per_s": len(took_us) / elapsed_s,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Options(**json.loads(sys.argv[1])))), flush=True)
    os._exit(0)  # the receiver is not done with this memory, and need not be
