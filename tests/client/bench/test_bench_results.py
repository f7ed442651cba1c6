"""Scenarios, medians, ratios and the reports made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from farfault_client.bench.command import SUBCOMMANDS, bench
from farfault_client.bench.compare.html_report import html_report
from farfault_client.bench.compare.markdown_report import markdown_report
from farfault_client.bench.compare.results import METRICS, Results, headings, rows
from farfault_client.bench.compare.run import Run
from farfault_client.bench.compare.scenario import Axes, Link, Mode, Scenario, order_of_modes
from farfault_client.bench.document import replace_section
from farfault_client.bench.machine import command_line
from farfault_client.bench.spread import spread_of
from farfault_shim.guest import GuestKind

RUN = Run(
    Mode.QEMU,
    Scenario(),
    faults=100,
    mean_fault_us=1000.0,
    p50_fault_us=900.0,
    p99_fault_us=5000.0,
    blocked_share=0.8,
    touched_first_second=1000.0,
    postcopy_s=1.0,
    downtime_ms=10.0,
    cpu_s_per_gib=1.5,
    serve_own_bytes=None,
    receive_own_bytes=None,
    serve_rss_bytes=None,
    receive_rss_bytes=None,
    verification_errors=0,
    others_cpu_share=0.0,
)


@pytest.fixture
def results() -> Results:
    ours = replace(RUN, mode=Mode.NOWAIT, mean_fault_us=200.0, touched_first_second=9000.0, serve_own_bytes=50 << 20)
    runs = [RUN, replace(RUN, mode=Mode.QEMU_PREEMPT, mean_fault_us=400.0, touched_first_second=3000.0)]
    return Results([*runs, ours, replace(ours, mean_fault_us=100.0), replace(ours, mean_fault_us=700.0)])


def test_star_changes_one_thing_at_a_time() -> None:
    axes = Axes([GuestKind.RANDOM, GuestKind.SEQUENTIAL], [1 << 30, 4 << 30], [1, 2], [0.0, 10.0], [0])
    assert [scenario.title for scenario in axes.star()] == [
        "random, 1024 MiB, 1 vCPU, RTT 0 ms",
        "sequential, 1024 MiB, 1 vCPU, RTT 0 ms",
        "random, 4096 MiB, 1 vCPU, RTT 0 ms",
        "random, 1024 MiB, 2 vCPUs, RTT 0 ms",
        "random, 1024 MiB, 1 vCPU, RTT 10 ms",
    ]
    assert len(axes.every()) == 16
    assert axes.every()[0] == axes.star()[0] == axes.reference


def test_other_networks_are_measured_on_the_last_link() -> None:
    axes = Axes([GuestKind.RANDOM], [1 << 30], [1], [0.0, 10.0], [0, 125_000_000], list(Link))
    assert [scenario.title.partition("1 vCPU, ")[2] for scenario in axes.star()] == [
        "RTT 0 ms",
        "RTT 0 ms, namespaces",
        "RTT 10 ms, namespaces",
        "RTT 0 ms, 125 MB/s, namespaces",
    ]
    assert [scenario.has_proxy for scenario in axes.star()] == [False, False, True, True]
    assert len(axes.every()) == 8


def test_each_mode_comes_first_in_turn() -> None:
    modes = list(Mode)
    assert [order_of_modes(modes, run)[0] for run in range(5)] == [*modes, modes[0]]
    assert all(sorted(order_of_modes(modes, run), key=modes.index) == modes for run in range(5))


def test_spread() -> None:
    assert spread_of([3, None, 1, 2]) == (2, 1, 3, 3)
    assert spread_of([None]) is None


def test_ratios_are_over_the_better_qemu_mode(results: Results) -> None:
    ratios = results.to_json()["ratios"]
    assert ratios["mean_fault"] == pytest.approx(200 / 400)
    assert ratios["touched_first_second"] == pytest.approx(9000 / 3000)
    assert ratios["postcopy_s"] == 1
    assert set(ratios) == {
        "mean_fault",
        "p99_fault",
        "blocked_share",
        "touched_first_second",
        "postcopy_s",
        "downtime",
        "cpu_s_per_gib",
    }


def test_json_object(results: Results) -> None:
    shown = json.loads(json.dumps(results.to_json()))
    assert shown["ratios_mode"] == "farfault-nowait"
    assert [run["mode"] for run in shown["runs"]] == ["qemu", "qemu-preempt", *["farfault-nowait"] * 3]
    assert (shown["runs"][0]["guest"], shown["runs"][0]["link"]) == ("random", "loopback")
    assert {"guest", "rtt_ms", "mean_fault_us", "ram_bytes"} <= set(shown["runs"][0])
    assert Results().to_json() == {"runs": [], "ratios": {}, "ratios_mode": "", "all_ratios": []}


def test_without_qemu_there_is_no_ratio() -> None:
    alone = Results([replace(RUN, mode=Mode.BLOCKING)])
    assert set(alone.to_json()["ratios"].values()) == {None}


def test_a_guest_that_misses_nothing_has_no_latencies_and_no_ratios_of_them() -> None:
    idle = replace(
        RUN,
        scenario=Scenario(GuestKind.IDLE),
        faults=0,
        mean_fault_us=None,
        p50_fault_us=None,
        p99_fault_us=None,
        blocked_share=0.0,
    )
    results = Results([idle, replace(idle, mode=Mode.NOWAIT)])
    ratios = results.to_json()["ratios"]
    assert (ratios["mean_fault"], ratios["p99_fault"], ratios["blocked_share"]) == (None, None, None)
    assert ratios["postcopy_s"] == 1
    assert ["demand faults", "0", "0", ""] in rows(results, idle.scenario)
    assert ["vCPUs blocked (%)", "0", "0", "-"] in rows(results, idle.scenario)
    for report in (markdown_report, html_report):
        assert "idle" in report(results, {}, "farfault bench compare")


def test_rows_fit_their_headings(results: Results) -> None:
    table = rows(results, Scenario())
    assert {len(row) for row in table} == {len(headings(results, Scenario()))}
    mean = next(row for row in table if row[0] == METRICS[0].title)
    assert mean == ["demand fault, mean (us)", "1,000", "400", "200 100-700", "0.50"]


def test_reports_name_machine_and_command(results: Results) -> None:
    for report in (markdown_report, html_report):
        text = report(results, {"kernel": "Linux <7>"}, "farfault bench compare")
        assert "farfault bench compare" in text
        assert "0.50" in text


def test_plots_are_well_formed(results: Results) -> None:
    page = html_report(results, {}, "farfault")
    plots = page.split("<svg")[1:]
    assert len(plots) == sum(bool(metric.ratio) for metric in METRICS)
    for plot in plots:
        ElementTree.fromstring("<svg" + plot[: plot.index("</svg>")] + "</svg>")


def test_sections_of_a_document_are_replaced_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("# Title\n")
    replace_section(path, "compare", "first")
    replace_section(path, "micro", "other")
    replace_section(path, "compare", "second")
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- compare")
    assert "first" not in text
    assert text.index("second") < text.index("other")


def test_the_command_that_is_shown_has_no_places_of_results() -> None:
    typed = ["bench", "compare", "--html", "x.html", "--runs", "7", "--json", "--markdown=y.md"]
    assert command_line(typed) == "farfault bench compare --runs 7"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_teaches_with_examples(name: str) -> None:
    result = CliRunner().invoke(bench, [name, "--help"])
    assert result.exit_code == 0
    assert f"farfault bench {name}" in result.output
