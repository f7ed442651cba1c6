"""QEMU's own post-copy, as its documentation (docs/devel/migration.rst, Postcopy) says."""

from __future__ import annotations

from typing import Final

from farfault_client.bench.compare.monitor import Monitor

START_TIMEOUT_S: Final = 30.0


async def start_native_move(
    source: Monitor, destination: Monitor, *, preempt: bool, listen_on: str, connect_to: str, port: int
) -> None:
    """Starts a migration and switches it to post-copy as soon as it is active.

    Args:
        source, destination: both VMMs; the destination waits (``-incoming defer``).
        preempt: pages that were asked for go over a connection of their own.
        listen_on: address of the destination.
        connect_to: where the source finds the destination, or a proxy before it.
        port: on both.
    """
    for monitor in (source, destination):
        names = ["events", "postcopy-ram", "postcopy-blocktime", *(["postcopy-preempt"] if preempt else [])]
        capabilities = [{"capability": name, "state": True} for name in names]
        await monitor.execute("migrate-set-capabilities", capabilities=capabilities)
    await destination.execute("migrate-incoming", uri=f"tcp:{listen_on}:{port}")
    await source.execute("migrate", uri=f"tcp:{connect_to}:{port}")
    await source.event("MIGRATION", "active", timeout_s=START_TIMEOUT_S)
    await source.execute("migrate-start-postcopy")
