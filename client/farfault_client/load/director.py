"""Carries out a load test: one measurement, or a search for the highest rate that holds an objective."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from farfault_cli.errors import UsageError

from farfault_client.load.crew import Crew
from farfault_client.load.figures import Setup, figures_of
from farfault_client.load.live import Show, live_table
from farfault_client.load.measurement import Measurement
from farfault_client.load.plan import Arrivals, PatternPlan, RunPlan, ServerPlan, WorkerPlan
from farfault_client.load.slo import Objective, RateSearch, broken
from farfault_client.load.tally import Tally

START_DELAY_S = 0.1
"""All workers must have read their plan by then."""
SHOW_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What the command line asks for; the fields are those of the plans, and:

    Attributes:
        is_seed_given: the seed is the user's and not the default.
        objectives: that the result is judged by.
        is_search: find the highest rate that holds them.
        rate_first_per_s, rate_last_per_s, tries: of the search.
    """

    server: ServerPlan
    pattern: PatternPlan
    memory_seed: int
    is_seed_given: bool
    vcpus: int
    connections: int
    processes: int
    pages_per_request: int
    background: bool
    background_bytes_per_s: int
    rate_per_s: float | None
    arrivals: Arrivals
    warmup_s: float
    duration_s: float
    pages_max: int
    objectives: tuple[Objective, ...]
    is_search: bool
    rate_first_per_s: float
    rate_last_per_s: float
    tries: int

    @property
    def is_open_loop(self) -> bool:
        return self.is_search or self.rate_per_s is not None or self.arrivals is Arrivals.RECORDED

    def workers(self) -> list[WorkerPlan]:
        """One plan for each process; the background's last."""
        plans = [
            WorkerPlan(
                self.server,
                self.pattern,
                vcpus=tuple(range(process, self.vcpus, self.processes)),
                vcpus_total=self.vcpus,
                process=process,
                processes=self.processes,
                connections=share(self.connections, process, self.processes),
                memory_seed=self.memory_seed,
                pages_per_request=self.pages_per_request,
            )
            for process in range(self.processes)
        ]
        if self.background:
            plans.append(
                WorkerPlan(
                    self.server,
                    memory_seed=self.memory_seed,
                    background=True,
                    background_bytes_per_s=self.background_bytes_per_s,
                )
            )
        return plans

    def runs(self, rate_per_s: float | None, start_at: float) -> list[RunPlan]:
        """One plan for each worker."""
        return [
            RunPlan(
                start_at,
                self.warmup_s,
                self.duration_s,
                rate_per_s=rate_per_s / self.processes if rate_per_s is not None else None,
                arrivals=self.arrivals,
                pages_max=share(self.pages_max, process % self.processes, self.processes),
            )
            for process in range(self.processes + self.background)
        ]


def share(total: int, index: int, count: int) -> int:
    """One of `count` near-equal parts of a number."""
    return total * (index + 1) // count - total * index // count


def direct(test: LoadTest, *, quiet: bool) -> tuple[dict[str, Any], Sequence[Measurement]]:
    """Runs the test; returns its figures and all its measurements.

    Raises:
        FarfaultError: the server cannot be reached or refuses, or a worker failed.
    """
    return asyncio.run(Director(test, quiet=quiet).direct())


class Director:
    """See `direct`."""

    def __init__(self, test: LoadTest, *, quiet: bool) -> None:
        self._test = test
        self._quiet = quiet
        self._is_told_to_end = False
        self._steps: list[Measurement] = []

    async def direct(self) -> tuple[dict[str, Any], Sequence[Measurement]]:
        """Runs the test."""
        test = self._test
        async with Crew(test.workers()) as crew:
            self._check(crew)
            self._end_on_signals(crew)
            with live_table(enabled=not self._quiet) as show:
                search = await self._search(crew, show) if test.is_search else None
                if search is None:
                    await self._measure(crew, test.rate_per_s, show)
            return figures_of(self._setup(crew), self._best(), test.objectives, search, self._steps), self._steps

    def _check(self, crew: Crew) -> None:
        backings = {backing for ready in crew.ready for backing in ready["backing"]}
        if self._test.is_seed_given and backings != {"synthetic"}:
            raise UsageError(
                f"--seed was given, but the server's memory is {'+'.join(sorted(backings))}",
                "leave --seed out: pages are then verified by their checksum",
            )

    def _end_on_signals(self, crew: Crew) -> None:
        def end() -> None:
            self._is_told_to_end = True
            crew.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)

    async def _search(self, crew: Crew, show: Show) -> RateSearch:
        test = self._test
        search = RateSearch(test.rate_first_per_s, test.rate_last_per_s, tries=test.tries)
        while not self._is_told_to_end and (rate := search.next_rate()) is not None:
            measured = await self._measure(crew, rate, show)
            search.tell(holds=not measured.broken)
            if any(end["wrong_pages"] or end["bad_answers"] for end in measured.ends):
                break  # a faster wrong answer is worth nothing
        return search

    async def _measure(self, crew: Crew, rate_per_s: float | None, show: Show) -> Measurement:
        test = self._test
        start_at = time.monotonic() + START_DELAY_S
        measurement = Measurement(rate_per_s, start_at + test.warmup_s, test.duration_s)
        self._steps.append(measurement)
        title = f"measurement {len(self._steps)}: " + (
            f"{rate_per_s:,.0f} faults/s" if rate_per_s is not None else f"{test.vcpus} vCPUs"
        )
        shown_at = 0.0

        def on_tally(worker: int, tally: Tally) -> None:
            nonlocal shown_at
            measurement.add(tally, is_background=worker == test.processes)
            if tally.faults and time.monotonic() - shown_at > SHOW_INTERVAL_S:
                show(measurement, title)
                shown_at = time.monotonic()

        measurement.ends = await crew.run(test.runs(rate_per_s, start_at), on_tally)
        measurement.broken = broken(test.objectives, measurement.total) if test.objectives else []
        return measurement

    def _best(self) -> Measurement:
        """The measurement that the figures are of."""
        holding = [step for step in self._steps if not step.broken]
        if not self._test.is_search or not holding:
            return self._steps[-1]
        return max(holding, key=lambda step: step.rate_per_s or 0.0)

    def _setup(self, crew: Crew) -> Setup:
        test = self._test
        return Setup(
            target=test.server.target,
            servers=crew.ready,
            pattern=test.pattern,
            arrivals=test.arrivals,
            rate_per_s=test.rate_per_s,
            vcpus=sum(ready["vcpus"] for ready in crew.ready),
            connections=test.connections,
            processes=test.processes,
            warmup_s=test.warmup_s,
            duration_s=test.duration_s,
            background=test.background,
            open_loop=test.is_open_loop,
        )
