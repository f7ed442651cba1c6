"""Mistakes that somebody might make one day, each as a part that replaces the real one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from farfault.checksum import checksum_of
from farfault.codec import DecodedBatch
from farfault_client.engine import Extent, ExtentResult, FaultAnswer, FaultEngine, Fetch, Install, PageState, Priority
from farfault_client.engine.states import PageInput
from farfault_client.session import answers
from farfault_client.session.answers import Answer, verify
from farfault_shim.layout import Layout, PageIndex, PageRun
from sim_receiver import Parts


class NoDedupe(FaultEngine):
    """A fault on a page in flight fetches it once more."""

    def fault(self, key: object, pages: Sequence[PageIndex], priority: Priority, now: float) -> FaultAnswer:
        for page in pages:
            if self.pages.state(page) is PageState.IN_FLIGHT:
                self.pages.apply(page, 1, PageInput.LOSE)
        return super().fault(key, pages, priority, now)


class NoClip(FaultEngine):
    """Whatever arrives is installed."""

    def arrived(self, extents: Iterable[Extent], done: Iterable[int], now: float) -> list[Install]:
        extents = list(extents)
        super().arrived(extents, done, now)
        installs, offset = [], 0
        for run, result in extents:
            if result is ExtentResult.DATA:
                installs.append(Install(run, offset))
                offset += run.count * self.layout.region_of_page(run.first).page_size_bytes
        return installs


class ForgetsRemovals(FaultEngine):
    """Pages that the guest gave back are fetched like any other."""

    def removed(self, run: PageRun) -> list[PageIndex]:
        zero = super().removed(run)
        for page in set(range(run.first, run.end)) - set(zero):
            if self.pages.state(page) is PageState.REMOVED:
                self.pages._bytes[page] = 0
                self.pages._totals[PageState.REMOVED] -= 1
                self.pages._totals[PageState.ABSENT] += 1
        return zero


class LosesFaults(FaultEngine):
    """A lost request takes the wishes for its pages with it."""

    def _lose(self, run: PageRun) -> None:
        self.pages.apply(run.first, run.count, PageInput.LOSE_IDLE)


class BelievesDone(FaultEngine):
    """A request that is called done is done, whatever came."""

    def _finish_request(self, request_id: int, now: float) -> None:
        fetch = self._in_flight.pop(request_id, None)
        if fetch is not None and self._departures.pop(request_id, None) is not None:
            self._background_in_flight_bytes -= fetch.size_bytes


class NoWindow(FaultEngine):
    """The background asks for everything at once."""

    def next_background(self, now: float) -> Fetch | None:
        in_flight_bytes, self._background_in_flight_bytes = self._background_in_flight_bytes, 0
        fetch = super().next_background(now)
        self._background_in_flight_bytes += in_flight_bytes
        return fetch


class TwoRequestsForAFault(FaultEngine):
    """The short way of a fault does not tell the long way that its page was asked for."""

    def lone_fault(self, key: object, page: PageIndex, priority: Priority, now: float) -> Fetch | None:
        fetch = super().lone_fault(key, page, priority, now)
        if fetch is not None:
            self.pages.apply(page, 1, PageInput.LOSE)
            self._demand[priority].add(key, page)
        return fetch


class BackgroundFirst(FaultEngine):
    """Faults are asked for after the background has had its turn."""

    def next_demand(self) -> Fetch | None:
        return super().next_demand() if not self._departures else None


class WakesEarly(FaultEngine):
    """A thread goes on when its page was sent, not when it is there; the rest wait for ever."""

    def installed(self, run: PageRun, **how: Any) -> list[Any]:
        woken = super().installed(run, **how)
        return woken[1:] if len(woken) > 1 else woken


class BelievesPlaced(FaultEngine):
    """What the bulk process says that it has installed is there, whatever the guest did since."""

    def placed(self, run: PageRun, *, existed: bool = False) -> list[Any]:
        return super().installed(run, existed=existed)


def any_length(decoded: DecodedBatch, layout: Layout, generation: int) -> Answer:
    """Accepts data of a wrong length."""
    expected = sum(
        extent.page_count * layout.regions[extent.region].page_size_bytes
        for extent in decoded.header.extents
        if extent.kind == 0 and extent.region < len(layout.regions) and extent.page_count < 4096
    )
    data = bytes(decoded.data)[:expected].ljust(expected, b"\xee")
    header = type(decoded.header)()
    header.CopyFrom(decoded.header)
    if checksum_of(header, decoded.data) == header.checksum:
        header.checksum = checksum_of(header, data)
    return verify(DecodedBatch(header, data, 0, len(data)), layout, generation)


def any_generation(decoded: DecodedBatch, layout: Layout, generation: int) -> Answer:
    """Accepts the memory of a VM that ran on."""
    return verify(decoded, layout, decoded.header.generation)


def any_checksum(decoded: DecodedBatch, layout: Layout, generation: int) -> Answer:
    """Accepts corrupted data."""
    decoded.header.checksum = checksum_of(decoded.header, decoded.data)
    return verify(decoded, layout, generation)


def any_page(decoded: DecodedBatch, layout: Layout, generation: int) -> Answer:
    """Accepts pages that do not exist."""
    answer = verify(
        decoded._replace(header=type(decoded.header)(generation=decoded.header.generation), data_length=0),
        layout,
        generation,
    )
    extents = [
        Extent(
            PageRun(PageIndex(part.first_page), part.page_count), answers._RESULTS.get(part.kind, ExtentResult.REFUSED)
        )
        for part in decoded.header.extents
    ]
    return answer._replace(
        extents=extents,
        data=decoded.buffer,
        data_offset=decoded.data_offset,
        done=tuple(decoded.header.done_request_ids),
    )


GOOD = Parts()
BUGS: dict[str, Parts] = {
    "no dedupe": replace(GOOD, engine=NoDedupe),
    "no clip": replace(GOOD, engine=NoClip, to_install=lambda engine, run: [run] if run.count > 0 else []),
    "forgets removals": replace(GOOD, engine=ForgetsRemovals),
    "loses faults": replace(GOOD, engine=LosesFaults),
    "believes done": replace(GOOD, engine=BelievesDone),
    "no window": replace(GOOD, engine=NoWindow),
    "two requests for a fault": replace(GOOD, engine=TwoRequestsForAFault),
    "installs a lone page that was removed meanwhile": replace(GOOD, awaits=lambda engine, fetch: True),
    "background first": replace(GOOD, engine=BackgroundFirst),
    "wakes one of two": replace(GOOD, engine=WakesEarly),
    "any length": replace(GOOD, verify=any_length),
    "any generation": replace(GOOD, verify=any_generation),
    "any checksum": replace(GOOD, verify=any_checksum),
    "any page": replace(GOOD, verify=any_page),
    "installs what was removed meanwhile": replace(GOOD, to_install=lambda engine, run: [run] if run.count > 0 else []),
    "places what was removed meanwhile": replace(GOOD, may_place=lambda engine, page: True),
    "believes that placed pages are there": replace(GOOD, engine=BelievesPlaced),
    "takes every page for resident": replace(GOOD, resident=lambda guest: range(guest.layout.page_count)),
}
