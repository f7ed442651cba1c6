"""The sums of `--verify`, held against the digest of the whole, in whatever order and pieces pages come."""

from __future__ import annotations

import random

from farfault.digest import DIGEST_MODULUS, pages_digest
from farfault_client.engine import ExtentResult, FaultEngine
from farfault_client.engine.orders import Extent
from farfault_client.receive.digest import CHUNK_PAGES, RamDigest
from farfault_shim.layout import Layout, PageIndex, PageRun
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE, HUGE = 4096, 2 << 20
LAYOUT = Layout([((CHUNK_PAGES + 40) * PAGE, PAGE), (2 * HUGE, HUGE)])
EVERYTHING = PageRun(PageIndex(0), LAYOUT.page_count)


def content(first: int, count: int, size: int) -> bytes:
    """Pages that all differ."""
    return b"".join(random.Random(page).randbytes(64) * (size // 64) for page in range(first, first + count))


def expected(runs: list[PageRun], zero: set[int]) -> int:
    """The digest of pages, from their bytes."""
    total = 0
    for run in runs:
        region = LAYOUT.region_of_page(run.first)
        size = region.page_size_bytes
        for page in range(run.first, run.end):
            data = bytes(size) if page in zero else content(page, 1, size)
            total += pages_digest(data, page - region.first_page, size)
    return total % DIGEST_MODULUS


def settle(engine: FaultEngine, digest: RamDigest, run: PageRun, *, zero: bool = False) -> None:
    """A run that arrives and is installed."""
    region = LAYOUT.region_of_page(run.first)
    engine.fault("thread", list(map(PageIndex, range(run.first, run.end))), 1, 0.0)  # type: ignore[arg-type]
    request = engine.next_demand()
    while request is not None:
        result = ExtentResult.ZERO if zero else ExtentResult.DATA
        for order in engine.arrived([Extent(part, result) for part in request.runs], [request.request_id], 0.0):
            if not zero:
                digest.installed(order.run, content(order.run.first, order.run.count, region.page_size_bytes))
            engine.installed(order.run, zero=zero)
        request = engine.next_demand()


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_sum_does_not_depend_on_order_or_pieces(rng: random.Random) -> None:
    engine, digest = FaultEngine(LAYOUT), RamDigest(LAYOUT)
    near_border = range(CHUNK_PAGES - 10, CHUNK_PAGES + 10)
    runs = [PageRun(PageIndex(page), rng.randint(1, 3)) for page in rng.sample(near_border[::3], 5)]
    zero = {page for run in runs[:2] for page in range(run.first, run.end)}
    for index, run in enumerate(runs):
        settle(engine, digest, run, zero=index < 2)
    chunks = list(digest.chunks(engine.pages))
    assert sum(chunk.page_count for chunk in chunks) == sum(run.count for run in runs)
    for chunk in chunks:
        assert chunk.digest == expected(list(chunk.runs), zero)


def test_large_pages_count_within_their_region() -> None:
    engine, digest = FaultEngine(LAYOUT), RamDigest(LAYOUT)
    last = PageRun(PageIndex(LAYOUT.page_count - 1), 1)
    settle(engine, digest, last)
    (chunk,) = digest.chunks(engine.pages)
    assert chunk.region.index == 1
    assert chunk.digest == pages_digest(content(last.first, 1, HUGE), 1, HUGE)
    assert str(chunk) == "pages 0x1 to 0x1 of region 1"


def test_what_nobody_sent_is_left_out() -> None:
    engine, digest = FaultEngine(LAYOUT), RamDigest(LAYOUT)
    before, given_back = PageRun(PageIndex(0), 4), PageRun(PageIndex(8), 4)
    digest.leave_out(before)
    engine.present(before)
    digest.leave_out(given_back)
    engine.removed(given_back)
    engine.installed(PageRun(PageIndex(8), 1), zero=True)  # the guest touched it again
    assert list(digest.chunks(engine.pages)) == []


def test_what_came_before_it_was_given_back_counts() -> None:
    engine, digest = FaultEngine(LAYOUT), RamDigest(LAYOUT)
    run = PageRun(PageIndex(3), 2)
    settle(engine, digest, run)
    digest.leave_out(run)
    engine.removed(run)
    (chunk,) = digest.chunks(engine.pages)
    assert chunk.digest == expected([run], set())


def test_one_wrong_byte_or_place_changes_the_sum() -> None:
    data = content(5, 2, PAGE)
    sums = set()
    for run, bytes_installed in (
        (PageRun(PageIndex(5), 2), data),
        (PageRun(PageIndex(5), 2), data[:-1] + b"?"),
        (PageRun(PageIndex(6), 2), data),
        (PageRun(PageIndex(5), 2), data[PAGE:] + data[:PAGE]),
    ):
        engine, digest = FaultEngine(LAYOUT), RamDigest(LAYOUT)
        digest.installed(run, bytes_installed)
        (chunk,) = digest.chunks(engine.pages)
        sums.add(chunk.digest)
    assert len(sums) == 4
