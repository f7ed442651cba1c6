"""Rules, scrape configuration and dashboard: checked alone, and against a Prometheus that has seen a real move."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from observing import DASHBOARD, DEPLOY, RULES, observe, queries
from test_metrics_page import ROW

PROMETHEUS = DEPLOY / "prometheus"
DOCS = DEPLOY.parent / "docs"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "farfault.rules.yml"),
        ("test", "rules", "farfault.rules.test.yml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_names_metrics_that_exist() -> None:
    known = {name for name, *_ in ROW.findall((DOCS / "metrics.md").read_text())}
    recorded = {rule["record"] for group in _groups() for rule in group["rules"] if "record" in rule}

    for query in queries():
        text = query.expr
        for name in recorded:
            text = text.replace(name, "")
        for name in re.findall(r"\bfarfault_\w+", text):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in known, f"{query.origin}: {name}"


def test_every_alert_says_what_to_do_and_has_a_unit_test() -> None:
    tested = (PROMETHEUS / "farfault.rules.test.yml").read_text()
    for rule in _alerts():
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["alert"] in tested


def test_the_page_of_alerts_has_all_of_them_in_order() -> None:
    rows = re.findall(r"^\| (Farfault\w+) \| (\w+) \|", (DOCS / "alerts.md").read_text(), re.MULTILINE)

    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in _alerts()]


def test_the_dashboard_is_portable() -> None:
    dashboard = json.loads(DASHBOARD.read_text())

    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [(x, y) for panel in dashboard["panels"] for x, y in _cells(panel["gridPos"])]
    assert len(cells) == len(set(cells)), "no panel covers another"
    assert all(0 <= x < 24 for x, _ in cells)


@needs_prometheus
def test_every_query_returns_data_of_a_real_move(tmp_path: Path) -> None:
    seen = observe(tmp_path)

    assert seen.empty == []
    assert len(seen.series) > 60
    assert seen.fault_ids, "no exemplar of a slow fault"
    assert all(fault_id in seen.receiver_log for fault_id in seen.fault_ids), "an exemplar leads to its log line"


def _groups() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return groups


def _alerts() -> list[dict[str, Any]]:
    return [rule for group in _groups() for rule in group["rules"] if "alert" in rule]


def _cells(position: dict[str, int]) -> list[tuple[int, int]]:
    x, y = position["x"], position["y"]
    return [(x + across, y + down) for across in range(position["w"]) for down in range(position["h"])]
