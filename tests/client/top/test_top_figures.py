from __future__ import annotations

import json

from farfault.v1 import receiver_pb2 as rpb
from farfault_client.top.figures import figures_of
from farfault_client.top.map import ABSENT, INSTALLED, MOVING, ZERO, resample
from top_status import make_status


def test_rates_are_differences_over_time() -> None:
    before = make_status(settled=1000, faults=10, demand_bytes=4096, blocked_s=1.0)
    after = make_status(settled=3000, faults=30, demand_bytes=12288, blocked_s=1.5)

    figures = figures_of(after, before, 2.0)

    assert figures.faults_per_s == 10
    assert figures.moved_bytes_per_s == 1000 * 4096
    assert figures.lanes[0].bytes_per_s == 4096
    assert figures.vcpus[0].blocked_share == 0.25
    assert figures.progress == 3000 / 65536


def test_the_first_look_has_no_rates() -> None:
    figures = figures_of(make_status(settled=1000, faults=10), None, 0.0)

    assert (figures.faults_per_s, figures.moved_bytes_per_s, figures.lanes[0].bytes_per_s) == (0, 0, 0)


def test_a_receiver_that_was_started_anew_shows_no_negative_rates() -> None:
    figures = figures_of(make_status(settled=10, faults=1), make_status(settled=1000, faults=99), 1.0)

    assert (figures.faults_per_s, figures.moved_bytes_per_s) == (0, 0)


def test_reconnects_are_all_connects_but_the_first() -> None:
    figures = figures_of(make_status(connects=3), None, 0.0)

    assert [lane.reconnects for lane in figures.lanes] == [2, 2]


def test_json_says_who_waits_for_what() -> None:
    fields = json.loads(json.dumps(figures_of(make_status(waiting_s=0.25, waiting_page=0x123), None, 0.0).to_json()))

    assert fields["vcpus"]["0"]["waiting_page"] == 0x123
    assert fields["vcpus"]["1"]["waiting_page"] is None
    assert fields["phase"] == "postcopy"


def test_an_empty_status_has_figures() -> None:
    assert figures_of(rpb.MigrationStatus(), None, 0.0).progress == 0


def test_resampling_keeps_what_moves() -> None:
    cells = bytes([INSTALLED] * 99 + [MOVING] + [ABSENT] * 60 + [ZERO] * 40)

    assert resample(cells, 2) == bytes([MOVING, ABSENT])
    assert resample(cells, 200) == cells
    assert resample(bytes([INSTALLED, ABSENT]), 4) == bytes([INSTALLED, INSTALLED, ABSENT, ABSENT])
    assert resample(b"", 3) == bytes(3)


def test_a_wait_counts_while_it_lasts() -> None:
    before = make_status(blocked_s=1.0, waiting_s=0.5)

    figures = figures_of(make_status(blocked_s=1.0, waiting_s=1.5), before, 1.0)

    assert figures.vcpus[0].blocked_s == 2.5
    assert figures.vcpus[0].blocked_share == 1.0
