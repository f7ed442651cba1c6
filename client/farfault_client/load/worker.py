"""One worker process of a load test: ``python -m farfault_client.load.worker``.

Plans come as JSON lines on standard input, in this order: one ``{"worker": WorkerPlan}``; then any number of
``{"run": RunPlan}``, in which ``{"stop": true}`` ends the run early. On standard output it says ``{"ready": ...}``,
``{"tally": ...}`` several times a second, ``{"end": ...}`` after each run, or ``{"error": ...}`` and exits. It ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import FarfaultError, UnreachableError
from farfault_shim.layout import Layout

from farfault_client.load.background import BackgroundPull
from farfault_client.load.faults import Ending, FaultLoad
from farfault_client.load.plan import (
    DRAIN_S_MAX,
    Arrivals,
    PatternKind,
    RunPlan,
    ServerPlan,
    WorkerPlan,
    from_json,
)
from farfault_client.load.schedule import ConstantRate, PoissonRate, Recorded, Schedule
from farfault_client.load.timer import Timer
from farfault_client.load.trace import Trace, read_trace
from farfault_client.load.vcpus import Vcpus
from farfault_client.load.verifier import SeedVerifier
from farfault_client.session.answers import Answer, LonePage, Placed
from farfault_client.session.connect import session_config
from farfault_client.session.lane import Lane
from farfault_client.session.session import Session, SessionConfig

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 15.0
RELEASE_TIMEOUT_S = 3.0
TALLY_INTERVAL_S = 0.25
POLL_S = 0.005
LINE_BYTES_MAX = 1 << 20
FETCHABLE = {pb.VM_STATE_FROZEN, pb.VM_STATE_HANDED_OVER, pb.VM_STATE_COMPLETED}


def now_s() -> float:
    """CLOCK_MONOTONIC, the same in all processes of the host."""
    return time.monotonic()


def say(kind: str, value: object) -> None:
    """One line to the command."""
    sys.stdout.write(json.dumps({kind: value}) + "\n")
    sys.stdout.flush()


class Connection:
    """A session and what it carries: a `LaneUser`.

    Args:
        worker: that it belongs to.
        index: among the worker's connections.
    """

    def __init__(self, worker: Worker, index: int, session: Session) -> None:
        self.session = session
        self._worker = worker
        self._index = index

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        load = self._worker.load
        return load.next_request(self._index) if load is not None else None

    def placed(self, lane: Lane, placed: Placed) -> None:
        raise AssertionError("no pages are shared, so nobody else places them")

    def answered(self, lane: Lane, answer: Answer) -> None:
        load = self._worker.load
        if load is not None:
            load.answered(self._index, answer, now_s())
            self._worker.go_on()

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        return None  # every request is given out by `next_request`

    def lane_lost(self, lane: Lane) -> None:
        load = self._worker.load
        if load is not None:
            load.lane_lost(self._index)


class Worker:
    """Runs what it is told; see the module.

    Args:
        plan: what it is.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan = plan
        self.load: FaultLoad | BackgroundPull | None = None
        self._lane = Lane.BACKGROUND if plan.background else Lane.DEMAND
        self._connections: list[Connection] = []
        self._trace: Trace | None = None
        self._verifier: SeedVerifier | None = None
        self._timer = Timer(self._time_has_come)
        self._progress = asyncio.Event()

    # ---- connections -----------------------------------------------------------------------------

    async def connect(self) -> dict[str, Any]:
        """Opens a clone lease for each connection; returns what the server is.

        Raises:
            FarfaultError: it refuses, or its VM still runs.
            UnreachableError: it does not answer within `CONNECT_TIMEOUT_S`.
        """
        for index in range(self.plan.connections):
            session = Session(_session_config(self.plan.server))
            self._connections.append(Connection(self, index, session))
            await session.open()
        opened = self._connections[0].session.opened
        lease = self._connections[0].session.lease
        assert opened is not None
        assert lease is not None
        if opened.vm_state not in FETCHABLE:
            raise FarfaultError(
                f"the VM behind {self.plan.server.target} runs: its memory cannot be fetched yet",
                "load a snapshot or `farfault serve --synthetic`, or start after the move's switchover",
            )
        self._prepare(lease.layout, opened)
        for connection in self._connections:
            connection.session.start(connection, (self._lane,))
        await self._until_connected()
        return {
            "backing": sorted({region.backing for region in opened.regions}),
            "regions": [[region.size_bytes, region.page_size_bytes] for region in opened.regions],
            "server_version": opened.server_version,
            "carrier": sorted({self._stats(connection).carrier for connection in self._connections}),
            "vcpus": self.load.vcpu_count if isinstance(self.load, FaultLoad) else 0,
            "verified_by": "seed" if self._verifier is not None else "checksum",
        }

    def _prepare(self, layout: Layout, opened: pb.OpenResponse) -> None:
        plan = self.plan
        if plan.memory_seed is not None and all(region.backing == "synthetic" for region in opened.regions):
            self._verifier = SeedVerifier(plan.memory_seed, layout)
        if plan.background:
            self.load = BackgroundPull(layout, plan.background_bytes_per_s, self._verifier)
            return
        if plan.pattern.kind is PatternKind.REPLAY:
            self._trace = read_trace(Path(plan.pattern.trace)).share(plan.process, plan.processes)
        limits = opened.limits
        self.load = FaultLoad(
            layout,
            Vcpus(plan.pattern, layout.page_count, plan.vcpus, plan.vcpus_total, self._trace),
            connections=plan.connections,
            requests_max=limits.max_requests_in_flight or 1,
            pages_per_request=min(plan.pages_per_request, limits.max_request_pages or 1),
            refetch=plan.pattern.refetch,
            verifier=self._verifier,
        )

    async def _until_connected(self) -> None:
        deadline = now_s() + CONNECT_TIMEOUT_S
        while not all(self._stats(connection).carrier for connection in self._connections):
            for connection in self._connections:
                if connection.session.error is not None:
                    raise connection.session.error
            if now_s() > deadline:
                raise UnreachableError(
                    f"no {self._lane.value} lane to {self.plan.server.target} within {CONNECT_TIMEOUT_S:g} s",
                    "check the firewall between the hosts, or give --no-express",
                )
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Gives the leases back and ends the connections."""
        self._timer.close()
        for connection in self._connections:
            await connection.session.close()  # its lanes first: they would miss the lease
            if connection.session.lease is not None:
                await _release(connection.session)

    def _stats(self, connection: Connection) -> Any:
        return connection.session.stats.lanes[self._lane]

    # ---- a run -----------------------------------------------------------------------------------

    async def run(self, run: RunPlan, stop: asyncio.Event) -> dict[str, Any]:
        """One measurement; tallies are said on the way, what is left is returned."""
        load, verifier = self.load, self._verifier
        assert load is not None
        before = self._counters()
        if verifier is not None:
            verifier.wrong = verifier.verified = 0
            verifier.problems.clear()
        measured_from = run.start_at + run.warmup_s
        until = measured_from + run.duration_s
        await asyncio.sleep(max(0.0, run.start_at - now_s()))
        if isinstance(load, BackgroundPull):
            load.begin(now_s(), measured_from=measured_from, until=until)
        else:
            load.begin(
                now_s(),
                measured_from=measured_from,
                until=until,
                schedule=self._schedule(run),
                pages_max=run.pages_max,
            )
        self.go_on()
        await self._watch(load, stop)
        load.end(now_s())
        say("tally", load.take_tally(load.measured_until).to_json())
        return {**_delta(self._counters(), before), **self._verdict(load)}

    async def _watch(self, load: FaultLoad | BackgroundPull, stop: asyncio.Event) -> None:
        """Until nothing waits any more, or `DRAIN_S_MAX` after the last fault."""
        drain_until = float("inf")
        next_tally = max(load.tally.started_at, now_s()) + TALLY_INTERVAL_S
        while not load.is_drained:
            now = now_s()
            if stop.is_set():
                load.stop(Ending.TOLD)
            for connection in self._connections:
                if connection.session.error is not None:
                    raise connection.session.error
            if load.ended_by is not None:
                drain_until = min(drain_until, now + DRAIN_S_MAX)
                if now >= drain_until:
                    return
            if now >= next_tally:
                say("tally", load.take_tally(now).to_json())
                next_tally = max(next_tally + TALLY_INTERVAL_S, now)
            self._progress.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TALLY_INTERVAL_S / 4):
                    await self._progress.wait()

    def go_on(self) -> None:
        """After anything has happened: next faults, and what they make the lanes send."""
        load = self.load
        assert load is not None
        load.resume(now_s())
        for connection in load.take_wakeups():
            self._connections[connection].session.pump(self._lane)
        self._timer.set(load.next_due())
        if load.is_drained:
            self._progress.set()

    def _time_has_come(self) -> None:
        assert self.load is not None
        self.load.advance(now_s())
        self.go_on()

    def _schedule(self, run: RunPlan) -> Schedule | None:
        if run.arrivals is Arrivals.RECORDED:
            assert self._trace is not None
            return Recorded(run.start_at, self._trace, self.plan.pattern.trace_speed)
        if run.rate_per_s is None:
            return None
        # Workers take turns, so that together they keep an even rate.
        start = run.start_at + self.plan.process / (run.rate_per_s * self.plan.processes)
        if run.arrivals is Arrivals.POISSON:
            source = random.Random(f"farfault load arrivals {self.plan.pattern.random_seed} {self.plan.process}")
            return PoissonRate(start, run.rate_per_s, source)
        return ConstantRate(start, run.rate_per_s)

    def _counters(self) -> dict[str, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        stats = [self._stats(connection) for connection in self._connections]
        return {
            "wire_bytes": sum(lane.wire_bytes for lane in stats),
            "connects": sum(lane.connects for lane in stats),
            "bad_answers": sum(lane.bad_answers for lane in stats),
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }

    def _verdict(self, load: FaultLoad | BackgroundPull) -> dict[str, Any]:
        verifier = self._verifier
        return {
            "ended_by": load.ended_by.value if load.ended_by is not None else "",
            "hits": load.hits,
            "refusals": dict(load.refusals),
            "wrong_pages": verifier.wrong if verifier is not None else 0,
            "verified_pages": verifier.verified if verifier is not None else 0,
            "problems": verifier.problems[:] if verifier is not None else [],
        }


async def _release(session: Session) -> None:
    """Gives a lease back; where that fails the server forgets it some time after."""
    try:
        stub = pages_pb2_grpc.PageServiceStub(session.control_channel())
        await stub.Release(pb.ReleaseRequest(), metadata=session.lease_metadata(), timeout=RELEASE_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        logger.info("the lease was not given back: %s", error.details())
    finally:
        await session.close()


def _delta(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in after.items()}


def _session_config(server: ServerPlan) -> SessionConfig:
    return session_config(
        server.target,
        tls=Path(server.tls) if server.tls else None,
        insecure=server.insecure,
        admission_token_file=Path(server.admission_token_file) if server.admission_token_file else None,
        express=server.express,
        name=server.name,
        kind=pb.LEASE_KIND_CLONE,
    )


async def serve() -> None:
    """Obeys standard input until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", closefd=False))
    line = await reader.readline()
    if not line:
        return
    worker = Worker(from_json(WorkerPlan, json.loads(line)["worker"]))
    running: asyncio.Task[None] | None = None
    stop = asyncio.Event()
    try:
        say("ready", await worker.connect())
        while line := await reader.readline():
            message = json.loads(line)
            if "stop" in message:
                stop.set()
            else:
                stop.clear()
                if running is not None:
                    await running
                running = loop.create_task(_run(worker, from_json(RunPlan, message["run"]), stop))
    except FarfaultError as error:
        _fail(error)
    finally:
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await worker.close()


async def _run(worker: Worker, run: RunPlan, stop: asyncio.Event) -> None:
    try:
        say("end", await worker.run(run, stop))
    except FarfaultError as error:
        _fail(error)


def _fail(error: FarfaultError) -> None:
    say("error", {"exit_code": error.exit_code, "problem": error.problem, "remedy": error.remedy})


def main() -> None:
    """Entry point of the process."""
    import uvloop

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the command's to handle
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with contextlib.suppress(BrokenPipeError):  # the command is gone
        uvloop.run(serve())


if __name__ == "__main__":
    main()
