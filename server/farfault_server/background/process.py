"""The parent's side: starts the child, keeps it informed, starts it again when it dies."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_server.background.wire import LINE_BYTES_MAX, Message, descriptors, pack, regions_to_json
from farfault_server.lanes.stats import LaneStats
from farfault_server.leases.keeper import LeaseKeeper
from farfault_server.leases.store import book_to_json
from farfault_server.memory import PageRegion

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 20.0
START_ATTEMPTS_MAX: Final = 5
START_PAUSE_S: Final = 0.3
ACKNOWLEDGE_TIMEOUT_S: Final = 2.0
"""A child that has not taken up a change by then is killed: it must not serve under an old record."""
STOP_TIMEOUT_S: Final = 2.0
RESTARTS_MAX: Final = 5
"""Deaths in a row, each within `HEALTHY_S` of the start, before the lane stays on the main port."""
HEALTHY_S: Final = 60.0
RESTART_PAUSE_S: Final = 0.2
"""Before the first restart; doubles with each death in a row."""


@dataclass(slots=True)
class BackgroundProcess:
    """The child. `start`, then `stop`.

    Attributes:
        keeper: whose record the child follows.
        host, port: to listen on; 0: any, which stays the same over restarts.
        express_port: likewise for frames without gRPC; None: not offered.
        tls: directory of the TLS files.
        log_level, json_logs: how the child logs.
        is_up: clients may connect to `port`.
        is_given_up: it died too often and is not started again.
        stats: what all children so far have counted.
        lease_ids: leases that have streams in the child.
    """

    keeper: LeaseKeeper
    host: str
    port: int = 0
    express_port: int | None = None
    tls: Path | None = None
    log_level: str = "info"
    json_logs: bool = False
    is_up: bool = False
    is_given_up: bool = False
    lease_ids: Sequence[str] = ()
    _dead_stats: LaneStats = field(default_factory=LaneStats)
    _last_stats: Message | None = None
    _process: asyncio.subprocess.Process | None = None
    _writer: asyncio.StreamWriter | None = None
    _number: int = 0
    _acknowledged: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _supervisor: asyncio.Task[None] | None = None

    @property
    def regions(self) -> Sequence[PageRegion]:
        return self.keeper.memory.regions

    @property
    def stats(self) -> LaneStats:
        total = LaneStats()
        total.add_json(self._dead_stats.to_json())
        if self._last_stats is not None:
            total.add_json(self._last_stats)
        return total

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Starts the child and waits until it serves. The child of a server that was just killed may hold the port
        for a moment longer, so a refusal is not taken at once.

        Raises:
            FarfaultError: it does not start; the message has its reason.
        """
        for attempt in range(START_ATTEMPTS_MAX):
            try:
                ended = await self._spawn()
                break
            except FarfaultError:
                if attempt == START_ATTEMPTS_MAX - 1:
                    raise
                await asyncio.sleep(START_PAUSE_S)
        self._supervisor = asyncio.create_task(self._supervise(ended), name="supervise background process")

    async def publish(self) -> None:
        """Returns when the child serves under the record as it is now, or is dead."""
        if self._writer is None:
            return
        self._number += 1
        number = self._number
        future = self._acknowledged[number] = asyncio.get_running_loop().create_future()
        self._writer.write(pack({"number": number, **self._record()}))
        try:
            async with asyncio.timeout(ACKNOWLEDGE_TIMEOUT_S):
                await future
        except TimeoutError:
            logger.error("the background process did not take up a change of leases in time: killed")
            self._kill()
        finally:
            self._acknowledged.pop(number, None)

    async def stop(self) -> None:
        """Ends the child."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._kill()
                await self._process.wait()
        self.is_up = False

    # ---- within ----------------------------------------------------------------------------------

    def _record(self) -> Message:
        return {"book": book_to_json(self.keeper.book), "readable": self.keeper.memory.readable}

    async def _spawn(self) -> asyncio.Task[None]:
        """Returns the task that listens to the new child and ends with it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "farfault_server.background.child",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno(), *descriptors(self.regions)],
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES_MAX)
        writer.write(
            pack(
                {
                    "regions": regions_to_json(self.regions),
                    "host": self.host,
                    "port": self.port,
                    "express_port": self.express_port,
                    "tls": str(self.tls) if self.tls is not None else None,
                    "log_level": self.log_level,
                    "json_logs": self.json_logs,
                    **self._record(),
                }
            )
        )
        self._writer = writer  # changes from here on follow the first message
        ready: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        listening = asyncio.create_task(self._listen(reader, writer, ready), name="listen to background process")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self.port, express_port = await ready
                self.express_port = express_port or None
        except TimeoutError:
            self._kill()
            raise FarfaultError("the background process did not start in time", "use --no-background-process") from None
        self.is_up = True
        return listening

    async def _listen(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: asyncio.Future[tuple[int, int]]
    ) -> None:
        try:
            while line := await reader.readline():
                self._hear(json.loads(line), ready)
        except OSError:
            pass  # a killed child ends like one that closed its end
        finally:
            self._forget(writer, ready)

    def _hear(self, message: Message, ready: asyncio.Future[tuple[int, int]]) -> None:
        if "port" in message and not ready.done():
            ready.set_result((message["port"], message["express_port"]))
        if "error" in message and not ready.done():
            problem, _, remedy = message["error"].partition("\n  remedy: ")
            ready.set_exception(FarfaultError(f"background process: {problem}", remedy))
        if "stats" in message:
            self._last_stats = message["stats"]
            self.lease_ids = message["leases"]
            for lease_id in self.lease_ids:
                self.keeper.saw(lease_id)
        future = self._acknowledged.get(message.get("acknowledged", 0))
        if future is not None and not future.done():
            future.set_result(None)

    def _forget(self, writer: asyncio.StreamWriter, ready: asyncio.Future[tuple[int, int]]) -> None:
        """The child is gone: nobody waits for it any longer, and its counters are kept."""
        writer.close()
        self._writer = None
        self.is_up = False
        self.lease_ids = ()
        if self._last_stats is not None:
            self._dead_stats.add_json({**self._last_stats, "streams": 0})
            self._last_stats = None
        if not ready.done():
            ready.set_exception(FarfaultError("the background process ended at once", "see its output in the log"))
        for future in self._acknowledged.values():
            if not future.done():
                future.set_result(None)

    async def _supervise(self, listening: asyncio.Task[None]) -> None:
        deaths = 0
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            await asyncio.shield(listening)
            assert self._process is not None
            self._kill()  # it cannot be told anything any more
            code = await self._process.wait()
            deaths = 1 if loop.time() - started_s > HEALTHY_S else deaths + 1
            if deaths > RESTARTS_MAX:
                self.is_given_up = True
                logger.error("the background process died %d times: Background stays on the main port", deaths)
                return
            logger.warning("the background process ended (%d): starting it again", code)
            await asyncio.sleep(RESTART_PAUSE_S * 2 ** (deaths - 1))
            with suppress(FarfaultError):
                listening = await self._spawn()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
