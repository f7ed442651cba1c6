"""Userfaultfd on the real kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from farfault_shim.uffd import abi
from farfault_shim.uffd.userfaultfd import CopyResult, Fault, Removed, Userfaultfd, UserfaultfdUnavailableError
from uffd_memory import HUGE, PAGE, WAIT_S, Memory, huge_pages, libc, make_userfaultfd, memfd_memory, pattern, until

PAGES = 16


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    ours = make_userfaultfd()
    yield ours
    ours.close()


@pytest.fixture
def memory(uffd: Userfaultfd) -> Iterator[Memory]:
    with memfd_memory(PAGES * PAGE) as (_, ours):
        uffd.register(ours.address, ours.size_bytes)
        yield ours


def test_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    names = [name for name in vars(abi) if name.startswith(("UFFD", "USERFAULTFD_IOC"))]
    others = {
        **{name: f"UFFD_{name}" for name in vars(abi) if name.startswith(("FEATURE_", "EVENT_"))},
        "PAGEFAULT_FLAG_WRITE": "UFFD_PAGEFAULT_FLAG_WRITE",
    }
    structs = {
        "API": "uffdio_api",
        "REGISTER": "uffdio_register",
        "RANGE": "uffdio_range",
        "COPY": "uffdio_copy",
        "ZEROPAGE": "uffdio_zeropage",
        "MESSAGE": "uffd_msg",
        "MESSAGE_RANGE": "uffd_msg",
    }
    prints = [f'printf("{name} %llu\\n", (unsigned long long)({name}));' for name in names]
    prints += [f'printf("{ours} %llu\\n", (unsigned long long)({theirs}));' for ours, theirs in others.items()]
    prints += [f'printf("{ours} %zu\\n", sizeof(struct {theirs}));' for ours, theirs in structs.items()]
    # The kernel's headers of an older distribution lack newer names; a fallback would hide a mistake.
    missing = [
        name
        for name in (*names, *others.values())
        if subprocess.run(
            [compiler, "-E", "-include", "linux/userfaultfd.h", "-x", "c", "-"],
            input=f"#ifndef {name}\n#error missing\n#endif\n",
            text=True,
            capture_output=True,
        ).returncode
    ]
    hidden = {name: theirs for name, theirs in others.items() if theirs in missing} | {n: n for n in missing}
    prints = [line for line in prints if not any(f'"{name} ' in line for name in hidden)]
    source = tmp_path / "program.c"
    source.write_text(
        "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\n"
        f"int main(void) {{ {' '.join(prints)} return 0; }}\n"
    )
    subprocess.run([compiler, "-o", tmp_path / "program", source], check=True)
    output = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout
    header = {name: int(value) for name, value in (line.split() for line in output.splitlines())}
    ours = {name: getattr(abi, name) for name in header}
    ours |= {name: ours[name].size for name in structs}
    assert ours == header
    assert set(missing) <= {"USERFAULTFD_IOC_NEW", "UFFD_USER_MODE_ONLY", "UFFD_FEATURE_MINOR_SHMEM"}


def test_the_system_call_number_is_ours() -> None:
    assert platform.machine() in abi.SYS_USERFAULTFD


def test_a_descriptor_of_something_else_is_refused() -> None:
    reading, writing = os.pipe()
    with pytest.raises(ValueError, match="not a userfaultfd"):
        Userfaultfd(reading)
    os.close(reading)
    os.close(writing)


def test_an_unknown_feature_is_refused_with_a_remedy() -> None:
    make_userfaultfd().close()
    with pytest.raises(UserfaultfdUnavailableError) as caught:
        Userfaultfd.create(1 << 63)
    assert "0x8000000000000000" in caught.value.problem
    assert caught.value.remedy


def test_copy_installs_pages(uffd: Userfaultfd, memory: Memory) -> None:
    data = b"skipped!" + pattern(0, 3)
    assert uffd.copy(memory.address + PAGE, data, 8, 3 * PAGE) == CopyResult(3 * PAGE, 0)
    assert memory.map[PAGE : 4 * PAGE] == data[8:]


def test_copy_onto_a_page_that_exists_changes_nothing(uffd: Userfaultfd, memory: Memory) -> None:
    uffd.copy(memory.address, pattern(0, 1), 0, PAGE)
    assert uffd.copy(memory.address, pattern(7, 1), 0, PAGE) == CopyResult(0, errno.EEXIST)
    assert memory.map[:PAGE] == pattern(0, 1)


def test_copy_stops_before_a_page_that_exists(uffd: Userfaultfd, memory: Memory) -> None:
    uffd.copy(memory.address + 2 * PAGE, pattern(9, 1), 0, PAGE)
    result = uffd.copy(memory.address, pattern(0, 4), 0, 4 * PAGE)
    assert result.done_bytes == 2 * PAGE
    assert result.error in (errno.EAGAIN, errno.EEXIST)
    assert memory.map[: 3 * PAGE] == pattern(0, 2) + pattern(9, 1)


def test_zeropage(uffd: Userfaultfd, memory: Memory) -> None:
    assert uffd.zeropage(memory.address, 2 * PAGE) == CopyResult(2 * PAGE, 0)
    assert memory.map[: 2 * PAGE] == bytes(2 * PAGE)
    assert uffd.zeropage(memory.address, PAGE) == CopyResult(0, errno.EEXIST)


def test_a_fault_is_reported_and_the_copy_wakes_its_thread(uffd: Userfaultfd, memory: Memory) -> None:
    seen: list[bytes] = []
    thread_ids: list[int] = []

    def touch() -> None:
        thread_ids.append(threading.get_native_id())
        # A libc call without the GIL: a Python read would hold it while the thread sleeps in the fault.
        target = ctypes.create_string_buffer(8)
        libc.memcpy(target, ctypes.c_void_p(memory.address + 5 * PAGE + 3), ctypes.c_size_t(8))
        seen.append(target.raw)

    thread = threading.Thread(target=touch)
    thread.start()
    events: list[Fault | Removed] = []
    until(lambda: bool(events.extend(uffd.read_events()) or events))
    (event,) = events
    assert isinstance(event, Fault)
    assert event.address & -PAGE == memory.address + 5 * PAGE
    assert event.thread_id == thread_ids[0]
    assert not event.flags & abi.PAGEFAULT_FLAG_WRITE
    assert uffd.read_events() == []
    uffd.copy(memory.address + 5 * PAGE, pattern(5, 1), 0, PAGE)
    thread.join(WAIT_S)
    assert seen == [pattern(5, 1)[3:11]]


def test_a_removal_comes_first_and_holds_copies_back(uffd: Userfaultfd, memory: Memory) -> None:
    uffd.copy(memory.address, pattern(0, 4), 0, 4 * PAGE)
    remover = threading.Thread(
        target=lambda: libc.madvise(ctypes.c_void_p(memory.address), ctypes.c_size_t(2 * PAGE), mmap.MADV_REMOVE)
    )
    remover.start()
    # A copy fails with EAGAIN from the moment that the removal is queued until it is read.
    results: list[CopyResult] = []

    def copy_is_held_back() -> bool:
        results.append(uffd.copy(memory.address + 8 * PAGE, pattern(8, 1), 0, PAGE))
        return results[-1].error == errno.EAGAIN

    until(copy_is_held_back)
    assert results[-1] == CopyResult(0, errno.EAGAIN)
    assert uffd.read_events() == [Removed(memory.address, memory.address + 2 * PAGE)]
    remover.join(WAIT_S)
    assert not remover.is_alive()
    until(lambda: uffd.copy(memory.address + 9 * PAGE, pattern(9, 1), 0, PAGE).error == 0)
    assert uffd.zeropage(memory.address, 2 * PAGE).error == 0, "the removed pages are missing again"
    assert memory.map[2 * PAGE : 4 * PAGE] == pattern(2, 2)


def test_unregistered_memory_reads_as_zero(uffd: Userfaultfd, memory: Memory) -> None:
    uffd.unregister(memory.address, memory.size_bytes)
    assert memory.map[:PAGE] == bytes(PAGE)
    assert uffd.copy(memory.address + PAGE, pattern(1, 1), 0, PAGE).error == errno.ENOENT


def test_waking_nobody_is_harmless(uffd: Userfaultfd, memory: Memory) -> None:
    uffd.wake(memory.address, memory.size_bytes)


def test_a_dead_process(tmp_path: Path) -> None:
    make_userfaultfd().close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    program = (
        "import mmap, socket, sys, ctypes\n"
        "from farfault_shim.uffd.userfaultfd import Userfaultfd\n"
        "uffd = Userfaultfd.create()\n"
        "memory = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "uffd.register(address, 65536)\n"
        "peer = socket.socket(fileno=int(sys.argv[1]))\n"
        "socket.send_fds(peer, [address.to_bytes(8, 'little')], [uffd.fileno()])\n"
        "peer.recv(1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        ours.settimeout(WAIT_S)
        data, descriptors, _, _ = socket.recv_fds(ours, 8, 1)
        address = int.from_bytes(data, "little")
        uffd = Userfaultfd(descriptors[0])
        assert uffd.copy(address, pattern(0, 1), 0, PAGE) == CopyResult(PAGE, 0), "another process's memory"
        ours.close()
        child.wait(WAIT_S)
    assert uffd.copy(address + PAGE, pattern(0, 1), 0, PAGE) == CopyResult(0, errno.ESRCH)
    assert uffd.zeropage(address + PAGE, PAGE) == CopyResult(0, errno.ESRCH)
    uffd.close()


def test_huge_pages() -> None:
    uffd = make_userfaultfd(abi.FEATURE_MISSING_HUGETLBFS)
    with huge_pages(3), memfd_memory(3 * HUGE, os.MFD_HUGETLB) as (_, memory):
        uffd.register(memory.address, memory.size_bytes)
        data = pattern(0, 2, HUGE)
        assert uffd.copy(memory.address, data, 0, 2 * HUGE) == CopyResult(2 * HUGE, 0)
        assert uffd.copy(memory.address, data, 0, HUGE).error == errno.EEXIST
        assert uffd.copy(memory.address + 2 * HUGE, data, 0, PAGE).error == errno.EINVAL
        assert uffd.zeropage(memory.address + 2 * HUGE, HUGE).error == errno.EINVAL
        assert memory.map[: 2 * HUGE] == data
        uffd.unregister(memory.address, memory.size_bytes)
    uffd.close()


def test_close_twice() -> None:
    uffd = make_userfaultfd()
    uffd.close()
    uffd.close()
    assert uffd.fileno() == -1
