"""Answers requests for one page that has data, which nearly all faults are, in C: `server/native/answer.c`."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from farfault.native import load

from farfault_server.memory import FileRegion, PageRegion

LIBRARY: Final = Path(__file__).parent.parent / "_native" / "libfarfault_answer.so"
BUFFER_BYTES: Final = (64 << 10) + 2 * 128
"""LONE_BYTES_MAX and ANSWER_SLACK_MAX on both sides: `proto/native/lone_page.h`."""
LENGTH_BYTES: Final = 4
"""A frame's length precedes it."""
_REGION: Final = struct.Struct("<qQQ")
_ANSWERED: Final = struct.Struct("<4Q")


class LoneAnswer(NamedTuple):
    """An answer.

    Attributes:
        frame: its bytes, behind their length.
        priority: of the request.
        read_us: time to read the page and look whether it is zero.
    """

    frame: bytes
    priority: int
    read_us: int


@cache
def _function() -> ctypes._NamedFuncPointer | None:
    library = load(LIBRARY)
    if library is None:
        return None
    function = library.farfault_answer
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return function


class LoneAnswers:
    """Answers requests for a page of these regions, of any number of streams: nothing is kept between two calls.

    Args:
        regions: in the order of their ids; those that are not files are somebody else's.
    """

    def __init__(self, regions: Sequence[PageRegion]) -> None:
        self._function = _function() if any(isinstance(region, FileRegion) for region in regions) else None
        packed = b"".join(_packed(region) for region in regions)
        self._regions = ctypes.create_string_buffer(packed, len(packed))
        self._region_count = len(regions)
        self._buffer = ctypes.create_string_buffer(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._answered = ctypes.create_string_buffer(_ANSWERED.size)

    def answer(self, message: bytes, generation: int) -> LoneAnswer | None:
        """The answer to a request.

        Args:
            message: a `FetchRequest`, or whatever came instead.
            generation: of the memory, which may be read now.

        Returns:
            None: it is no plain request for one page, or the page is zero, large or unreadable; `Answering.receive` it.
        """
        function, answered = self._function, self._answered
        if function is None or not function(
            self._regions, self._region_count, generation, message, len(message), self._buffer, answered
        ):
            return None
        begin, frame_bytes, priority, read_us = _ANSWERED.unpack_from(answered)
        return LoneAnswer(bytes(self._view[begin : begin + frame_bytes]), priority, read_us)


def _packed(region: PageRegion) -> bytes:
    descriptor = region.descriptor if isinstance(region, FileRegion) else -1
    return _REGION.pack(descriptor, region.size_bytes // region.page_size_bytes, region.page_size_bytes)
