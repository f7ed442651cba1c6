"""A process that installs pages as the receiver does, into memory of its own that nobody waits for.

    python -m farfault_client.bench.micro.install_worker RUN_PAGES PAGES

It prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from time import perf_counter

from farfault_shim.attach.wire import FaultSource, HandOver, HandOverRegion
from farfault_shim.install.installer import UffdInstaller
from farfault_shim.layout import PageIndex, PageRun
from farfault_shim.uffd.userfaultfd import Userfaultfd


def install(run_pages: int, pages: int) -> dict[str, float]:
    """Microseconds of one installation."""
    size_bytes = pages * 4096
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_SHARED)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    uffd = Userfaultfd.create()
    uffd.register(address, size_bytes)
    handover = HandOver((HandOverRegion(address, 0, size_bytes, 0, 4096),), FaultSource.BLOCKING, ("uffd",))
    installer = UffdInstaller(handover.layout(), handover, uffd, None)
    data = b"\x07" * (run_pages * 4096)
    runs = [PageRun(PageIndex(first), run_pages) for first in range(0, pages - run_pages + 1, run_pages)]
    began_at = perf_counter()
    for run in runs:
        installer.install(run, data, 0)
    return {"us_per_call": (perf_counter() - began_at) * 1e6 / len(runs)}


if __name__ == "__main__":
    print(json.dumps(install(int(sys.argv[1]), int(sys.argv[2]))))
