"""The working set of a guest: kept once a page, in order, and refused where it is of another guest."""

from __future__ import annotations

from pathlib import Path

import pytest
from farfault_cli.errors import UsageError
from farfault_client.receive import working_set
from farfault_client.receive.working_set import WorkingSet, read_hints, runs_of, write_hints
from farfault_shim.layout import PageIndex, PageRun
from hypothesis import given
from hypothesis import strategies as st


def run(first: int, count: int) -> PageRun:
    return PageRun(PageIndex(first), count)


def test_pages_that_follow_one_another_make_a_run() -> None:
    found = WorkingSet()
    for page in (7, 8, 9, 3, 4, 20):
        found.missed(page)
    assert list(runs_of(found.pack())) == [run(7, 3), run(3, 2), run(20, 1)]


@given(st.lists(st.integers(0, 99), unique=True))
def test_every_page_comes_back_in_order(pages: list[int]) -> None:
    found = WorkingSet()
    for page in pages:
        found.missed(page)
    assert [page for part in runs_of(found.pack()) for page in range(part.first, part.end)] == pages


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_set, "PAGES_MAX", 3)
    found = WorkingSet()
    for page in range(10):
        found.missed(page)
    assert list(runs_of(found.pack())) == [run(0, 3)]


def test_hints_are_written_and_read(tmp_path: Path) -> None:
    path, runs = tmp_path / "hints", [run(7, 3), run(3, 2)]
    assert write_hints(path, 100, runs) == 5
    assert read_hints(path, 100) == runs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no working set"),
        ("something else\n1 2\n", "no working set"),
        ("# farfault working set 1\n# pages 99\n1 2\n", "guest of 99 pages"),
        ("# farfault working set 1\n# pages 100\n1\n", "line 3"),
        ("# farfault working set 1\n# pages 100\n1 0\n", "line 3"),
        ("# farfault working set 1\n# pages 100\n99 2\n", "line 3"),
        ("# farfault working set 1\n# pages 100\n-1 2\n", "line 3"),
    ],
)
def test_what_is_no_working_set_of_this_guest_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "hints"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_hints(path, 100)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing"):
        read_hints(tmp_path / "nothing", 100)
