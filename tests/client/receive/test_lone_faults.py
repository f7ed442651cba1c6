"""First hand at a fault: its messages against the general codec, its events and pages against the kernel."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from farfault.checksum import batch_checksum
from farfault.codec import encode_batch
from farfault.v1 import pages_pb2 as pb
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.engine.states import PageState, Priority, encode
from farfault_client.receive import lone_faults
from farfault_client.receive.lone_faults import LoneFaults, Taken
from farfault_client.session.answers import LonePage
from farfault_client.session.frames import frame
from farfault_shim.attach.wire import FaultSource, HandOver, HandOverRegion
from farfault_shim.layout import Layout
from farfault_shim.uffd import abi
from farfault_shim.uffd.userfaultfd import Fault, Removed, Userfaultfd
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4096
GENERATION = 9
LAYOUT = Layout([(128 * PAGE, PAGE), (100_000 * PAGE, PAGE), (4 << 20, 2 << 20)])
SECOND = 128
"""The first page of the second region."""
DATA = bytes(range(256)) * (PAGE // 256)
IDS = st.integers(1, (1 << 64) - 1)
PAGES = st.integers(0, SECOND + 100_000 - 1)
GENERATIONS = st.integers(0, (1 << 64) - 1)
IN_FLIGHT = encode(PageState.IN_FLIGHT, Priority.VCPU)


pytestmark = pytest.mark.skipif(lone_faults._library() is None, reason="make native, with libxxhash-dev")


def first_hand(shared: SharedPages | None = None) -> LoneFaults:
    lone = LoneFaults.of(LAYOUT, shared=shared)
    assert lone is not None, "make native"
    return lone


def place(page: int) -> tuple[int, int]:
    region = LAYOUT.region_of_page(page)
    return region.index, page - region.first_page


def answer(
    request_id: int, page: int, generation: int = GENERATION, data: bytes = DATA, queue_us: int = 0, read_us: int = 0
) -> bytes:
    """The frame that a server sends for it, made by the general codec."""
    extents = ((*place(page), 1, pb.EXTENT_KIND_DATA),)
    checksum = batch_checksum((request_id,), extents, generation, (data,))
    return frame(
        encode_batch(
            (request_id,), extents, checksum, data, generation, server_queue_us=queue_us, server_read_us=read_us
        )
    )


# ---- messages -------------------------------------------------------------------------------------------


@given(IDS, PAGES, st.sampled_from(sorted(pb.Priority.values())[1:]), GENERATIONS)
def test_a_request_is_what_the_generated_class_writes(request_id: int, page: int, priority: int, gen: int) -> None:
    region, number = place(page)
    wanted = pb.PageRange(region=region, first_page=number, page_count=1)
    generated = pb.FetchRequest(request_id=request_id, priority=priority, ranges=[wanted]).SerializeToString()
    assert first_hand().request(page, request_id, priority, gen) == frame(generated)


@given(IDS, PAGES, GENERATIONS, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_the_answer_of_the_general_codec_is_known_again(
    request_id: int, page: int, gen: int, queue_us: int, read_us: int
) -> None:
    lone = first_hand()
    lone.request(page, request_id, 1, gen)
    before = b"whatever precedes it"
    raw = before + answer(request_id, page, gen, queue_us=queue_us, read_us=read_us)
    came = lone.came(raw + b"and follows", len(before))
    assert came is not None
    assert came == LonePage(request_id, page, len(raw), came.data_at, queue_us, read_us)
    assert raw[came.data_at : came.data_at + PAGE] == DATA
    assert lone.came(raw, len(before)) is None, "it comes once"


@given(st.data())
def test_a_flipped_bit_never_passes_for_the_page(data: st.DataObject) -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    raw = bytearray(answer(300, 70_000, queue_us=5, read_us=300))
    covered = len(answer(300, 70_000))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    came = lone.came(bytes(raw), 0)
    assert came is None or position >= covered, "only the times are not covered"


@given(st.integers(0, 4300))
def test_an_answer_that_is_not_all_here_is_waited_for(length: int) -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    raw = answer(300, 70_000, queue_us=5, read_us=300)
    assert lone.came(raw[: min(length, len(raw) - 1)], 0) is None
    assert lone.came(raw, 0) is not None


@given(st.binary(max_size=5000))
def test_garbage_is_something_else(raw: bytes) -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    assert lone.came(raw, 0) is None


@given(st.binary(min_size=1, max_size=40))
def test_a_lengthened_answer_is_something_else(more: bytes) -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    message = answer(300, 70_000, queue_us=5, read_us=300)[4:] + more
    assert lone.came(frame(message), 0) is None


@pytest.mark.parametrize(
    "other",
    [
        answer(301, 70_000),
        answer(300, 70_001),
        answer(300, 3),
        answer(300, 70_000, 8),
        answer(300, 70_000, 0),
        answer(300, 70_000, data=DATA[:2048]),
        answer(300, 70_000, data=DATA * 2),
    ],
)
def test_an_answer_to_another_request_is_something_else(other: bytes) -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    assert lone.came(other, 0) is None


def test_zero_refused_and_shared_answers_are_something_else() -> None:
    lone = first_hand()
    for request_id in (300, 301):
        lone.request(70_000 + request_id, request_id, 1, GENERATION)
    for kind in (pb.EXTENT_KIND_ZERO, pb.EXTENT_KIND_NOT_FROZEN):
        extents = ((*place(70_300), 1, kind),)
        checksum = batch_checksum((300,), extents, GENERATION, ())
        assert lone.came(frame(encode_batch((300,), extents, checksum, b"", GENERATION)), 0) is None
    both = ((*place(70_300), 2, 0),)
    checksum = batch_checksum((300, 301), both, GENERATION, (DATA, DATA))
    assert lone.came(frame(encode_batch((300, 301), both, checksum, (DATA, DATA), GENERATION)), 0) is None


def test_a_page_without_a_checksum_is_something_else() -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    extents = ((*place(70_000), 1, 0),)
    assert lone.came(frame(encode_batch((300,), extents, 0, DATA, GENERATION)), 0) is None


def test_nothing_is_expected_any_more_once_it_is_forgotten() -> None:
    lone = first_hand()
    lone.request(70_000, 300, 1, GENERATION)
    lone.forget()
    assert lone.came(answer(300, 70_000), 0) is None


def test_the_oldest_request_gives_way_in_the_table() -> None:
    lone = first_hand()
    for request_id in range(1, 1026):
        lone.request(SECOND + request_id, request_id, 1, GENERATION)
    assert lone.came(answer(1, SECOND + 1), 0) is None
    assert lone.came(answer(2, SECOND + 2), 0) is not None
    assert lone.came(answer(1025, SECOND + 1025), 0) is not None


def test_large_pages_go_the_general_way() -> None:
    assert first_hand().request(SECOND + 100_000, 300, 1, GENERATION) is None


def test_a_page_outside_of_memory_goes_the_general_way() -> None:
    assert first_hand().request(LAYOUT.page_count, 300, 1, GENERATION) is None


def test_only_a_page_that_nobody_has_asked_for_is_requested_and_only_one_in_flight_is_taken() -> None:
    shared = SharedPages(LAYOUT.page_count)
    try:
        lone = first_hand(shared)
        for state in list(PageState)[1:]:
            shared.states[3] = encode(state, Priority.VCPU)
            assert lone.request(3, 300, 1, GENERATION) is None
        shared.states[3] = encode(PageState.ABSENT)
        assert lone.request(3, 300, 1, GENERATION) is not None
        for state in PageState:
            if state is not PageState.IN_FLIGHT:
                shared.states[3] = encode(state, Priority.VCPU)
                assert lone.came(answer(300, 3), 0) is None
        shared.states[3] = IN_FLIGHT
        assert lone.came(answer(300, 3), 0) is not None
    finally:
        shared.close()


def test_without_the_library_there_is_no_first_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lone_faults, "_library", lambda: None)
    assert LoneFaults.of(LAYOUT) is None


# ---- events and memory ----------------------------------------------------------------------------------


@dataclass
class Memory:
    """Memory under a userfaultfd, and whose threads miss its pages."""

    pages: int = SECOND
    map_: mmap.mmap = field(init=False)
    uffd: Userfaultfd = field(init=False)
    lone: LoneFaults = field(init=False)
    shared: SharedPages = field(init=False)
    threads: list[threading.Thread] = field(default_factory=list)
    seen: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size_bytes = self.pages * PAGE
        self.map_ = mmap.mmap(-1, size_bytes, flags=mmap.MAP_SHARED)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map_))
        self.uffd = Userfaultfd.create(abi.FEATURE_EVENT_REMOVE | abi.FEATURE_THREAD_ID)
        self.uffd.register(self.address, size_bytes)
        region = HandOverRegion(self.address, 0, size_bytes, 0, PAGE)
        handover = HandOver((region,), FaultSource.BLOCKING, ("uffd",))
        self.shared = SharedPages(self.pages)
        lone = LoneFaults.of(handover.layout(), handover, self.uffd, None, self.shared)
        assert lone is not None
        self.lone = lone

    def miss(self, page: int) -> int:
        """A thread reads a page. Returns its id once it is about to."""
        began, ids = threading.Event(), []

        def read() -> None:
            word = ctypes.create_string_buffer(8)
            ids.append(threading.get_native_id())
            began.set()
            _libc.memcpy(word, ctypes.c_void_p(self.address + page * PAGE), 8)
            self.seen[page] = word.raw

        self.threads.append(threading.Thread(target=read))
        self.threads[-1].start()
        began.wait()
        return ids[0]

    def give_back(self, page: int, count: int) -> None:
        """A thread gives pages back; it waits until the event was read."""
        arguments = (ctypes.c_void_p(self.address + page * PAGE), ctypes.c_size_t(count * PAGE), mmap.MADV_REMOVE)
        self.threads.append(threading.Thread(target=_libc.madvise, args=arguments))
        self.threads[-1].start()

    def take(self, first_id: int, *, until: Callable[[list[Taken]], bool], may_request: bool = True) -> list[Taken]:
        """Takes events until there are enough, as the event loop does; requested pages are in flight then."""
        deadline, all_taken = time.monotonic() + 10, []
        while not until(all_taken):
            assert time.monotonic() < deadline, all_taken
            taken = self.lone.take(first_id, GENERATION, may_request=may_request)
            for page, _ in taken.faults:
                self.shared.states[page] = IN_FLIGHT
            first_id += len(taken.faults)
            if taken.faults or taken.events:
                all_taken.append(taken)
        return all_taken

    def end(self) -> None:
        self.uffd.unregister(self.address, self.pages * PAGE)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.uffd.close()
        self.shared.close()


_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t]
_libc.mmap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.end()


def faults(all_taken: list[Taken]) -> list[tuple[int, int]]:
    return [fault for taken in all_taken for fault in taken.faults]


def requests(frames: bytes) -> list[pb.FetchRequest]:
    found = []
    while frames:
        end = 4 + int.from_bytes(frames[:4], "little")
        found.append(pb.FetchRequest.FromString(frames[4:end]))
        frames = frames[end:]
    return found


def test_a_missed_page_is_requested_and_what_comes_is_in_memory(memory: Memory) -> None:
    thread_id = memory.miss(5)
    (taken,) = memory.take(40, until=lambda all_taken: bool(faults(all_taken)))
    assert taken.faults == [(5, thread_id)]
    assert taken.events == []
    (request,) = requests(taken.frames)
    assert (request.request_id, request.priority) == (40, pb.PRIORITY_VMM), "no vCPU is known yet"
    assert [(wanted.region, wanted.first_page, wanted.page_count) for wanted in request.ranges] == [(0, 5, 1)]
    came = memory.lone.came(answer(40, 5), 0)
    assert came is not None
    memory.threads[0].join(10)
    assert memory.seen == {5: DATA[:8]}


def test_pages_that_vcpus_miss_are_the_most_urgent(memory: Memory) -> None:
    memory.lone.know_vcpus([1, threading.get_native_id()])
    memory.miss(5)
    (taken,) = memory.take(1, until=lambda all_taken: bool(faults(all_taken)))
    assert requests(taken.frames)[0].priority == pb.PRIORITY_VMM
    begin = threading.Event()
    word = ctypes.create_string_buffer(8)

    def read() -> None:
        begin.wait()
        _libc.memcpy(word, ctypes.c_void_p(memory.address + 6 * PAGE), 8)

    memory.threads.append(threading.Thread(target=read))
    memory.threads[-1].start()
    vcpu = memory.threads[-1].native_id
    assert vcpu is not None
    memory.lone.know_vcpus([7, vcpu])
    begin.set()
    (taken,) = memory.take(2, until=lambda all_taken: bool(faults(all_taken)))
    assert taken.faults == [(6, vcpu)]
    assert requests(taken.frames)[0].priority == pb.PRIORITY_VCPU


def test_many_threads_miss_pages_at_once(memory: Memory) -> None:
    for page in range(0, 100, 2):
        memory.miss(page)
    all_taken = memory.take(1, until=lambda all_taken: len(faults(all_taken)) == 50)
    pages = [page for page, _ in faults(all_taken)]
    asked = [request for taken in all_taken for request in requests(taken.frames)]
    assert sorted(pages) == list(range(0, 100, 2))
    assert [request.request_id for request in asked] == list(range(1, 51))
    assert [request.ranges[0].first_page for request in asked] == pages
    stream, position = b"".join(answer(number, page) for number, page in enumerate(pages, 1)), 0
    for number in range(1, 51):
        came = memory.lone.came(stream, position)
        assert came is not None
        assert came.request_id == number
        position = came.end
    assert position == len(stream)


def test_two_threads_that_miss_one_page_are_one_request(memory: Memory) -> None:
    for _ in range(2):
        memory.miss(5)
    time.sleep(0.05)

    def enough(all_taken: list[Taken]) -> bool:
        return len(faults(all_taken)) + sum(len(taken.events) for taken in all_taken) == 2

    all_taken = memory.take(1, until=enough)
    assert [page for page, _ in faults(all_taken)] == [5]
    (other,) = [event for taken in all_taken for event in taken.events]
    assert isinstance(other, Fault), "the general way waits for the page that is on its way"
    assert other.address == memory.address + 5 * PAGE


def test_faults_on_pages_that_are_no_longer_absent_are_the_general_ways(memory: Memory) -> None:
    memory.shared.states[5] = IN_FLIGHT
    memory.miss(5)
    (taken,) = memory.take(1, until=bool)
    assert taken.faults == []
    assert isinstance(taken.events[0], Fault)


def test_nothing_is_requested_that_may_not_be(memory: Memory) -> None:
    memory.miss(5)
    (taken,) = memory.take(1, until=bool, may_request=False)
    assert (taken.faults, taken.frames) == ([], b"")
    assert [type(event) for event in taken.events] == [Fault]


def test_no_events_are_no_error(memory: Memory) -> None:
    assert memory.lone.take(1, GENERATION, may_request=True) == Taken(b"", [], [])


def is_locked(shared: SharedPages) -> bool:
    """As another process finds the lock."""
    code = """if True:
        import fcntl, sys
        try:
            fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(7)
    """
    number = shared.fileno()
    return subprocess.run([sys.executable, "-c", code, str(number)], pass_fds=[number], check=False).returncode == 7


def test_a_removal_keeps_the_lock_until_it_is_marked(memory: Memory) -> None:
    memory.give_back(8, 3)
    (taken,) = memory.take(1, until=bool)
    assert taken.events == [Removed(memory.address + 8 * PAGE, memory.address + 11 * PAGE)]
    assert is_locked(memory.shared)
    memory.lone.leave()
    assert not is_locked(memory.shared)
    memory.lone.leave()
    fcntl.lockf(memory.shared.fileno(), fcntl.LOCK_UN)


def test_an_event_that_says_nothing_of_pages_keeps_the_lock_as_well() -> None:
    """A mapping that moves: there is nothing to mark, and the receiver lets go all the same."""
    here, there = (_libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0) for _ in "ab")
    uffd, shared = Userfaultfd.create(abi.FEATURE_EVENT_REMAP), SharedPages(1)
    uffd.register(here, PAGE)
    handover = HandOver((HandOverRegion(here, 0, PAGE, 0, PAGE),), FaultSource.BLOCKING, ("uffd",))
    lone = LoneFaults.of(handover.layout(), handover, uffd, None, shared)
    assert lone is not None
    moving = threading.Thread(target=_libc.mremap, args=(here, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there))
    moving.start()
    deadline = time.monotonic() + 10
    while not lone._kept.value:
        assert time.monotonic() < deadline
        assert lone.take(1, GENERATION, may_request=True) == Taken(b"", [], [])
    assert is_locked(shared)
    lone.leave()
    assert not is_locked(shared)
    moving.join(10)
    uffd.close()
    shared.close()


def test_faults_that_come_with_a_removal_are_the_general_ways(memory: Memory) -> None:
    memory.miss(9)
    memory.give_back(8, 3)
    time.sleep(0.1)
    all_taken = memory.take(1, until=lambda all_taken: any(taken.events for taken in all_taken))
    memory.lone.leave()
    with_removal = [taken for taken in all_taken if any(isinstance(event, Removed) for event in taken.events)]
    assert all(taken.faults == [] for taken in with_removal)


def test_a_page_that_is_there_already_is_the_general_ways(memory: Memory) -> None:
    assert memory.lone.request(5, 1, 1, GENERATION) is not None
    memory.shared.states[5] = IN_FLIGHT
    memory.uffd.copy(memory.address + 5 * PAGE, bytes([7]) * PAGE, 0, PAGE)
    assert memory.lone.came(answer(1, 5), 0) is None
    assert memory.map_[5 * PAGE] == 7, "what is there stays"


def test_a_descriptor_that_cannot_be_read_is_an_error() -> None:
    memory = Memory()
    memory.end()
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.lone.take(1, GENERATION, may_request=True)
