"""docs/metrics.md and the collectors say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from farfault_client.metrics.collector import ReceiverCollector
from farfault_server.leases.store import MemoryStore
from farfault_server.memory.synthetic_region import SyntheticRegion
from farfault_server.metrics import ServerCollector
from farfault_server.server import PageServer, ServerConfig
from prometheus_client.core import Metric
from receiver_stub import make_receiver

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(farfault_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", re.MULTILINE)
SUFFIXES = {"counter": "_total", "info": "_info"}

Row = tuple[str, str, tuple[str, ...], str]


def rows_of_page(prefix: str, *, without: str = "-") -> list[Row]:
    rows = ROW.findall(PAGE.read_text())
    return [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), text)
        for name, kind, labels, text in rows
        if name.startswith(prefix) and not name.startswith(without)
    ]


def rows_of(families: Iterable[Metric]) -> list[Row]:
    return [
        (
            family.name + SUFFIXES.get(family.type, ""),
            family.type,
            tuple(family._labelnames) or (("version",) if family.type == "info" else ()),  # type: ignore[attr-defined]
            family.documentation,
        )
        for family in families
    ]


async def test_every_metric_of_a_receiver_is_on_the_page(tmp_path: Path) -> None:
    families = ReceiverCollector(make_receiver(tmp_path)).collect()

    assert rows_of(families) == rows_of_page("farfault_", without="farfault_server_")


async def test_every_metric_of_a_page_server_is_on_the_page() -> None:
    config = ServerConfig(host="127.0.0.1", port=0)
    server = PageServer([SyntheticRegion(1, 0, 1 << 20)], config, MemoryStore(), None)
    await server.start()
    try:
        assert rows_of(ServerCollector(server).collect()) == rows_of_page("farfault_server_")
    finally:
        await server.stop()
