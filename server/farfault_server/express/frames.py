"""Frames out of a stream: a 32-bit little-endian length and that many bytes. No I/O."""

from __future__ import annotations

import struct
from typing import Final

LENGTH: Final = struct.Struct("<I")
BUFFER_BYTES: Final = 64 << 10
"""Held for each connection; it grows, up to the longest frame, only for a frame that needs it."""


class FrameTooLongError(Exception):
    """The peer announced a frame over the limit; nothing after it can be understood."""


class FrameBuffer:
    """The driver reads into `writable`, says how much with `wrote`, and takes frames with `next_frame`.

    Args:
        frame_bytes_max: a longer frame is an error.
    """

    def __init__(self, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def writable(self) -> memoryview:
        """Room for the next bytes; never empty once `next_frame` has returned None."""
        return self._view[self._end :]

    def wrote(self, size_bytes: int) -> None:
        """So many bytes are in the room that `writable` gave."""
        self._end += size_bytes

    def next_frame(self) -> bytes | None:
        """The next whole frame; None: more bytes are needed.

        Raises:
            FrameTooLongError: drop the connection.
        """
        start, held = self._start, self._end - self._start
        needed = LENGTH.size
        if held >= needed:
            (length,) = LENGTH.unpack_from(self._buffer, start)
            if length > self._frame_bytes_max:
                raise FrameTooLongError(f"a frame of {length} bytes, the limit is {self._frame_bytes_max}")
            needed += length
            if held >= needed:
                self._start = start + needed
                if self._start == self._end:
                    self._start = self._end = 0
                return bytes(self._view[start + LENGTH.size : start + needed])
        self._make_room(needed)
        return None

    def _make_room(self, needed: int) -> None:
        """Moves what is held to the front; a frame that is longer than the buffer gets a longer buffer."""
        if len(self._buffer) - self._start >= needed and self._end < len(self._buffer):
            return
        held = bytes(self._view[self._start : self._end])
        if needed > len(self._buffer):
            self._buffer = bytearray(needed)
            self._view = memoryview(self._buffer)
        self._buffer[: len(held)] = held
        self._start, self._end = 0, len(held)
