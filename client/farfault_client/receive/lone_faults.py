"""First hand at a fault, in C (`client/native/lone_faults.c`): most requests are sent, and most pages put into memory,
before any of the bookkeeping. The pager tells the engine at once, in the same turn of the event loop."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from farfault.native import load
from farfault_shim.attach.wire import HandOver
from farfault_shim.layout import Layout, PageIndex
from farfault_shim.uffd.userfaultfd import Fault, Removed, Userfaultfd, parse_events

from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.engine.engine import LONE_AT_ONCE_MAX
from farfault_client.engine.states import ABSENT_BYTE, STATE_SHIFT, PageState, Priority
from farfault_client.session.answers import LonePage

LIBRARY: Final = Path(__file__).parent.parent / "_native" / "libfarfault_lone_faults.so"
_FRAME_BYTES_MAX: Final = 64
_EVENTS_BYTES: Final = 1024 * 32
_CONFIG: Final = struct.Struct("<QQqqqQQQQQ")
_REGION: Final = struct.Struct("<5Q")
_TAKEN: Final = struct.Struct("<4Q")
_FAULTS_AT: Final = _TAKEN.size
_FRAMES_AT: Final = _FAULTS_AT + LONE_AT_ONCE_MAX * 16
_EVENTS_AT: Final = _FRAMES_AT + LONE_AT_ONCE_MAX * _FRAME_BYTES_MAX
_FAULT: Final = struct.Struct("<QQ")
_CAME: Final = struct.Struct("<6Q")


class Taken(NamedTuple):
    """Events that were read.

    Attributes:
        frames: requests to send, for the pages of `faults`.
        faults: page and thread of each, in the order of the requests' ids.
        events: what is left for the general way.
    """

    frames: bytes
    faults: list[tuple[PageIndex, int]]
    events: list[Fault | Removed]


@cache
def _library() -> ctypes.PyDLL | None:
    library = load(LIBRARY)
    if library is None:
        return None
    pointer, number, integer = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
    library.farfault_lone_new.restype = pointer
    library.farfault_lone_new.argtypes = [pointer, pointer, number]
    library.farfault_lone_free.argtypes = [pointer]
    library.farfault_lone_threads.argtypes = [pointer, pointer, number]
    library.farfault_lone_forget.argtypes = [pointer]
    library.farfault_lone_leave.argtypes = [pointer]
    library.farfault_lone_request.argtypes = [pointer, number, number, number, number, pointer]
    library.farfault_lone_request.restype = number
    library.farfault_lone_take.argtypes = [pointer, number, number, integer, pointer, pointer]
    library.farfault_lone_came.argtypes = [pointer, ctypes.c_char_p, number, number, pointer]
    return library


class LoneFaults:
    """What is done at first hand; make one with `of`.

    Args:
        library: that of `LIBRARY`.
        config, regions: as its structures.
        shared: the state of every page, which it looks at; None: nobody keeps any.
    """

    def __init__(
        self, library: ctypes.PyDLL, config: bytes, regions: Sequence[bytes], shared: SharedPages | None
    ) -> None:
        self._library = library
        self._shared = shared  # its memory is looked at
        self._handle = library.farfault_lone_new(config, b"".join(regions), len(regions))
        if not self._handle:
            raise MemoryError("no memory for a table of requests")
        self._taken = ctypes.create_string_buffer(_EVENTS_AT + _EVENTS_BYTES)
        self._taken_view = memoryview(self._taken).cast("B")
        self._kept = ctypes.c_int()
        self._came = ctypes.create_string_buffer(_CAME.size)
        self._frame = ctypes.create_string_buffer(_FRAME_BYTES_MAX)
        # Bound once, with what never changes: a fault calls two of them.
        self._take, self._take_into = library.farfault_lone_take, (self._taken, ctypes.byref(self._kept))
        self._find, self._request = library.farfault_lone_came, library.farfault_lone_request

    def __del__(self) -> None:
        if self._handle:
            self._library.farfault_lone_free(self._handle)

    @classmethod
    def of(
        cls,
        layout: Layout,
        handover: HandOver | None = None,
        uffd: Userfaultfd | None = None,
        alias_uffd: Userfaultfd | None = None,
        shared: SharedPages | None = None,
    ) -> Self | None:
        """None: the library is not there.

        Args:
            layout: guest memory.
            handover: the VMM's addresses; None: pages are put nowhere.
            uffd: its blocking userfaultfd, whose events `take` reads.
            alias_uffd: that of the alias mappings, through which pages are put then.
            shared: the state of every page.
        """
        library = _library()
        if library is None:
            return None
        regions = []
        for region in layout.regions:
            base = install = 0
            if handover is not None:
                theirs = handover.regions[region.index]
                base, install = theirs.base_hva, theirs.alias_hva if alias_uffd is not None else theirs.base_hva
            page_bytes = region.page_size_bytes
            regions.append(_REGION.pack(base, install, region.first_page, region.size_bytes // page_bytes, page_bytes))
        into = alias_uffd or uffd
        config = _CONFIG.pack(
            shared.address if shared is not None else 0,
            layout.page_count,
            uffd.fileno() if uffd is not None else -1,
            into.fileno() if into is not None else -1,
            shared.fileno() if shared is not None else -1,
            ABSENT_BYTE,
            PageState.IN_FLIGHT,
            STATE_SHIFT,
            Priority.VCPU,
            Priority.VMM,
        )
        return cls(library, config, regions, shared)

    def know_vcpus(self, threads: Iterable[int]) -> None:
        """The threads that are vCPUs: the pages that they miss are the most urgent."""
        numbers = list(threads)
        self._library.farfault_lone_threads(self._handle, struct.pack(f"<{len(numbers)}I", *numbers), len(numbers))

    def forget(self) -> None:
        """No answer is expected any more."""
        self._library.farfault_lone_forget(self._handle)

    def take(self, first_id: int, generation: int, *, may_request: bool) -> Taken:
        """Reads the events of the userfaultfd, and makes requests for faults on pages that nobody has asked for.

        Where there are removals among the events, the lock of the shared pages is held until `leave`.

        Args:
            first_id: of the requests, which are numbered from there on.
            generation: of the memory.
            may_request: make any.

        Raises:
            OSError: the events cannot be read.
        """
        taken = self._taken
        error = self._take(self._handle, first_id, generation, may_request, *self._take_into)
        if error:
            raise OSError(error, os.strerror(error))
        count, frame_bytes, rest_at, event_bytes = _TAKEN.unpack_from(taken)
        view = self._taken_view
        faults = [_FAULT.unpack_from(taken, _FAULTS_AT + 16 * index) for index in range(count)]
        frames = bytes(view[_FRAMES_AT : _FRAMES_AT + frame_bytes]) if count else b""
        events: list[Fault | Removed] = []
        if rest_at != event_bytes:
            events = parse_events(view[_EVENTS_AT + rest_at : _EVENTS_AT + event_bytes])
        return Taken(frames, faults, events)

    def leave(self) -> None:
        """What was removed is marked: lets go of the lock, if `take` kept it."""
        if self._kept.value:
            self._kept.value = 0
            self._library.farfault_lone_leave(self._handle)

    def request(self, page: int, request_id: int, priority: int, generation: int) -> bytes | None:
        """The request for a page that nobody has asked for, to be sent; None: it is no such page, or a large one."""
        length = self._request(self._handle, page, request_id, priority, generation, self._frame)
        return self._frame.raw[:length] if length else None

    def came(self, data: bytes, position: int) -> LonePage | None:
        """The page that a frame at `position` brings, if it was requested here, is awaited, and is in memory now.

        None: it is another frame, or not all of it is here, or it is damaged, or the page could not be put into memory.
        """
        if not self._find(self._handle, data, len(data), position, self._came):
            return None
        return LonePage(*_CAME.unpack_from(self._came))
