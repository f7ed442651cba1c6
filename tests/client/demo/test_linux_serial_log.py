"""The console as a guest under QEMU writes it: CRLF, other text between, lines cut by a move."""

from __future__ import annotations

import pytest
from farfault_client.demo.linux import SerialLog, Tick, parse_serial

CONSOLE = (
    b"early noise\r\n"
    b"T 1 00000000000000ff bad=0\r\n"
    b"D 1 ok\r\n"
    b"T 2 0123456789abcdef bad=0\r\n"
    b"D 2 ok\r\n"
    b"T 3 fedcba9876543210 bad=0\r\n"
)


def test_ticks_and_disk_reads() -> None:
    log = parse_serial(CONSOLE)
    assert log.ticks == (Tick(1, 0xFF, 0), Tick(2, 0x0123456789ABCDEF, 0), Tick(3, 0xFEDCBA9876543210, 0))
    assert (log.last_tick, log.disk_reads_ok, log.disk_reads_bad, log.panic) == (3, 2, 0, "")
    assert log.problems == []


def test_nothing_yet() -> None:
    assert parse_serial(b"") == SerialLog()
    assert parse_serial(b"T 1 00000000000000ff bad=0") == SerialLog()  # the line is not complete
    assert SerialLog().last_tick == 0


@pytest.mark.parametrize("cut", range(len(CONSOLE)))
def test_a_move_may_cut_the_console_anywhere(cut: int) -> None:
    source, destination = CONSOLE[:cut], CONSOLE[cut:]
    assert parse_serial(source + destination) == parse_serial(CONSOLE)
    assert parse_serial(source).ticks == parse_serial(CONSOLE).ticks[: source.count(b"bad=0\r\n")]


@pytest.mark.parametrize(
    ("console", "problem"),
    [
        (b"T 1 00000000000000ff bad=0\nT 3 00000000000000ff bad=0\n", "tick 3 where 2 was due"),
        (b"T 1 00000000000000ff bad=0\nT 1 00000000000000ff bad=0\n", "tick 1 where 2 was due"),
        (b"T 1 00000000000000ff bad=5\n", "5 words of memory were found wrong"),
        (b"D 1 ok\nD 2 BAD\n", "1 reads of the disk were wrong"),
        (b"[ 1.0] Kernel panic - not syncing: Fatal\r\n", "kernel died: Kernel panic - not syncing: Fatal"),
    ],
)
def test_problems(console: bytes, problem: str) -> None:
    (found,) = parse_serial(console).problems
    assert problem in found
