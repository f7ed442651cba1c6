"""Patterns, the Zipf sampler and traces."""

import random
from collections import Counter

import pytest
from farfault_cli.errors import UsageError
from farfault_client.load.patterns import coprime_step, pattern_for
from farfault_client.load.plan import PatternKind, PatternPlan
from farfault_client.load.present import PresentPages
from farfault_client.load.trace import parse_trace
from farfault_client.load.vcpus import HITS_IN_A_ROW_MAX, Vcpus
from farfault_client.load.zipf import ZipfRanks


def first_pages(kind: PatternKind, count: int, *, page_count: int = 100, vcpu: int = 0, total: int = 1) -> list[int]:
    pattern = pattern_for(PatternPlan(kind=kind, stride_pages=10), page_count, vcpu, total)
    return [pattern.next_page() or 0 for _ in range(count)]


def test_sequential_vcpus_share_the_memory_and_go_round() -> None:
    assert first_pages(PatternKind.SEQUENTIAL, 3, vcpu=1, total=4) == [25, 26, 27]
    assert first_pages(PatternKind.SEQUENTIAL, 3, page_count=2) == [0, 1, 0]


@pytest.mark.parametrize("page_count", [97, 100])
def test_stride_covers_every_page_once_a_turn(page_count: int) -> None:
    assert first_pages(PatternKind.STRIDE, 3) == [0, 10, 20]
    assert sorted(first_pages(PatternKind.STRIDE, page_count, page_count=page_count)) == list(range(page_count))


@pytest.mark.parametrize("kind", [PatternKind.RANDOM, PatternKind.ZIPF])
def test_random_patterns_repeat_with_their_seed_and_differ_between_vcpus(kind: PatternKind) -> None:
    pages = first_pages(kind, 200)
    assert pages == first_pages(kind, 200)
    assert pages != first_pages(kind, 200, vcpu=1, total=2)
    assert all(0 <= page < 100 for page in pages)


@pytest.mark.parametrize("exponent", [0.5, 0.99, 1.0, 1.7])
def test_zipf_ranks_are_as_frequent_as_the_law_says(exponent: float) -> None:
    draws, count = 40_000, 50
    ranks = ZipfRanks(count, exponent, random.Random(3).random)
    seen = Counter(ranks.draw() for _ in range(draws))
    weights = [rank**-exponent for rank in range(1, count + 1)]
    for rank, weight in enumerate(weights, 1):
        expected = draws * weight / sum(weights)
        assert abs(seen[rank] - expected) < 5 * expected**0.5 + 5, rank
    assert set(seen) <= set(range(1, count + 1))


@pytest.mark.parametrize("count", [1, 2, 4096, 12345])
def test_hot_pages_are_spread_by_a_permutation(count: int) -> None:
    step = coprime_step(count)
    assert len({rank * step % count for rank in range(count)}) == count


def test_hits_are_no_faults_and_a_run_never_stands_still() -> None:
    vcpus = Vcpus(PatternPlan(kind=PatternKind.SEQUENTIAL), 1000, [0], 1)
    present = PresentPages(1000)
    for page in range(900):
        present.add(page)
    assert vcpus.next_page(0, present) == 900
    assert vcpus.hits == HITS_IN_A_ROW_MAX


def test_present_pages() -> None:
    present = PresentPages(3)
    present.add(1)
    present.add(1)
    assert 1 in present
    assert present.next_absent(1) == 2
    present.add(2)
    assert present.next_absent(1) == 0
    present.add(0)
    assert present.is_complete
    assert present.next_absent(0) is None
    present.clear()
    assert not present.is_complete


# ---- traces ------------------------------------------------------------------------------------------


def test_both_trace_forms_mean_the_same() -> None:
    text = parse_trace(["# seconds vcpu page", "", "5.0 0 17", "5.5 1 0x20 w"], "t")
    objects = parse_trace(
        ['{"seconds": 5.0, "vcpu": 0, "page": 17}', '{"seconds": 5.5, "vcpu": 1, "page": 32, "write": true}'], "t"
    )
    for trace in (text, objects):
        assert list(trace.seconds) == [0.0, 0.5]
        assert list(trace.vcpus) == [0, 1]
        assert list(trace.pages) == [17, 32]
        assert list(trace.writes) == [0, 1]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["1 0"], "line 1: 2 columns"),
        (["1 0 7 x"], "neither r nor w"),
        (["1 0 7", "0.5 0 7"], "line 2: time -0.5 comes after a later one"),
        (["1 -1 7"], "out of range"),
        (["nan 0 7"], "line 1"),
        (["{}"], "seconds"),
        (["# nothing"], "holds no access"),
    ],
)
def test_a_bad_trace_is_told_with_its_line(lines: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_trace(lines, "t")


def test_a_share_of_a_trace_keeps_its_vcpus_and_times() -> None:
    trace = parse_trace([f"{second} {second % 3} {second}" for second in range(9)], "t")
    part = trace.share(1, 2)
    assert list(part.seconds) == [1.0, 4.0, 7.0]
    assert set(part.vcpus) == {1}
    assert trace.share(0, 1) is trace


def test_an_open_loop_follows_a_trace_access_by_access_and_a_closed_one_vcpu_by_vcpu() -> None:
    trace = parse_trace(["0 5 1 w", "1 5 1", "2 9 3"], "t")
    vcpus = Vcpus(PatternPlan(kind=PatternKind.REPLAY), 100, [], 1, trace)
    assert len(vcpus) == 2
    present = PresentPages(100)
    assert vcpus.next_page(0, present, is_open_loop=True) == 1
    assert vcpus.was_write(0)
    present.add(1)
    assert vcpus.next_page(0, present, is_open_loop=True) is None, "a hit"
    turns = []
    while (turn := vcpus.in_turn()) is not None:
        turns.append(turn)
        vcpus.advance_turn()
    assert turns == [0, 0, 1]
    vcpus.rewind()
    assert vcpus.next_page(0, None) == 1
    assert vcpus.next_page(0, None) == 1
    assert vcpus.next_page(0, None) is None
    assert not vcpus.is_exhausted
    assert [vcpus.next_page(1, None), vcpus.next_page(1, None)] == [3, None]
    assert vcpus.is_exhausted
