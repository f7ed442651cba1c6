"""The bulk process puts pages into memory that are in flight, and no others, whatever the guest gives back."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from farfault.digest import pages_digest
from farfault_client.bulk.messages import Target
from farfault_client.bulk.placer import CHUNK_BYTES, DIGEST_CHUNK_PAGES, Placer
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.engine import PageState, Priority
from farfault_client.engine.states import encode
from farfault_client.receive import digest
from farfault_client.session.answers import Placement
from farfault_shim.attach.wire import FaultSource, HandOver, HandOverRegion
from farfault_shim.install.installer import NoSpace
from farfault_shim.layout import PageIndex, PageRun
from farfault_shim.uffd import abi
from farfault_shim.uffd.userfaultfd import MappedBytes, Removed, Userfaultfd

PAGE = 4096
PAGES = 128
IN_FLIGHT = encode(PageState.IN_FLIGHT, Priority.BACKGROUND)
REMOVED = encode(PageState.REMOVED)
TIMEOUT_S = 20.0


def run(first: int, count: int = 1) -> PageRun:
    return PageRun(PageIndex(first), count)


def content(first: int, count: int) -> bytes:
    return b"".join(bytes([page % 255 + 1]) * PAGE for page in range(first, first + count))


@dataclass
class Memory:
    """Guest memory under a userfaultfd of ours, as a VMM would hand it over."""

    memory: mmap.mmap
    address: int
    uffd: Userfaultfd
    shared: SharedPages

    def placer(self, *, with_digest: bool = False) -> Placer:
        region = HandOverRegion(self.address, 0, PAGES * PAGE, 0, PAGE)
        handover = HandOver((region,), FaultSource.BLOCKING, ("uffd",))
        return Placer(Target(handover, with_digest), [os.dup(self.uffd.fileno())], self.shared)

    def in_flight(self, *runs: PageRun) -> None:
        for first, count in runs:
            self.shared.states[first : first + count] = bytes([IN_FLIGHT]) * count

    def page(self, page: int) -> bytes:
        return self.memory[page * PAGE : (page + 1) * PAGE]


@pytest.fixture
def guest() -> Iterator[Memory]:
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_SHARED)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    uffd = Userfaultfd.create(abi.FEATURE_EVENT_REMOVE)
    uffd.register(address, PAGES * PAGE)
    shared = SharedPages(PAGES)
    yield Memory(memory, address, uffd, shared)
    uffd.unregister(address, PAGES * PAGE)
    uffd.close()
    shared.close()
    del anchor


def test_only_pages_in_flight_are_placed(guest: Memory) -> None:
    guest.in_flight(run(2, 3), run(7))
    placements: list[Placement] = []
    guest.placer().place(run(0, 10), content(0, 10), 0, placements)
    assert placements == [Placement(run(2, 3), False, 0), Placement(run(7), False, 0)]
    for page in (2, 3, 4, 7):
        assert guest.page(page) == content(page, 1)


def test_what_is_there_already_is_told_and_left_alone(guest: Memory) -> None:
    guest.in_flight(run(0, 3))
    guest.uffd.copy(guest.address + PAGE, b"x" * PAGE, 0, PAGE)
    placements: list[Placement] = []
    guest.placer().place(run(0, 3), content(0, 3), 0, placements)
    assert sorted(placements) == [
        Placement(run(0), False, 0),
        Placement(run(1), True, 0),
        Placement(run(2), False, 0),
    ]
    assert guest.page(1) == b"x" * PAGE


def test_data_may_lie_anywhere_in_a_buffer(guest: Memory) -> None:
    count = CHUNK_BYTES // PAGE + 5  # more than one chunk
    guest.in_flight(run(10, count))
    buffer = MappedBytes.allocate((count + 3) * PAGE)
    buffer.view[77 : 77 + count * PAGE] = content(10, count)
    placements: list[Placement] = []
    guest.placer().place(run(10, count), buffer, 77, placements)
    assert sum(placement.run.count for placement in placements) == count
    assert all(guest.page(page) == content(page, 1) for page in range(10, 10 + count))


def test_digests_are_of_what_was_installed(guest: Memory) -> None:
    guest.in_flight(run(0, 4))
    guest.uffd.copy(guest.address + PAGE, b"x" * PAGE, 0, PAGE)
    placements: list[Placement] = []
    guest.placer(with_digest=True).place(run(0, 4), content(0, 4), 0, placements)
    assert dict((placement.run.first, placement.digest) for placement in placements) == {
        0: pages_digest(content(0, 1), 0, PAGE),
        1: 0,
        2: pages_digest(content(2, 2), 2, PAGE),
    }


def test_digests_are_cut_where_the_receiver_cuts_them() -> None:
    assert DIGEST_CHUNK_PAGES == digest.CHUNK_PAGES


def test_a_page_that_is_given_back_meanwhile_stays_empty(guest: Memory) -> None:
    """The kernel refuses while the removal is unread; once the receiver has read it, the states forbid it."""
    guest.in_flight(run(0, 8))
    madvise = ctypes.CDLL(None).madvise  # mmap's own holds the interpreter lock until the event is read
    where = (ctypes.c_void_p(guest.address + 2 * PAGE), ctypes.c_size_t(2 * PAGE))
    gives_back = threading.Thread(target=madvise, args=(*where, mmap.MADV_DONTNEED))
    gives_back.start()
    time.sleep(0.05)  # the removal waits in the kernel
    placer = guest.placer()
    reader, writer = os.pipe()
    child = os.fork()  # another process: the lock does not keep threads of one apart
    if child == 0:
        placements: list[Placement] = []
        placer.place(run(0, 8), content(0, 8), 0, placements)
        os.write(writer, repr([tuple(placement.run) for placement in placements]).encode())
        os._exit(0)
    os.close(writer)
    time.sleep(0.05)
    with guest.shared.first:
        events = guest.uffd.read_events()
        time.sleep(0.05)  # the placer would install into the gap now, if the lock did not hold it
        assert events == [Removed(guest.address + 2 * PAGE, guest.address + 4 * PAGE)]
        guest.shared.states[2:4] = bytes([REMOVED]) * 2
    gives_back.join(TIMEOUT_S)
    assert not gives_back.is_alive()
    assert os.read(reader, 1000).decode() == "[(0, 2), (4, 4)]"
    os.waitpid(child, 0)
    os.close(reader)
    assert guest.uffd.zeropage(guest.address + 2 * PAGE, 2 * PAGE).done_bytes == 2 * PAGE  # nothing was there
    assert guest.page(2) == guest.page(3) == bytes(PAGE)


def test_an_error_says_what_was_placed_before(guest: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.in_flight(run(0, 2), run(4, 2))
    placer = guest.placer()
    real = placer._installer.install
    calls: list[PageRun] = []

    def install(part: PageRun, data: bytes, offset: int) -> object:
        calls.append(part)
        if len(calls) == 2:
            from farfault_shim.install.installer import InstallResult

            raise NoSpace("no memory left on this host", InstallResult([run(4)], []))
        return real(part, data, offset)

    monkeypatch.setattr(placer._installer, "install", install)
    placements: list[Placement] = []
    with pytest.raises(NoSpace):
        placer.place(run(0, 6), content(0, 6), 0, placements)
    assert [placement.run for placement in placements] == [run(0, 2), run(4)]


def test_files_get_their_pages_too() -> None:
    descriptor = os.memfd_create("ram")
    os.ftruncate(descriptor, 8 * PAGE)
    shared = SharedPages(8)
    shared.states[1:3] = bytes([IN_FLIGHT]) * 2
    region = HandOverRegion(0, 0, 8 * PAGE, 0, PAGE)
    handover = HandOver((region,), FaultSource.SIMULATED, ("ram0",))
    placements: list[Placement] = []
    placer = Placer(Target(handover, with_digest=False), [os.dup(descriptor)], shared)
    placer.place(run(0, 8), content(0, 8), 0, placements)
    placer.close()
    assert [placement.run for placement in placements] == [run(1, 2)]
    assert os.pread(descriptor, 2 * PAGE, PAGE) == content(1, 2)
    os.close(descriptor)
    shared.close()
