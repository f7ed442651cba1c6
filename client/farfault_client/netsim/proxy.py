"""A TCP proxy that behaves like a network of given round-trip time and rate, and breaks when it is told.

It listens on the same ports as the server that it stands before, on an address of its own, so that ports which the
server names to its clients work through it::

    python -m farfault_client.netsim.proxy --listen 127.0.0.2 --to 127.0.0.1 --port 7777 --port 7778 --rtt-ms 10

Lines on standard input act at once: ``rtt-ms 5``, ``rate-bytes 12500000``, ``reset``, ``partition 10`` (seconds),
``half-open``, ``corrupt``, ``truncate``, ``duplicate``, ``stall 0.5``. It ends with its standard input.

Its timers are those of uvloop, in whole milliseconds: each direction may take one more than it should. Benchmarks use
the program ``link`` in C where they can.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import sys
from collections import deque
from collections.abc import Sequence
from typing import cast

import click

from farfault_client.netsim.pipe import Direction, Fault, LinkModel, damaged


class Network:
    """The link, and who uses it."""

    def __init__(self, link: LinkModel, seed: int = 0) -> None:
        self.link = link
        self.pairs: set[Pair] = set()
        self.blocked_until = 0.0
        self._rng = random.Random(seed)
        self._damage: Fault | None = None

    def inject(self, fault: Fault, duration_s: float = 0.0) -> None:
        """Breaks something now."""
        now = asyncio.get_running_loop().time()
        match fault:
            case Fault.RESET:
                for pair in list(self.pairs):
                    pair.reset()
            case Fault.PARTITION | Fault.STALL:
                self.blocked_until = now + duration_s
            case Fault.HALF_OPEN:
                for pair in self.pairs:
                    pair.is_dead = True
            case _:
                self._damage = fault

    def pass_through(self, pair: Pair, data: bytes, direction: Direction) -> bytes:
        """The chunk as it arrives; damage is done once."""
        fault = self._damage
        if fault is None or direction is Direction.UP:
            return data
        self._damage = None
        if fault is Fault.TRUNCATE:
            asyncio.get_running_loop().call_soon(pair.close)
        return damaged(data, fault, self._rng)


class End(asyncio.Protocol):
    """One side of a pair of connections."""

    def __init__(self, pair: Pair, direction: Direction) -> None:
        self._pair = pair
        self._direction = direction
        self._loop = asyncio.get_running_loop()
        self._on_the_way: deque[tuple[float, bytes]] = deque()
        self._on_the_way_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.other: End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        network = self._pair.network
        arrives_at = network.link.sent(self._direction, len(data), self._loop.time())
        self._on_the_way.append((max(arrives_at, network.blocked_until), data))
        self._on_the_way_bytes += len(data)
        if self._on_the_way_bytes > network.link.on_the_way_bytes_max and self.transport is not None:
            self.transport.pause_reading()
        if self._timer is None:
            self._deliver()

    def eof_received(self) -> bool:
        self._pair.ended(self)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._pair.ended(self)

    @property
    def is_empty(self) -> bool:
        return not self._on_the_way

    def _deliver(self) -> None:
        self._timer = None
        other = self.other
        network = self._pair.network
        now = self._loop.time()
        while self._on_the_way and other is not None and other.transport is not None:
            arrives_at = max(self._on_the_way[0][0], network.blocked_until)
            if arrives_at > now:
                self._timer = self._loop.call_at(arrives_at, self._deliver)
                break
            _, data = self._on_the_way.popleft()
            self._on_the_way_bytes -= len(data)
            if not self._pair.is_dead and not other.transport.is_closing():
                other.transport.write(network.pass_through(self._pair, data, self._direction))
        is_open = self.transport is not None and not self.transport.is_closing()
        if self.transport is not None and is_open and self._on_the_way_bytes <= network.link.on_the_way_bytes_max // 2:
            self.transport.resume_reading()
        self._pair.drained()

    def start(self) -> None:
        """The other end is there: what has come meanwhile goes on."""
        if self._timer is None:
            self._deliver()


class Pair:
    """A client's connection and ours to the server."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.is_dead = False
        self.client = End(self, Direction.UP)
        self.server = End(self, Direction.DOWN)
        self._ended: set[End] = set()
        network.pairs.add(self)

    async def connect(self, host: str, port: int) -> None:
        """Reaches the server, or ends the client's connection."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self.server, host, port)
        except OSError:
            self.close()
            return
        self.client.other, self.server.other = self.server, self.client
        self.client.start()
        self.server.start()

    def ended(self, end: End) -> None:
        """One side closed: the other one follows once everything has arrived."""
        self._ended.add(end)
        self.drained()

    def drained(self) -> None:
        if self._ended and all(end.is_empty for end in self._ended):
            self.close()

    def close(self) -> None:
        self._end(linger=False)

    def reset(self) -> None:
        """Both sides see a reset connection."""
        self._end(linger=True)

    def _end(self, *, linger: bool) -> None:
        self.network.pairs.discard(self)
        for end in (self.client, self.server):
            transport = end.transport
            if transport is None or transport.is_closing():
                continue
            if linger:
                connection = transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
            else:
                transport.close()


async def serve(network: Network, listen: str, to: str, ports: Sequence[int]) -> list[asyncio.Server]:
    """Listens on the ports of one address and forwards to the same ports of another."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def accept(port: int) -> asyncio.Protocol:
        pair = Pair(network)
        task = loop.create_task(pair.connect(to, port))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return pair.client

    return [await loop.create_server(lambda port=port: accept(port), listen, port) for port in ports]  # type: ignore[misc]


def obey(network: Network, line: str) -> None:
    """Acts on one line of standard input. Raises ValueError for one that says nothing."""
    word, _, value = line.strip().partition(" ")
    if word == "rtt-ms":
        network.link.rtt_s = float(value) / 1000
    elif word == "rate-bytes":
        network.link.bytes_per_s = float(value)
    elif word:
        network.inject(Fault(word), float(value or 0))


async def _run(network: Network, listen: str, to: str, ports: Sequence[int]) -> None:
    servers = await serve(network, listen, to, ports)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        with contextlib.suppress(ValueError):
            obey(network, line.decode())
    for server in servers:
        server.close()


@click.command()
@click.option("--listen", required=True, help="Address to listen on.")
@click.option("--to", required=True, help="Address of the server.")
@click.option("--port", "ports", type=int, multiple=True, required=True, help="Port on both; may be repeated.")
@click.option("--rtt-ms", type=float, default=0.0, help="Round-trip time that is added.")
@click.option("--rate-bytes", type=float, default=0.0, help="Bytes a second in each direction; 0: no limit.")
@click.option("--seed", type=int, default=0, help="Of the places that are damaged.")
def main(listen: str, to: str, ports: tuple[int, ...], rtt_ms: float, rate_bytes: float, seed: int) -> None:
    """Stands between a client and a server like a network."""
    import uvloop

    link = LinkModel(rtt_s=rtt_ms / 1000, bytes_per_s=rate_bytes)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(Network(link, seed), listen, to, ports))


if __name__ == "__main__":
    main()
