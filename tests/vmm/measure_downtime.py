"""Measures how long a VM stands still between two QEMUs of one host, in four ways to save it.

Both QEMUs use one RAM file, so that nothing but the device state has to move. From the time of the event STOP at the
source to that of RESUME at the destination::

    python tests/vmm/measure_downtime.py --accelerator kvm --moves 20

The ways take turns, so that other load on the machine meets them alike.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import uvloop
from farfault_vmm.connection import QmpConnection
from qemu_hosts import Host, host

WAIT_S_MAX = 10.0
CHUNK_BYTES_MAX = 256 << 10


async def of_the_product(source: Host, destination: Host) -> int:
    """Returns microseconds, like the others."""
    async with await source.connect() as ours, await destination.connect() as theirs:
        await theirs.prepare_destination()
        await theirs.load(ours.suspend())
        resumed_unix_us = await theirs.cont()
        assert ours.stopped_unix_us is not None
        return resumed_unix_us - ours.stopped_unix_us


async def stopped_first(source: Host, destination: Host) -> int:
    """`stop`, then `migrate`."""
    return await _saved(source, destination, stop=True)


async def saved_running(source: Host, destination: Host) -> int:
    """QEMU stops the VM itself, at the end of the migration."""
    return await _saved(source, destination)


async def saved_running_with_pause(source: Host, destination: Host) -> int:
    """The same, and QEMU asks between the stop and the device state (pause-before-switchover)."""
    return await _saved(source, destination, pause=True)


async def _saved(source: Host, destination: Host, *, stop: bool = False, pause: bool = False) -> int:
    stopped_unix_us: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with await destination.connect() as theirs:
        await theirs.prepare_destination()
        await theirs.load(_save(source, stopped_unix_us, stop=stop, pause=pause))
        resumed_unix_us = await theirs.cont()
        return resumed_unix_us - stopped_unix_us.result()


async def _save(source: Host, stopped_unix_us: asyncio.Future[int], *, stop: bool, pause: bool) -> AsyncIterator[bytes]:
    async with await source.connect() as vmm:
        await vmm.prepare_source()
    connection = await QmpConnection.connect(source.socket, WAIT_S_MAX)
    capability = {"capability": "pause-before-switchover", "state": pause}
    await connection.execute("migrate-set-capabilities", {"capabilities": [capability]})
    ours, theirs = socket.socketpair()
    with ours, theirs, connection.events("STOP", "MIGRATION") as events:
        ours.setblocking(False)
        await connection.pass_descriptor(theirs.fileno(), "state")
        theirs.close()

        async def drive() -> None:
            stopping = asyncio.create_task(connection.execute("stop")) if stop else None
            await connection.execute("migrate", {"uri": "fd:state"})
            if stopping is not None:
                await stopping
            while not stopped_unix_us.done() or pause:
                event = await connection.next_event(events, WAIT_S_MAX, "the stop")
                if event.name == "STOP":
                    stopped_unix_us.set_result(event.unix_us)
                if event.status == "pre-switchover":
                    await connection.execute("migrate-continue", {"state": "pre-switchover"})
                    return

        driving = asyncio.create_task(drive())
        while chunk := await asyncio.get_running_loop().sock_recv(ours, CHUNK_BYTES_MAX):
            yield chunk
        await driving
    await connection.close()


WAYS: dict[str, Callable[[Host, Host], Awaitable[int]]] = {
    "as the product does it": of_the_product,
    "stopped first": stopped_first,
    "saved while it runs": saved_running,
    "saved while it runs, with pause-before-switchover": saved_running_with_pause,
}


async def measure(directory: Path, accelerator: str, way: str) -> float:
    """One move, in milliseconds."""
    options = ("-incoming", "defer")
    with (
        host(directory, "source", accelerator) as source,
        host(directory, "destination", accelerator, *options, shared_ram=source.ram) as destination,
    ):
        async with await source.connect(), await destination.connect():
            await source.works()
        took_us = await WAYS[way](source, destination)
        await destination.works()
        return took_us / 1000


@click.command()
@click.option("--accelerator", type=click.Choice(["kvm", "tcg"]), default="kvm", show_default=True)
@click.option("--moves", type=click.IntRange(1, 1000), default=20, show_default=True, help="In each way.")
def main(accelerator: str, moves: int) -> None:
    """Prints median, least and greatest downtime of each way, in milliseconds."""
    results: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(moves):
        for way, took_ms in results.items():
            with TemporaryDirectory(prefix=f"ff-{os.getpid()}-downtime-", dir="/dev/shm") as directory:
                took_ms.append(uvloop.run(measure(Path(directory), accelerator, way)))
    for way, took_ms in results.items():
        click.echo(f"{statistics.median(took_ms):6.1f} {min(took_ms):6.1f} {max(took_ms):6.1f} ms  {way}")


if __name__ == "__main__":
    main()
