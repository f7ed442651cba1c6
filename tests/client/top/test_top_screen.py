from __future__ import annotations

import io
from dataclasses import replace
from typing import IO, cast

import pytest
from farfault.v1 import receiver_pb2 as rpb
from farfault_client.top.figures import Figures, figures_of
from farfault_client.top.screen import screen
from rich.console import Console
from top_status import make_status


class Terminal(io.StringIO):
    def __init__(self, encoding: str) -> None:
        super().__init__()
        self.name_of_encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.name_of_encoding


def draw(figures: Figures, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    terminal = Terminal(encoding)
    console = Console(file=cast(IO[str], terminal), width=width, height=height, force_terminal=True, no_color=True)
    console.print(screen(figures, console, "/run/ff.ctl"))
    return [line.rstrip() for line in _without_escapes(terminal.getvalue()).splitlines()]


def _without_escapes(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def busy(vcpus: int = 2) -> Figures:
    status = make_status(settled=40_000, faults=5000, blocked_s=1.4, waiting_s=0.002, waiting_page=0x1A2B, vcpus=vcpus)
    return figures_of(status, make_status(settled=30_000, faults=4000, blocked_s=1.0, vcpus=vcpus), 1.0)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (60, 20), (120, 30), (200, 50), (80, 50)])
@pytest.mark.parametrize("vcpus", [0, 1, 2, 64])
def test_a_frame_fits_its_terminal(width: int, height: int, vcpus: int) -> None:
    lines = draw(busy(vcpus), width, height)

    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 15)


def test_80x24_shows_everything() -> None:
    text = "\n".join(draw(busy(), 80, 24))

    for words in ("post-copy", "61.0%", "1,000/s", "p99 4.62 ms", "express", "process", "ETA 3.2 s", "slow faults 0"):
        assert words in text
    assert "page 0x1a2b for 2.00 ms" in text
    assert "in flight" in text


def test_vcpus_that_do_not_fit_are_counted() -> None:
    text = "\n".join(draw(busy(64), 80, 24))

    assert "page 0x1a2b" in text, "the one that waits is shown"
    assert "that wait less" in text


def test_a_terminal_without_utf_8_gets_ascii() -> None:
    lines = draw(busy(), 80, 24, "ascii")

    assert all(line.isascii() for line in lines)


def test_an_outage_is_said() -> None:
    status = make_status(settled=10)
    status.connected = False

    assert "out of reach: faults wait" in "\n".join(draw(figures_of(status, None, 0.0), 80, 24))


def test_a_failed_move_shows_its_reason() -> None:
    status = make_status(phase=rpb.PHASE_FAILED)
    status.error = "the destination VMM has exited"
    figures = replace(figures_of(status, None, 0.0))

    assert "the destination VMM has exited" in "\n".join(draw(figures, 80, 24))
