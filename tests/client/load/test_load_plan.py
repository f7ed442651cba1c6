"""Plans, the command line, comparison and the report."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from farfault_cli.errors import FarfaultError, SloError, UsageError, VerificationError
from farfault_client.load import measurement as measurement_module
from farfault_client.load.command import described, judge, load, write_share_of
from farfault_client.load.compare import compare, read_earlier
from farfault_client.load.director import LoadTest, share
from farfault_client.load.figures import Setup, figures_of
from farfault_client.load.html_report import html_of
from farfault_client.load.measurement import Measurement
from farfault_client.load.plan import (
    Arrivals,
    PatternKind,
    PatternPlan,
    RunPlan,
    ServerPlan,
    WorkerPlan,
    from_json,
    to_json,
)
from farfault_client.load.plot import linear_axis, log_axis
from farfault_client.load.slo import RateSearch, parse_objectives
from farfault_client.load.tally import Tally, record
from farfault_client.load.text import microseconds, short_time, text_of

READY: dict[str, Any] = {
    "backing": ["synthetic"],
    "regions": [[1 << 30, 4096]],
    "server_version": "0.1.0",
    "carrier": ["express"],
    "verified_by": "seed",
}
END: dict[str, Any] = {
    "ended_by": "its time was over",
    "hits": 0,
    "refusals": {},
    "wrong_pages": 0,
    "bad_answers": 0,
    "verified_pages": 1000,
    "problems": [],
    "wire_bytes": 4_000_000,
    "cpu_s": 0.5,
    "connects": 0,
}


def measurement(rate_per_s: float | None = None, latency_s: float = 0.0002, *, holds: bool = True) -> Measurement:
    made = Measurement(rate_per_s, measured_from=100.0, duration_s=2.0, ends=[END])
    for second in range(2):
        tally = Tally(100.0 + second, 101.0 + second, offered=500, faults=500, pages=500, page_bytes=500 * 4096)
        record(tally.latency, latency_s, 499)
        record(tally.latency, 20 * latency_s)
        made.add(tally, is_background=False)
    made.broken = [] if holds else ["p99 is 9 ms, more than 1 ms"]
    return made


def figures(rate_per_s: float | None = None, latency_s: float = 0.0002, *, search: bool = False) -> dict[str, Any]:
    setup = Setup(
        target="<host>:7777",
        servers=[READY],
        pattern=PatternPlan(),
        arrivals=Arrivals.CONSTANT,
        rate_per_s=rate_per_s,
        vcpus=8,
        connections=1,
        processes=1,
        warmup_s=1.0,
        duration_s=2.0,
        background=False,
        open_loop=rate_per_s is not None,
    )
    best = measurement(rate_per_s, latency_s)
    steps = [best, measurement(2 * (rate_per_s or 500), 0.009, holds=False)] if search else [best]
    found = RateSearch(500.0, holds_per_s=500.0) if search else None
    return figures_of(setup, best, parse_objectives(["p99=1ms"]) if search else (), found, steps)


def parsed(*arguments: str) -> LoadTest:
    context = load.make_context("load", ["--source", "h:1", *arguments])
    made = described(context.params)
    assert isinstance(made, LoadTest)
    return made


# ---- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        WorkerPlan(ServerPlan("h:1", tls="/tls"), PatternPlan(PatternKind.ZIPF, write_share=0.25), vcpus=(1, 3)),
        RunPlan(5.0, 1.0, 10.0, rate_per_s=3.5, arrivals=Arrivals.POISSON),
    ],
)
def test_plans_survive_json(plan: WorkerPlan | RunPlan) -> None:
    assert from_json(type(plan), to_json(plan)) == plan


def test_workers_share_vcpus_connections_and_rate() -> None:
    test = parsed("--vcpus", "5", "--processes", "2", "--connections", "3", "--background", "--rate", "100")
    workers = test.workers()
    assert [plan.vcpus for plan in workers[:2]] == [(0, 2, 4), (1, 3)]
    assert sorted(plan.connections for plan in workers[:2]) == [1, 2]
    assert workers[2].background
    assert [run.rate_per_s for run in test.runs(100.0, 1.0)] == [50.0, 50.0, 50.0]


@pytest.mark.parametrize("total", [0, 1, 7, 100])
def test_shares_add_up(total: int) -> None:
    assert sum(share(total, index, 3) for index in range(3)) == total


def test_what_kind_of_loop_the_options_mean() -> None:
    assert not parsed().is_open_loop
    assert parsed("--rate", "5").is_open_loop
    assert parsed("--slo", "p99=1ms").is_search
    assert not parsed("--slo", "p99=1ms", "--rate", "5").is_search
    assert not parsed("--slo", "p99=1ms", "--closed").is_search
    replay = parsed("--replay", "t")
    assert (replay.is_open_loop, replay.arrivals, replay.warmup_s) == (True, Arrivals.RECORDED, 0.0)
    assert not parsed("--replay", "t", "--closed").is_open_loop
    assert parsed("--pages", "10").duration_s == 600.0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "5", "--closed"],
        ["--processes", "2", "--connections", "1"],
        ["--processes", "9"],
        ["--background-rate", "1MiB"],
        ["--slo", "p99"],
        ["--read-write", "80"],
    ],
)
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        parsed(*arguments)


@pytest.mark.parametrize(("mix", "share"), [("80:20", 0.2), ("1:1", 0.5), ("0:3", 1.0), ("100:0", 0.0)])
def test_mixes(mix: str, share: float) -> None:
    assert write_share_of(mix) == pytest.approx(share)


@pytest.mark.parametrize("mix", ["80", "a:b", "0:0", "-1:2", ":"])
def test_bad_mixes(mix: str) -> None:
    with pytest.raises(UsageError):
        write_share_of(mix)


def test_help_teaches() -> None:
    result = CliRunner().invoke(load, ["--help"])
    assert result.exit_code == 0
    assert "--slo p99=1ms" in result.output
    assert "8 an objective is broken" in " ".join(result.output.split())


# ---- measurements ------------------------------------------------------------------------------------


def test_answers_after_the_end_count_in_the_last_interval() -> None:
    made = measurement()
    made.add(Tally(102.0, 102.5, faults=10, pages=10), is_background=False)
    points = made.points()
    assert [point["rate_pages_s"] for point in points] == [500.0, 340.0]
    assert made.elapsed_s == 2.5
    assert made.total.pages == 1010


def test_long_runs_keep_a_bounded_number_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement_module, "INTERVALS_MAX", 50)
    made = Measurement(None, measured_from=0.0, duration_s=100)
    for second in range(50 + 1):
        made.add(Tally(float(second), second + 1.0, pages=1), is_background=False)
    assert made.interval_s == 2.0
    assert made.total.pages == 51
    assert len(made.intervals) == 26


def test_the_stable_keys_of_a_result() -> None:
    result = figures(rate_per_s=500.0)
    assert list(result)[:8] == [
        "pages",
        "errors",
        "verification_errors",
        "rate_pages_s",
        "offered_pages_s",
        "latency_us",
        "open_loop",
        "slo",
    ]
    assert {"p50", "p90", "p99", "p999", "max"} <= set(result["latency_us"])
    assert (result["rate_pages_s"], result["offered_pages_s"], result["open_loop"]) == (500.0, 500.0, True)
    assert result["latency_us"]["p50"] == 200.0
    assert result["slo"] is None


def test_verdicts_in_order_of_weight() -> None:
    good = figures()
    judge(good)
    slo = {"holds": False, "broken": ["p99 is 2 ms"]}
    with pytest.raises(SloError, match="p99 is 2 ms"):
        judge({**good, "slo": slo})
    with pytest.raises(FarfaultError, match="3 faults failed: IO_ERROR") as failed:
        judge({**good, "slo": slo, "errors": 3, "refusals": {"IO_ERROR": 3}})
    assert failed.value.exit_code == 1
    with pytest.raises(VerificationError):
        judge({**good, "slo": slo, "errors": 3, "verification_errors": 1})


def test_comparison_gives_ratios_and_says_what_is_not_alike(tmp_path: Path) -> None:
    import json

    earlier_path = tmp_path / "earlier.json"
    earlier_path.write_text("noise\n" + json.dumps(figures(latency_s=0.0004)) + "\n")
    compared = compare(figures(), read_earlier(earlier_path))
    assert compared["ratios"]["latency_us.p50"] == pytest.approx(0.5)
    assert compared["ratios"]["rate_pages_s"] == 1.0
    assert compared["differences"] == {}
    differs = compare(figures(rate_per_s=500.0), read_earlier(earlier_path))
    assert differs["differences"] == {"arrivals": [None, "constant"]}


@pytest.mark.parametrize("content", ["", "{}", "[1]", "text", '{"latency_us": 1, "rate_pages_s": 2}'])
def test_what_is_no_earlier_result(tmp_path: Path, content: str) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no earlier result"):
        read_earlier(path)


# ---- report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True])
def test_the_report_is_one_well_formed_file_that_loads_nothing(search: bool) -> None:
    result = figures(rate_per_s=500.0, search=search)
    result["compare"] = compare(result, figures(latency_s=0.0004))
    page = html_of(result)
    body = page.replace("<!doctype html>", "").replace('<meta charset="utf-8">', "")
    body = re.sub(r"<meta [^>]*>", "", body)
    root = ElementTree.fromstring(body)
    assert len(list(root.iter("svg"))) == (5 if search else 4)
    assert not re.search(r"https?://|src=|url\(|<script|<link|@import", page)
    assert "&lt;host&gt;:7777" in page
    assert "<host>" not in page
    assert "prefers-color-scheme: dark" in page
    for number in re.findall(r'(?:cx|cy|x1|y1)="([^"]+)"', page):
        assert 0 <= float(number) <= 600


def test_the_text_says_what_a_search_found() -> None:
    text = text_of(figures(rate_per_s=500.0, search=True))
    assert "p99 <= 1 ms: holds up to 500 pages/s (2 measurements)" in text
    assert "  broken" in text


@pytest.mark.parametrize(("us", "text"), [(87, "87 us"), (1240, "1.24 ms"), (2.5e6, "2.50 s")])
def test_times_for_people(us: float, text: str) -> None:
    assert microseconds(us) == text
    assert short_time(us).replace(" ", "") in {"87us", "1.24ms", "2.5s"}


def test_axes_cover_their_values_with_few_ticks() -> None:
    for high in (0.3, 1.0, 7.0, 99.0, 123_456.0):
        axis = linear_axis(0.0, high, str)
        assert axis.high >= high
        assert len(axis.ticks) <= 7
    for values in ([0.0], [5.0, 5.0], [90.0, 3e6], [1.0, 9e11]):
        axis = log_axis(values, str)
        assert axis.low < axis.high
        assert 1 <= len(axis.ticks) <= 13
        assert all(0.0 <= axis.position(value) <= 1.0 for value in values)
