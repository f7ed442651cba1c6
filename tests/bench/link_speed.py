"""How fast the network between the hosts of a benchmark is: direct, through the proxy in C, through the one in Python.

    .venv/bin/python tests/bench/link_speed.py --rtt-ms 10 --mib 1024

One connection over loopback: round trips of one byte, then a stream. Prints what the proxy's process used of the CPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import click
from farfault_client.bench.compare.network import LOOPBACK, LOOPBACK_PROXY, free_ports, link_program, proxy_command
from farfault_client.bench.compare.usage import cpu_s
from farfault_client.netsim.pipe import LinkModel

PIECE_BYTES = 256 << 10
ROUND_TRIPS = 200


def send_stream(listener: socket.socket, size_bytes: int) -> None:
    """The server: echoes single bytes up to one that says go, then sends."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while (word := connection.recv(1)) != b"!":
        connection.sendall(word)
    piece = bytes(PIECE_BYTES)
    for _ in range(size_bytes // PIECE_BYTES):
        connection.sendall(piece)


def measure(address: str, port: int, size_bytes: int) -> tuple[float, float]:
    """Median of a round trip in microseconds, MB/s of the stream."""
    listener = socket.create_server((LOOPBACK, port))
    sender = os.fork()
    if not sender:
        send_stream(listener, size_bytes)
        os._exit(0)
    with listener, socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            trips.append(time.perf_counter() - began)
        buffer, seen, began = bytearray(4 * PIECE_BYTES), 0, time.perf_counter()
        connection.sendall(b"!")
        while got := connection.recv_into(buffer):
            seen += got
        took_s = time.perf_counter() - began
    os.waitpid(sender, 0)
    assert seen == size_bytes
    return sorted(trips)[len(trips) // 2] * 1e6, seen / 1e6 / took_s


@click.command()
@click.option("--rtt-ms", type=float, default=0.0, show_default=True)
@click.option("--rate-bytes", type=float, default=0.0, help="Bytes a second; 0: no limit.")
@click.option("--mib", type=click.IntRange(min=1), default=1024, show_default=True, help="Length of the stream.")
def main(rtt_ms: float, rate_bytes: float, mib: int) -> None:
    """Measures each way once."""
    link = LinkModel(rtt_s=rtt_ms / 1000, bytes_per_s=rate_bytes)
    program, problem = link_program()
    click.echo(problem or "way     round trip, p50    stream      CPU of the proxy")
    proxies: dict[str, Path | None] = {"C": program} if program is not None else {}
    for name, chosen in {"direct": None, **proxies, "Python": None}.items():
        (port,) = free_ports(1)
        if name == "direct":
            trip_us, mb_per_s = measure(LOOPBACK, port, mib << 20)
            click.echo(f"direct  {trip_us:10,.0f} us   {mb_per_s:6,.0f} MB/s")
            continue
        command = proxy_command(chosen, link, LOOPBACK_PROXY, LOOPBACK, [port])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None
            assert proxy.stdin is not None
            assert proxy.stdout.readline() == "ready\n"
            before_s = cpu_s([proxy.pid])
            trip_us, mb_per_s = measure(LOOPBACK_PROXY, port, mib << 20)
            click.echo(
                f"{name:<7} {trip_us:10,.0f} us   {mb_per_s:6,.0f} MB/s   {cpu_s([proxy.pid]) - before_s:6.2f} s"
            )
            proxy.stdin.close()


if __name__ == "__main__":
    main()
