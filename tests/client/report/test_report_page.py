from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from farfault_client.report.command import report
from farfault_client.report.page import page_of
from farfault_client.report.reading import parse_record
from record_lines import SUMMARY, header, move_lines

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
VOID = {"meta", "br"}
DARK, LIGHT = 0, 1
PAPER = {DARK: (0x14, 0x17, 0x1C), LIGHT: (0xFF, 0xFF, 0xFF)}


class Balance(HTMLParser):
    """Fails at a tag that closes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_well_formed(page: str) -> None:
    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = page_of(parse_record("move", move_lines()))

    check_well_formed(page)
    assert "<script" not in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    assert "http" not in page
    assert len(page) < 300_000


def test_the_page_says_how_it_went() -> None:
    page = page_of(parse_record("move", move_lines()))

    assert "Moved: every page is on the destination." in page
    assert "31.6 ms" in page
    assert "&lt;b&gt;reset&lt;/b&gt;" in page, "text of the record is no markup"
    assert page.count("<figure>") == 8


def test_a_failed_move_says_why() -> None:
    failed = {**SUMMARY, "phase": "failed", "error": "the VMM has exited", "remedy": "see its log"}

    page = page_of(parse_record("move", move_lines(summary=failed)))

    assert "Failed: the VMM has exited. Remedy: see its log." in page


def test_slow_faults_are_part_of_the_verdict() -> None:
    page = page_of(parse_record("move", move_lines(summary={**SUMMARY, "slow_faults": 3})))

    assert "3 faults took longer than 1 s" in page


def test_a_record_that_breaks_off_gives_a_page() -> None:
    page = page_of(parse_record("move", move_lines()[:-1]))

    check_well_formed(page)
    assert "The record breaks off after 3.0 s" in page


def test_a_record_without_samples_gives_a_page() -> None:
    check_well_formed(page_of(parse_record("move", [json.dumps(header())])))


def test_many_vcpus_are_rows() -> None:
    page = page_of(parse_record("move", move_lines(vcpus=64)))

    assert "vCPU 60" in page
    check_well_formed(page)


def test_the_command_writes_next_to_the_record(tmp_path: Path) -> None:
    record = tmp_path / "move.jsonl"
    record.write_text("\n".join(move_lines()) + "\n")

    report.main([str(record)], standalone_mode=False)

    assert (tmp_path / "move.html").read_text().startswith("<!doctype html>")


def chromium(tmp_path: Path, page: str, *flags: str, scheme: int = LIGHT, width: int = 1280) -> str:
    assert CHROMIUM is not None
    file = tmp_path / "page.html"
    file.write_text(page)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},800", *flags]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@needs_chromium
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_sticks_out(tmp_path: Path, width: int) -> None:
    """At both widths no text of a chart leaves its picture, and the page does not scroll sideways."""
    probe = """<script>
      const out = [];
      if (document.documentElement.scrollWidth > innerWidth) out.push("page " + document.documentElement.scrollWidth);
      for (const text of document.querySelectorAll("svg text")) {
        const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
        if (box.left < frame.left - 1 || box.right > frame.right + 1) out.push(text.textContent);
      }
      document.title = "outside: " + out.join("; ");
    </script></body>"""
    page = page_of(parse_record("move", move_lines())).replace("</body>", probe)

    dom = chromium(tmp_path, page, "--dump-dom", width=width)

    assert re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1].strip() == "outside:"  # type: ignore[index]


@needs_chromium
@pytest.mark.parametrize("scheme", [DARK, LIGHT])
def test_the_page_follows_the_colour_scheme(tmp_path: Path, scheme: int) -> None:
    picture = tmp_path / "page.png"

    chromium(tmp_path, page_of(parse_record("move", move_lines())), f"--screenshot={picture}", scheme=scheme)

    assert first_pixel(picture.read_bytes()) == PAPER[scheme]


def first_pixel(png: bytes) -> tuple[int, int, int]:
    """Of an 8-bit RGB or RGBA picture: whatever its filter is, the first pixel of the first line is stored as it is."""
    data, at = b"", 8
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    line = zlib.decompress(data)
    return line[1], line[2], line[3]
