from __future__ import annotations

import json
from pathlib import Path

import pytest
from farfault_cli.errors import UsageError
from farfault_client.report.reading import parse_record, read_record
from farfault_client.report.timeline import BINS_MAX, Timeline
from record_lines import header, move_lines, sample


def test_counters_become_differences() -> None:
    record = parse_record("move", move_lines())

    assert sum(found.faults for found in record.samples) == 60
    assert [found.faults for found in record.samples[:3]] == [0, 1, 1]
    assert record.samples[1].bytes == {"demand": 4096, "background": 64000}
    assert record.end == 3.0


def test_a_last_line_that_is_cut_is_left_out() -> None:
    lines = move_lines()[:10]

    record = parse_record("move", [*lines, lines[-1][:20]])

    assert len(record.samples) == 8
    assert record.summary == {}


def test_a_second_receiver_counts_from_zero_again_and_comes_later() -> None:
    first = [json.dumps(header()), *(json.dumps(sample(index)) for index in range(11))]
    second = [json.dumps(header(1.75e9 + 5)), *(json.dumps(sample(index)) for index in range(11))]

    record = parse_record("move", first + second)

    assert record.receivers == 2
    assert record.end == 5.5
    assert sum(found.faults for found in record.samples) == 20
    assert all(found.faults >= 0 for found in record.samples)
    assert [event.text for event in record.events] == ["another receiver took the move up"]


def test_a_wait_that_outlives_a_receiver_is_counted_where_it_was_waited() -> None:
    """The VMM counts a wait at its end, and goes on counting whoever receives."""
    first = [json.dumps(header()), *(json.dumps(sample(index)) for index in range(21))]
    last = sample(20)["blocked_s"]
    second = [
        json.dumps(header(1.75e9 + 5)),
        json.dumps({**sample(0), "blocked_s": {}}),
        json.dumps({**sample(1), "blocked_s": {"0": last["0"] + 3.5, "1": last["1"]}}),
    ]

    timeline = Timeline(parse_record("move", first + second))

    shares = [seconds / timeline.bin_s for seconds in timeline.blocked_s["0"]]
    assert sum(timeline.blocked_s["0"]) == pytest.approx(last["0"] + 3.5)
    assert max(shares) <= 1.0 + 1e-9
    assert shares[timeline.bins // 2] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text",
    ["", "not json\n", "[]\n", '{"type": "sample"}\n', '{"type": "header", "version": 99}\n', "{}\n{}\n", "x\n{}\n"],
)
def test_what_is_no_record_is_a_usage_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)

    with pytest.raises(UsageError, match="not a record"):
        read_record(path)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_record(tmp_path / "none")


def test_a_timeline_loses_nothing() -> None:
    timeline = Timeline(parse_record("move", move_lines()))

    assert sum(timeline.faults) == pytest.approx(60)
    assert sum(timeline.bytes["background"]) == pytest.approx(60 * 64000)
    assert sum(timeline.blocked_s["0"]) == pytest.approx(0.6)
    assert sum(sum(counted.values()) for counted in timeline.latency) == 60
    assert timeline.settled[-1] == 1024
    assert timeline.maps[-1] == "9" * 128


def test_a_sample_that_is_longer_than_a_bin_is_spread() -> None:
    lines = [json.dumps(header()), json.dumps(sample(0)), json.dumps({**sample(60), "t": 30.0})]

    timeline = Timeline(parse_record("move", lines))

    assert timeline.bins == BINS_MAX
    assert timeline.faults == pytest.approx([60 / BINS_MAX] * BINS_MAX)
