"""A real Prometheus beside a real move: does every query of the rules and of the dashboard find data?

`make observe` runs this file; test_observe.py does the same.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from farfault.v1 import receiver_pb2 as rpb
from farfault_client.demo.processes import Processes
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import VmmKind
from farfault_shim.annotate.discover import discover

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "farfault.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "farfault.json"
PROMETHEUS_TIMEOUT_S = 30.0
RAM_BYTES = {VmmKind.QEMU: 512 << 20, VmmKind.REFERENCE: 512 << 20, VmmKind.SIMULATED: 32 << 20}
"""So much that the guest, whose faults no cap holds back, does not fetch all of it before the background does."""
MOVE_S = 14
"""The background is capped so that the move takes about this long: Prometheus needs time to scrape it."""
SLOW_FAULT_S = 0.002
"""Low, so that there are slow faults to be shown."""
RATE_INTERVAL = "8s"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, as it is asked, and where it is from."""

    origin: str
    expr: str


@dataclass(slots=True)
class Observation:
    """What Prometheus answered.

    Attributes:
        series: by query: how many it returned.
        fault_ids: exemplars of slow faults that Prometheus kept.
        receiver_log: whole.
        figures: the last status of the move.
    """

    series: dict[Query, int] = field(default_factory=dict)
    fault_ids: set[str] = field(default_factory=set)
    receiver_log: str = ""
    figures: rpb.MigrationStatus = field(default_factory=rpb.MigrationStatus)

    @property
    def empty(self) -> list[Query]:
        """Queries that found nothing."""
        return [query for query, count in self.series.items() if not count]


def queries() -> Iterator[Query]:
    """All of them. A comparison of an alert is asked with ``bool``: it then has a value whether it fires or not."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                yield Query(f"rule {rule['record']}", rule["expr"])
                yield Query(f"recorded {rule['record']}", rule["record"])
            else:
                expr = re.sub(r"(==|!=|>=|<=|(?<![=!<>~])[<>](?!=))(?!\s*bool)(?=\s)", r"\1 bool", rule["expr"])
                yield Query(f"alert {rule['alert']}", expr)
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*")
            yield Query(f"panel {panel['title']}", expr)


class Prometheus:
    """Debian's Prometheus on private ports with private data."""

    def __init__(self, processes: Processes, server_port: int, receiver_port: int) -> None:
        self._processes = processes
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(RULES)]
        for job, port in zip(config["scrape_configs"], (server_port, receiver_port), strict=True):
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        file = processes.folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={processes.folder / 'tsdb'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        processes.start("prometheus", [*command, "--enable-feature=exemplar-storage"])

    def wait_until_ready(self) -> None:
        self._processes.wait_until(self._is_ready, "Prometheus is ready", PROMETHEUS_TIMEOUT_S, "prometheus")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def query(self, expr: str, at: float) -> list[Any]:
        """Series of an expression at a moment (seconds since the epoch); series that are NaN do not count."""
        found = self._ask("query", query=expr, time=f"{at:.3f}")
        result = found["result"] if isinstance(found, dict) else []
        return [series for series in result if series["value"][1] != "NaN"]

    def fault_ids(self, since: float, until: float) -> set[str]:
        """Of the exemplars of the fault histogram."""
        found = self._ask(
            "query_exemplars", query="farfault_fault_seconds_bucket", start=f"{since:.3f}", end=f"{until:.3f}"
        )
        return {exemplar["labels"]["fault_id"] for series in found for exemplar in series["exemplars"]}

    def _ask(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scene_config(server_port: int, receiver_port: int) -> SceneConfig:
    """The most real VM that this machine has, moved slowly."""
    kind = VmmKind.best()
    source = "simulated"
    if kind is not VmmKind.SIMULATED:
        annotated = any(found.annotator is not None for found in discover().values())
        source = "stock-nowait" if annotated else "blocking"
    receive = ["--metrics", f"127.0.0.1:{receiver_port}", "--slow-fault", str(SLOW_FAULT_S)]
    return SceneConfig(
        kind,
        ram_bytes=RAM_BYTES[kind],
        fault_source=source,
        serve_flags=("--metrics", f"127.0.0.1:{server_port}"),
        receive_flags=(*receive, "--bandwidth", str(RAM_BYTES[kind] // MOVE_S)),
    )


def observe(folder: Path) -> Observation:
    """Moves a VM under the eyes of Prometheus, then asks it everything as of a moment late in the move."""
    server_port, receiver_port = free_port(), free_port()
    seen = Observation()
    with Processes(folder) as processes:
        prometheus = Prometheus(processes, server_port, receiver_port)
        scene = Scene(scene_config(server_port, receiver_port), folder, processes)
        try:
            prometheus.wait_until_ready()
            scene.start_all()
            began_at = time.time()
            moments: list[float] = []

            def note(status: rpb.MigrationStatus) -> None:
                if status.phase == rpb.PHASE_POSTCOPY and status.counters["settled_pages"] < status.guest_pages:
                    moments.append(time.time())

            seen.figures = scene.move(note)
            late = moments[-1] - 1.5
            seen.series = {query: len(prometheus.query(query.expr, late)) for query in queries()}
            seen.fault_ids = prometheus.fault_ids(began_at, time.time())
            seen.receiver_log = processes.log("receive").read_text()
        finally:
            scene.remove_ram()
    return seen


def main() -> None:
    """Prints each query and how many series it found; exit code 1 if one found none."""
    if shutil.which("prometheus") is None:
        sys.exit("prometheus is not installed: apt-get install prometheus")
    folder = Path(tempfile.mkdtemp(prefix="farfault-observe-"))
    try:
        seen = observe(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for query, count in seen.series.items():
        print(f"{'ok   ' if count else 'EMPTY'} {count:4} series  {query.origin}")
    status = seen.figures
    print(
        f"a VM of {status.guest_pages:,} pages was moved in {status.postcopy_s:.1f} s, {status.demand_faults:,} faults"
    )
    known = sum(fault_id in seen.receiver_log for fault_id in seen.fault_ids)
    print(f"{len(seen.fault_ids)} exemplars of slow faults, {known} of them found in the receiver's log by their id")
    print(f"{len(seen.series) - len(seen.empty)} of {len(seen.series)} queries return data")
    for query in seen.empty:
        print(f"  no data: {query.origin}: {query.expr.strip()}")
    sys.exit(bool(seen.empty))


if __name__ == "__main__":
    main()
