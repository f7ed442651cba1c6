"""The network in C, and the one in Python: what goes in comes out, whole and in order, at both ends."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from farfault_client.bench.compare.network import proxy_command
from farfault_client.bench.programs import compiled
from farfault_client.netsim.pipe import ON_THE_WAY_BYTES_MAX, LinkModel
from netsim_helpers import PROXY_ADDRESS, free_ports

TIMEOUT_S = 30.0
MIB = 1 << 20

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
both = pytest.mark.parametrize("in_c", [pytest.param(True, marks=needs_compiler, id="c"), pytest.param(False, id="py")])


@pytest.fixture(scope="module")
def program() -> Path | None:
    return compiled() / "link" if shutil.which("cc") else None


@contextmanager
def linked(program: Path | None, link: LinkModel, port: int) -> Iterator[subprocess.Popen[str]]:
    command = proxy_command(program, link, PROXY_ADDRESS, "127.0.0.1", [port])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        assert proxy.stdout.readline() == "ready\n"
        yield proxy
        assert proxy.poll() is None
        assert proxy.stdin is not None
        proxy.stdin.close()
        assert proxy.wait(TIMEOUT_S) == 0


@contextmanager
def server(port: int, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Serves one connection after another, each on a thread of its own."""
    listener = socket.create_server(("127.0.0.1", port))

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            connection.settimeout(TIMEOUT_S)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def echo(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(MIB):
            connection.sendall(data)


def digest_at_the_end(connection: socket.socket) -> None:
    """Answers what came only when the client has said that nothing more comes."""
    with connection:
        seen = hashlib.sha256()
        while data := connection.recv(MIB):
            seen.update(data)
        connection.sendall(seen.digest())


def client(port: int) -> socket.socket:
    return socket.create_connection((PROXY_ADDRESS, port), TIMEOUT_S)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(MIB):
        parts.append(data)
    return b"".join(parts)


LINKS = [LinkModel(), LinkModel(rtt_s=0.004), LinkModel(bytes_per_s=100e6), LinkModel(rtt_s=0.002, bytes_per_s=50e6)]


@needs_compiler
@pytest.mark.parametrize("link", LINKS, ids=["fast", "delay", "rate", "both"])
def test_half_closed_streams_arrive_whole(program: Path, link: LinkModel) -> None:
    (port,) = free_ports(1)
    data = random.Random(1).randbytes(8 * MIB)
    with server(port, digest_at_the_end), linked(program, link, port), client(port) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == hashlib.sha256(data).digest()


@both
def test_connections_with_pieces_of_every_size_do_not_mix(program: Path | None, in_c: bool) -> None:
    (port,) = free_ports(1)
    failures: list[BaseException] = []

    def talk(seed: int) -> None:
        try:
            rng = random.Random(seed)
            with client(port) as connection:
                for _ in range(60):
                    data = rng.randbytes(rng.choice([1, 20, 4096, 100_000, 400_000]))
                    connection.sendall(data)
                    seen = b""
                    while len(seen) < len(data):
                        seen += connection.recv(MIB)
                    assert seen == data
        except BaseException as error:
            failures.append(error)

    with server(port, echo), linked(program if in_c else None, LinkModel(rtt_s=0.001), port):
        threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@needs_compiler
def test_a_reader_that_waits_stops_the_writer(program: Path) -> None:
    """Bytes on their way are bounded, and all of them arrive once somebody reads."""
    (port,) = free_ports(1)
    go_on = threading.Event()
    size = ON_THE_WAY_BYTES_MAX + 96 * MIB  # more than sockets hold as well
    seen: list[int] = []

    def late(connection: socket.socket) -> None:
        with connection:
            go_on.wait(TIMEOUT_S)
            total = 0
            while data := connection.recv(MIB):
                total += len(data)
            seen.append(total)
            connection.sendall(b"end")

    with server(port, late), linked(program, LinkModel(), port), client(port) as connection:
        connection.settimeout(1.0)  # of one call: the writer stands when none of its bytes was taken for so long
        sent, piece = 0, bytes(MIB)
        with pytest.raises(TimeoutError):
            while sent < size:
                sent += connection.send(piece)
        assert sent < size
        connection.settimeout(TIMEOUT_S)
        go_on.set()
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b"end"
        assert seen == [sent]


@both
def test_a_server_that_is_not_there_ends_the_connection(program: Path | None, in_c: bool) -> None:
    (port,) = free_ports(1)
    chosen = program if in_c else None
    with linked(chosen, LinkModel(), port), client(port) as connection, suppress(ConnectionError):
        assert connection.recv(1) == b""


@both
def test_an_end_of_the_client_reaches_the_server(program: Path | None, in_c: bool) -> None:
    (port,) = free_ports(1)
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(MIB):
                pass
        ended.set()

    with server(port, serve), linked(program if in_c else None, LinkModel(rtt_s=0.002), port):
        with client(port) as connection:
            connection.sendall(b"some")
        assert ended.wait(TIMEOUT_S)


def test_the_proxy_in_python_gets_the_same_link() -> None:
    link = LinkModel(rtt_s=0.01, bytes_per_s=125e6)
    words = proxy_command(None, link, "127.0.0.2", "127.0.0.1", [1, 2])
    assert words[-8:] == ["--port", "1", "--port", "2", "--rtt-ms", "10.0", "--rate-bytes", "125000000.0"]
    words = proxy_command(Path("link"), link, "127.0.0.2", "127.0.0.1", [1, 2])
    assert words == ["link", "127.0.0.2", "127.0.0.1", "5000", "125000000", "6875000", "1", "2"]


@pytest.mark.parametrize(
    ("link", "bytes_max"),
    [
        (LinkModel(), ON_THE_WAY_BYTES_MAX),
        (LinkModel(rtt_s=0.01, bytes_per_s=125e6), 625_000 + 6_250_000),
        (LinkModel(bytes_per_s=1000), 256 << 10),
        (LinkModel(rtt_s=10, bytes_per_s=1e9), ON_THE_WAY_BYTES_MAX),
    ],
)
def test_what_may_be_on_its_way(link: LinkModel, bytes_max: int) -> None:
    assert link.on_the_way_bytes_max == bytes_max
