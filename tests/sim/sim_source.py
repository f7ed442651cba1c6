"""The source: a page server that speaks real messages, and a network that does what networks do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farfault.checksum import checksum_of
from farfault.v1 import pages_pb2 as pb
from farfault_shim.layout import Layout
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from sim_clock import Clock

PAGE = 4096
ZEROS = bytes(PAGE)


@dataclass
class Trouble:
    """What goes wrong, as probabilities per message unless said otherwise; all of it ends at `ends_at` seconds."""

    ends_at: float
    corrupt: float = 0.0
    truncate: float = 0.0
    duplicate: float = 0.0
    break_stream: float = 0.0
    refuse: float = 0.0
    half: float = 0.0
    hostile: float = 0.0
    mute: float = 0.0
    delay_s: float = 0.002

    @classmethod
    def of(cls, rng: random.Random) -> Trouble:
        """A few kinds of trouble at a time, from nothing at all to everything."""
        trouble = cls(ends_at=rng.choice((0.0, 0.1, 0.4)), delay_s=rng.choice((0.0002, 0.002, 0.02)))
        for kind in ("corrupt", "truncate", "duplicate", "break_stream", "refuse", "half", "hostile", "mute"):
            if rng.random() < 0.35:
                setattr(trouble, kind, rng.choice((0.02, 0.1, 0.3)))
        return trouble


@dataclass
class Server:
    """Serves the frozen memory; a restart keeps the lease and its generation."""

    layout: Layout
    memory: list[bytes]
    rng: random.Random
    trouble: Trouble
    clock: Clock
    generation: int = 1
    is_up: bool = True
    served_pages: int = 0

    def answer(self, raw: bytes) -> list[bytes]:
        """The answers to one request, on the wire."""
        request = pb.FetchRequest.FromString(raw)
        troubled = self.clock.now < self.trouble.ends_at
        if troubled and self.rng.random() < self.trouble.mute:
            return []
        pages = [(part.region, part.first_page + index) for part in request.ranges for index in range(part.page_count)]
        refused = troubled and self.rng.random() < self.trouble.refuse
        if troubled and self.rng.random() < self.trouble.half:
            pages = pages[: len(pages) // 2]
        cut = self.rng.randrange(len(pages) + 1) if self.rng.random() < 0.3 else len(pages)
        batches = [pages[:cut], pages[cut:]] if cut < len(pages) else [pages]
        return [
            self._batch(part, [request.request_id] if part is batches[-1] else [], refused).SerializeToString()
            for part in batches
        ]

    def _batch(self, pages: list[tuple[int, int]], done: list[int], refused: bool) -> pb.PageBatch:
        batch = pb.PageBatch(done_request_ids=done, generation=self.generation)
        data = []
        for region, page in pages:
            content = self.memory[self.layout.regions[region].first_page + page]
            kind = pb.EXTENT_KIND_ZERO if content == ZEROS else pb.EXTENT_KIND_DATA
            if refused:
                kind = self.rng.choice((pb.EXTENT_KIND_NOT_FROZEN, pb.EXTENT_KIND_IO_ERROR, 77))  # type: ignore[arg-type]
            if kind == pb.EXTENT_KIND_DATA:
                data.append(content)
            last = batch.extents[-1] if batch.extents else None
            if (
                last is not None
                and last.region == region
                and last.kind == kind
                and last.first_page + last.page_count == page
            ):
                last.page_count += 1
            else:
                batch.extents.add(region=region, first_page=page, page_count=1, kind=kind)
        self.served_pages += len(data)
        batch.data = b"".join(data)
        batch.checksum = checksum_of(batch, batch.data)
        return batch


@dataclass
class Stream:
    """One connection: messages keep their order, arrive late, and none after a break."""

    network: Network
    deliver: Callable[[bytes], None]
    broke: Callable[[], None]
    is_open: bool = True
    _up_free_at: float = 0.0
    _down_free_at: float = 0.0

    def send(self, request: bytes) -> None:
        network = self.network
        self._up_free_at = max(self._up_free_at, network.clock.now + network.delay_s())
        network.clock.after(self._up_free_at - network.clock.now, lambda: self._at_server(request))

    def _at_server(self, request: bytes) -> None:
        if not self.is_open:
            return
        for raw in self.network.server.answer(request):
            for message in self.network.mangle(raw):
                network = self.network
                self._down_free_at = max(self._down_free_at, network.clock.now + network.delay_s())
                network.clock.after(self._down_free_at - network.clock.now, lambda raw=message: self._at_client(raw))  # type: ignore[misc]

    def _at_client(self, raw: bytes) -> None:
        if not self.is_open:
            return
        if self.network.happens(self.network.trouble.break_stream):
            self.close()
            return
        self.deliver(self.network.poison(raw))

    def close(self) -> None:
        """Breaks; both sides learn of it."""
        if self.is_open:
            self.is_open = False
            self.broke()


@dataclass
class Network:
    """Delay, loss by a broken connection, reordering between streams, duplication, truncation and corruption."""

    clock: Clock
    rng: random.Random
    server: Server
    trouble: Trouble
    hostile_page: Callable[[], int | None] = lambda: None
    """A page that the receiver does not wait for now."""
    streams: list[Stream] = field(default_factory=list)

    def delay_s(self) -> float:
        return self.trouble.delay_s * (0.5 + self.rng.random())

    def happens(self, probability: float) -> bool:
        return probability > 0 and self.clock.now < self.trouble.ends_at and self.rng.random() < probability

    def connect(self, deliver: Callable[[bytes], None], broke: Callable[[], None]) -> Stream | None:
        """None: nobody listens."""
        if not self.server.is_up:
            return None
        stream = Stream(self, deliver, broke)
        self.streams = [other for other in self.streams if other.is_open]
        self.streams.append(stream)
        return stream

    def break_all(self) -> None:
        for stream in list(self.streams):
            stream.close()

    def mangle(self, raw: bytes) -> list[bytes]:
        if self.happens(self.trouble.truncate):
            raw = raw[: self.rng.randrange(len(raw) + 1)]
        elif self.happens(self.trouble.corrupt):
            damaged = bytearray(raw)
            damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
            raw = bytes(damaged)
        return [raw, raw] if self.happens(self.trouble.duplicate) else [raw]

    def poison(self, raw: bytes) -> bytes:
        """A hostile peer adds what nobody asked for, or breaks the message's own rules."""
        if not self.happens(self.trouble.hostile):
            return raw
        try:
            batch = pb.PageBatch.FromString(raw)
        except DecodeError:  # it was cut short before
            return raw
        if checksum_of(batch, batch.data) != batch.checksum:
            return raw  # it was corrupted before
        match self.rng.randrange(6):
            case 0:  # bytes that nobody asked for
                page = self.hostile_page()
                if page is not None:
                    batch.extents.add(region=0, first_page=page, page_count=1, kind=pb.EXTENT_KIND_DATA)
                    batch.data += b"\xee" * PAGE
            case 1:  # zeros that nobody asked for
                page = self.hostile_page()
                if page is not None:
                    for _ in range(self.rng.choice((1, 5000))):
                        batch.extents.add(region=0, first_page=page, page_count=1, kind=pb.EXTENT_KIND_ZERO)
            case 2:  # a wrong length, with a checksum that matches
                batch.data = batch.data[: -self.rng.randint(1, PAGE)] if batch.data else b"\xee" * 7
            case 3:  # pages and regions that do not exist
                batch.extents.add(
                    region=self.rng.choice((0, 1, 9)),
                    first_page=self.rng.getrandbits(64),
                    page_count=self.rng.getrandbits(self.rng.choice((8, 64))),
                    kind=pb.EXTENT_KIND_ZERO,
                )
            case 4:  # the end of a request that is none
                batch.done_request_ids.append(self.rng.getrandbits(40))
            case _:  # the memory of another time
                batch.generation += 1
        batch.checksum = checksum_of(batch, batch.data)
        return batch.SerializeToString()
