"""Clients that break the page server's contract below gRPC: raw HTTP/2, with or without sense, and silence."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable, Sequence
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_HEADERS: Final = 4
END_STREAM: Final = 1
FLOOD: Final = 5_000
"""Frames of one kind that a flood sends."""
CONNECT_TIMEOUT_S: Final = 10.0
ELSEWHERE: Final = "127.0.0.2"
"""Hostile clients come from a host of their own: opens are counted for each host."""

Header = tuple[str, str]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def headers_block(path: str, metadata: Sequence[Header] = ()) -> bytes:
    """The headers of a gRPC call in HPACK, each a literal that is not indexed."""
    fields: list[Header] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *metadata,
    ]
    return b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in fields)


def _literal(text: str) -> bytes:
    assert len(text) < 127, "longer ones need a second byte of length"
    return bytes((len(text),)) + text.encode()


def call(stream: int, path: str, metadata: Sequence[Header] = (), message: bytes | None = None) -> bytes:
    """A call's HEADERS and, where there is one, its only message."""
    frames = frame(HEADERS, END_HEADERS, stream, headers_block(path, metadata))
    if message is not None:
        frames += frame(DATA, END_STREAM, stream, b"\x00" + struct.pack(">I", len(message)) + message)
    return frames


DEMAND: Final = "/farfault.v1.PageService/Demand"
OPEN: Final = "/farfault.v1.PageService/Open"
STREAMS: Final = range(1, 2 * FLOOD, 2)


def random_bytes(rng: random.Random) -> bytes:
    return PREFACE + rng.randbytes(64 << 10)


def random_frames(rng: random.Random) -> bytes:
    frames = (frame(rng.randrange(12), rng.randrange(256), rng.randrange(8), rng.randbytes(20)) for _ in range(500))
    return PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames)


def another_protocol(rng: random.Random) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + rng.randbytes(1000)


def oversized_frame(rng: random.Random) -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 0, 1, rng.randbytes((16 << 20) - 1))


def endless_headers(rng: random.Random) -> bytes:
    """HEADERS whose CONTINUATIONs never end."""
    more = frame(CONTINUATION, 0, 1, (b"\x00" + _literal("x") + _literal("y" * 100)) * 100)
    return PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1, headers_block(DEMAND)) + more * 500


def rapid_reset(rng: random.Random) -> bytes:
    """CVE-2023-44487: streams that are opened and reset at once."""
    reset = struct.pack(">I", 8)
    calls = (call(stream, DEMAND) + frame(RST_STREAM, 0, stream, reset) for stream in STREAMS)
    return PREFACE + frame(SETTINGS, 0, 0) + b"".join(calls)


def settings_flood(rng: random.Random) -> bytes:
    """CVE-2019-9515: every one wants an acknowledgement."""
    return PREFACE + frame(SETTINGS, 0, 0) * FLOOD


def ping_flood(rng: random.Random) -> bytes:
    """CVE-2019-9512."""
    return PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, bytes(8)) * FLOOD


def window_flood(rng: random.Random) -> bytes:
    """A window that overflows."""
    update = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 0x7FFFFFFF))
    return PREFACE + frame(SETTINGS, 0, 0) + update * FLOOD


ATTACKS: Final[Sequence[Callable[[random.Random], bytes]]] = (
    random_bytes,
    random_frames,
    another_protocol,
    oversized_frame,
    endless_headers,
    rapid_reset,
    settings_flood,
    ping_flood,
    window_flood,
)


async def connect(port: int, source: str = ELSEWHERE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection from a hostile host."""
    opening = asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    return await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)


async def attack(port: int, data: bytes, *, reads: bool = True, stays_s: float = 1.0) -> bytes:
    """Sends these bytes and stays until the server closes, at most so long.

    Args:
        port: of the server.
        data: sent as fast as the server takes it.
        reads: False: whatever the server answers is left to it.
        stays_s: how long it stays after it has sent all, or as much as the server takes.

    Returns:
        The first 64 KiB of what the server answered.
    """
    reader, writer = await connect(port)
    answer = bytearray()

    async def read() -> None:
        while piece := await reader.read(64 << 10):
            if len(answer) < 64 << 10:
                answer.extend(piece)

    reading = asyncio.create_task(read()) if reads else None
    try:
        async with asyncio.timeout(stays_s):
            writer.write(data)
            await writer.drain()
            await (reading if reading is not None else writer.wait_closed())
    except (TimeoutError, ConnectionError):
        pass  # the one is what staying means, the other what a hostile client must expect
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        writer.transport.abort()
    return bytes(answer)
