"""The worker processes of a load test, as the command sees them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from farfault_cli.errors import FarfaultError, error_of_exit_code

from farfault_client.load.plan import DRAIN_S_MAX, RunPlan, WorkerPlan, to_json
from farfault_client.load.tally import Tally

LINE_BYTES_MAX = 1 << 20
READY_TIMEOUT_S = 60.0
LATE_S_MAX = 30.0
"""A run may take this much longer than planned, draining apart, before its workers count as hung."""
CLOSE_TIMEOUT_S = 10.0

OnTally = Callable[[int, Tally], None]
"""Called with the worker's number and what it counted since its last tally."""


class Crew:
    """Starts workers, lets them measure, ends them. Use as an async context manager.

    Args:
        plans: one for each worker.
    """

    def __init__(self, plans: Sequence[WorkerPlan]) -> None:
        self._plans = plans
        self._processes: list[asyncio.subprocess.Process] = []
        self.ready: list[dict[str, Any]] = []

    async def __aenter__(self) -> Crew:
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _start(self) -> None:
        for _ in self._plans:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "farfault_client.load.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
            )
            self._processes.append(process)
        for process, plan in zip(self._processes, self._plans, strict=True):
            _tell(process, {"worker": to_json(plan)})
        async with asyncio.timeout(READY_TIMEOUT_S):
            self.ready = [(await _hear(process))["ready"] for process in self._processes]

    async def run(self, plans: Sequence[RunPlan], on_tally: OnTally) -> list[dict[str, Any]]:
        """One measurement by all workers.

        Args:
            plans: one for each worker.
            on_tally: called as tallies come.

        Returns:
            What each worker says at the end.

        Raises:
            FarfaultError: a worker failed, died or hangs.
        """
        for process, plan in zip(self._processes, plans, strict=True):
            _tell(process, {"run": to_json(plan)})
        ends_at = max(plan.start_at + plan.warmup_s + plan.duration_s for plan in plans)
        patience_s = ends_at - time.monotonic() + DRAIN_S_MAX + LATE_S_MAX
        faulting = [index for index, plan in enumerate(self._plans) if not plan.background]
        others = [index for index, plan in enumerate(self._plans) if plan.background]
        ends: dict[int, dict[str, Any]] = {}

        async def follow(index: int) -> None:
            ends[index] = await self._follow(index, on_tally)

        async def follow_all() -> None:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(follow(index)) for index in range(len(self._plans))]
                await asyncio.wait([tasks[index] for index in faulting])
                for index in others:  # nothing is left to be beside
                    _tell(self._processes[index], {"stop": True})

        try:
            async with asyncio.timeout(patience_s):
                await follow_all()
        except TimeoutError:
            raise FarfaultError(f"a worker does not answer {LATE_S_MAX:g} s after the end of its run") from None
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return [ends[index] for index in range(len(self._plans))]

    def stop(self) -> None:
        """Ends the run early; `run` returns as usual."""
        for process in self._processes:
            _tell(process, {"stop": True})

    async def close(self) -> None:
        """Ends all workers."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._processes.clear()

    async def _follow(self, index: int, on_tally: OnTally) -> dict[str, Any]:
        while True:
            message = await _hear(self._processes[index])
            if "end" in message:
                end: dict[str, Any] = message["end"]
                return end
            on_tally(index, Tally.from_json(message["tally"]))


def _tell(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")


async def _hear(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise FarfaultError(f"worker process {process.pid} died", "its last words are above")
    message: dict[str, Any] = json.loads(line)
    if "error" in message:
        error = message["error"]
        raise error_of_exit_code(error["exit_code"], error["problem"], error["remedy"])
    return message


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
