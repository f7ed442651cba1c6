"""The whole system from one seed: ``python tests/sim/simulation.py FIRST END`` runs a range of them."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass

from farfault_client.engine import PageState
from farfault_shim.layout import Layout, PageRun
from sim_clock import Clock
from sim_guest import Guest
from sim_receiver import Parts, Receiver
from sim_source import Network, Server, Trouble

PAGE = 4096
HEAL_S = 4.0
"""Within this time after the last trouble everything is done."""
WAIT_MAX_S = 1.5
"""No fault waits longer than this once the trouble is over."""
CONTENTS = [bytes([page % 251 + 1, page // 251 + 1, 7, 9]) * (PAGE // 4) for page in range(64)]


@dataclass
class Outcome:
    """What runs were like, for figures."""

    runs: int = 0
    events: int = 0
    bad_answers: int = 0
    crashes: int = 0
    faults: int = 0
    longest_wait_s: float = 0.0

    def add(self, other: Outcome) -> None:
        self.runs += other.runs
        self.events += other.events
        self.bad_answers += other.bad_answers
        self.crashes += other.crashes
        self.faults += other.faults
        self.longest_wait_s = max(self.longest_wait_s, other.longest_wait_s)


class Simulation:
    """One run.

    Args:
        seed: decides everything.
        parts: the code under test.
    """

    def __init__(self, seed: int, parts: Parts | None = None) -> None:
        self.rng = rng = random.Random(seed)
        self.parts = parts or Parts()
        self.clock = Clock()
        first, second = rng.randint(2, 24), rng.randint(2, 16)
        self.layout = Layout([(first * PAGE, PAGE), (second * PAGE, PAGE)])
        source = [content if rng.random() < 0.8 else bytes(PAGE) for content in CONTENTS[: self.layout.page_count]]
        self.trouble = Trouble.of(rng)
        self.server = Server(self.layout, source, rng, self.trouble, self.clock)
        self.network = Network(self.clock, rng, self.server, self.trouble)
        self.guest = Guest(self.clock, rng, self.layout, source)
        self.removed_log: list[PageRun] = []
        self.crashes = 0
        self.bad_answers = 0
        self.faults = 0
        self.generation = self.server.generation
        self.receiver = self._new_receiver()

    def run(self) -> Outcome:
        """Raises AssertionError where something did not hold."""
        rng, clock = self.rng, self.clock
        self.guest.start()
        self.receiver.start()
        if self.trouble.ends_at:
            for _ in range(rng.choice((0, 0, 1, 2))):
                clock.after(rng.random() * self.trouble.ends_at, self._crash_receiver)
            for _ in range(rng.choice((0, 0, 1, 2))):
                clock.after(rng.random() * self.trouble.ends_at, self._crash_server)
            for _ in range(rng.choice((0, 0, 1, 3))):
                clock.after(rng.random() * self.trouble.ends_at, self.network.break_all)
        clock.run(self._is_done, self.trouble.ends_at + HEAL_S)
        self._check_at_end()
        return Outcome(
            runs=1,
            events=clock.events,
            bad_answers=self.bad_answers + self.receiver.bad_answers,
            crashes=self.crashes,
            faults=self.faults + self.receiver.engine.stats.demand_faults,
            longest_wait_s=self.guest.longest_wait_s,
        )

    def run_with_another_generation(self) -> None:
        """The source VM ran while the receiver was away: nothing of its memory is installed from then on."""
        self.guest.start()
        self.receiver.start()
        self.clock.after(0.004, self._source_runs)
        self.clock.run(lambda: self.clock.now > 1.0 or self._is_done(), 2.0)
        for page, content in self.guest.kernel.pages.items():
            assert content == self.guest.expected[page], f"page {page} is of another generation"

    def _source_runs(self) -> None:
        self.server.generation += 1
        self.server.memory = [b"\xaa" * PAGE] * self.layout.page_count

    def _is_done(self) -> bool:
        receiver = self.receiver
        return receiver.is_alive and receiver.engine.finished and self.guest.done and not self.guest.kernel.removals

    def _new_receiver(self) -> Receiver:
        return Receiver(self.clock, self.rng, self.guest, self.network, self.parts, self.removed_log, self.generation)

    def _crash_receiver(self) -> None:
        if not self.receiver.is_alive:
            return
        self.crashes += 1
        self.bad_answers += self.receiver.bad_answers
        self.faults += self.receiver.engine.stats.demand_faults
        self.receiver.crash()
        self.clock.after(self.rng.random() * 0.05, self._restart_receiver)

    def _restart_receiver(self) -> None:
        self.receiver = self._new_receiver()
        self.receiver.start()

    def _crash_server(self) -> None:
        self.server.is_up = False
        self.network.break_all()
        self.clock.after(self.rng.random() * 0.05, self._restart_server)

    def _restart_server(self) -> None:
        self.server.is_up = True

    def _check_at_end(self) -> None:
        engine, guest = self.receiver.engine, self.guest
        guest.check_at_end()
        assert guest.longest_wait_s <= self.trouble.ends_at + WAIT_MAX_S, f"a fault waited {guest.longest_wait_s} s"
        assert engine.waiting == []
        for page in range(self.layout.page_count):
            state = engine.pages.state(page)
            assert state in (PageState.INSTALLED, PageState.REMOVED)
            # A removed page may be there: two removals in one go, and a thread that waited got its zeros in between.
            assert state is PageState.REMOVED or page in guest.kernel.pages, f"page {page} is not there"
            assert guest.kernel.installs_by_page.get(page, 0) <= 1, f"page {page} was installed twice"


def replay(seed: int, parts: Parts | None = None) -> Outcome:
    """Runs a seed; a failure names it and says how to see it again."""
    try:
        simulation = Simulation(seed, parts)
        if seed % 16 == 0:
            Simulation(seed, parts).run_with_another_generation()
        return simulation.run()
    except AssertionError as error:
        error.add_note(f"seed {seed}: FARFAULT_SIM_SEED={seed} pytest tests/sim -k replay")
        raise


def main(first: int, end: int) -> None:
    """Runs seeds; prints figures as JSON."""
    total = Outcome()
    for seed in range(first, end):
        total.add(replay(seed))
    print(json.dumps(asdict(total)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
