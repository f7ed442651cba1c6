"""Plays one plan with real processes, as an operator's supervisor would: what died is started again. Then judges."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chaos_plan import ChaosFault, Plan, Target
from farfault_cli.errors import FarfaultError
from faulty_move import FaultyMove

RUN_S_MAX = 150.0
"""A partition of 10 s, twice, and everything else on a busy machine."""
POLL_S = 0.005
RESTARTS_MAX = 20
RETRY_S = 1.0
RUN_MARK = "FARFAULT_CHAOS_RUN"
LOG_TAIL_BYTES = 6000

EXIT_DONE, EXIT_REFUSED, EXIT_ROLLED_BACK, EXIT_GUEST_WAITS, EXIT_UNREACHABLE = 0, 3, 4, 5, 6


@dataclass(slots=True)
class Result:
    """What became of one migration.

    Attributes:
        outcome: ``moved``, ``rolled back``, ``refused``, ``lost with its VMM``; or ``FAILED``.
        problem: why it failed.
        injected: faults that came to their moment.
        took_s: in all.
        receivers: that were started.
        logs: the last words of everybody, of a failed one.
    """

    seed: int
    outcome: str = "FAILED"
    problem: str = ""
    injected: list[ChaosFault] = field(default_factory=list)
    took_s: float = 0.0
    receivers: int = 1
    logs: str = ""


def play(plan: Plan) -> Result:
    """One migration, from its start to its verdict; everything is ended and removed."""
    result = Result(plan.seed)
    folder = Path(tempfile.mkdtemp(prefix="ff-chaos-"))
    os.environ[RUN_MARK] = str(folder)
    began = time.monotonic()
    try:
        with FaultyMove(plan.config, folder, rtt_ms=plan.rtt_ms, seed=plan.seed) as move:
            try:
                move.start()
                move.begin()
                result.outcome = Supervisor(move, plan, result).run()
            except (FarfaultError, AssertionError) as error:
                result.problem = str(error).splitlines()[0] if str(error) else repr(error)
                result.logs = _logs(folder)
        left = [command for _, command in processes_of(folder)]
        if left and not result.problem:
            result.outcome, result.problem = "FAILED", f"processes left behind: {left}"
    finally:
        result.took_s = time.monotonic() - began
        shutil.rmtree(folder, ignore_errors=True)
    return result


class Supervisor:
    """Injects what is due, starts again what died, and says how it ended."""

    def __init__(self, move: FaultyMove, plan: Plan, result: Result) -> None:
        self._move = move
        self._result = result
        self._waiting = list(plan.faults)
        self._seen_at: dict[str, float] = {}
        self._due: list[tuple[float, str, str]] = []  # when, "start" or "continue", what
        self._vmms_killed: set[str] = set()
        self._phase_at_kill = ""
        self._ask_after = 0.0

    def run(self) -> str:
        """Until the move has ended; returns the outcome.

        Raises:
            AssertionError: a promise was broken.
        """
        deadline = time.monotonic() + RUN_S_MAX
        while time.monotonic() < deadline:
            self._observe()
            self._ask_again()
            self._inject_due()
            self._obey_due()
            code = self._receiver_code()
            if code is not None and not self._goes_on(code):
                return self._judge(code)
            time.sleep(POLL_S)
        raise AssertionError(f"not over within {RUN_S_MAX:g} s; receiver {self._move.receiver_step()!r}")

    def _observe(self) -> None:
        self._seen_at.setdefault(self._move.receiver_step(), time.monotonic())

    def _ask_again(self) -> None:
        """A move that had not begun when it was interrupted waits for its operator, while the source runs."""
        move = self._move
        if move.is_alive("migrate") or not move.is_alive("receive") or not move.scene.control.exists():
            return
        if move.receiver_step() == "opened" and time.monotonic() >= self._ask_after:
            self._ask_after = time.monotonic() + RETRY_S
            move.begin()

    def _inject_due(self) -> None:
        now = time.monotonic()
        for fault in list(self._waiting):
            # A step may pass unseen between two looks; those after it say that it was.
            seen_at = self._seen_at.get(fault.step)
            if seen_at is not None and now >= seen_at + fault.after_s:
                self._waiting.remove(fault)
                self._inject(fault)

    def _inject(self, fault: ChaosFault) -> None:
        self._result.injected.append(fault)
        if fault.target is Target.NETWORK:
            self._move.proxy.tell(fault.what)
            return
        for name in fault.what.split("+"):
            if fault.target is Target.PAUSE:
                paused = self._signal(name, signal.SIGSTOP)
                self._due += [(time.monotonic() + fault.for_s, "continue", str(pid)) for pid in paused]
            else:
                self._kill(name, fault.for_s)

    def _kill(self, name: str, back_after_s: float) -> None:
        move = self._move
        if name in ("bulk", "background"):
            self._signal(name, signal.SIGKILL)
        elif move.is_alive(name):
            move.kill(name)
            if name in ("serve", "receive"):
                self._due.append((time.monotonic() + back_after_s, "start", name))
            elif name in ("source", "destination"):
                self._vmms_killed.add(name)
                self._phase_at_kill = move.server_phase()

    def _signal(self, name: str, number: signal.Signals) -> list[int]:
        """To a part, or to the helper process of one. Returns the processes that were there."""
        owner = {"bulk": "receive", "background": "serve"}.get(name, name)
        if not self._move.is_alive(owner):
            return []
        pid = self._move.processes.pid(owner)
        pids = [pid] if owner == name else _children(pid)
        for number_of_process in pids:
            _send(number_of_process, number)
        return pids

    def _obey_due(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._due if entry[0] <= now]:
            self._due.remove(entry)
            if entry[1] == "continue":
                _send(int(entry[2]), signal.SIGCONT)
            else:
                self._start(entry[2])

    def _start(self, name: str) -> None:
        """As systemd would: again after a while where it cannot start yet."""
        assert self._result.receivers < RESTARTS_MAX, "started too often"
        self._result.receivers += name == "receive"
        try:
            self._move.restart(name)
        except FarfaultError:
            # A receiver may end at once: its move is rolled back. Its exit code says which, below.
            if name == "serve":
                assert "source" in self._vmms_killed, (
                    f"the page server does not start:\n{self._move.processes.tail(name)}"
                )

    def _receiver_code(self) -> int | None:
        processes = self._move.processes
        return processes.exit_code("receive") if "receive" in processes.names() else None

    def _goes_on(self, code: int) -> bool:
        """A receiver that ended because nobody answers is started again; so is one whose server is being started."""
        if code != EXIT_UNREACHABLE or self._move.receiver_step() == "" or "source" in self._vmms_killed:
            return False
        self._move.kill("receive")
        self._due.append((time.monotonic() + RETRY_S, "start", "receive"))
        return True

    # ---- the verdict ---------------------------------------------------------------------------------

    def _judge(self, code: int) -> str:
        self._settle()
        move, scene = self._move, self._move.scene
        if code == EXIT_DONE:
            stopped_at = scene.counter(scene.source)
            scene.wait_for_progress(stopped_at)
            move.assert_right(scene.destination)
            assert scene.counter(scene.source) == stopped_at, "the source ran after the hand-over"
            assert move.server_phase() == "completed", move.server_phase()
            self._assert_stopped("source")
            return "moved"
        if self._vmms_killed:
            return self._judge_lost(code)
        assert code in (EXIT_ROLLED_BACK, EXIT_REFUSED, EXIT_UNREACHABLE), f"the receiver ended with exit code {code}"
        move.assert_source_runs()
        return "rolled back" if code == EXIT_ROLLED_BACK else "refused"

    def _judge_lost(self, code: int) -> str:
        """A VMM was killed: its VM is gone only if it was its owner; it must not run twice, and the reason be told."""
        if self._vmms_killed == {"destination"} and self._phase_at_kill not in ("handed over", "completed"):
            if self._move.server_phase() == "running":
                self._move.assert_source_runs()
                return "rolled back"
            assert code == EXIT_GUEST_WAITS, code  # it was handed over in the same moment
        for name in ("source", "destination"):
            self._assert_stopped(name)
        return "lost with its VMM"

    def _settle(self) -> None:
        """Everything that was killed or paused is back before the judgement."""
        for _, act, name in sorted(self._due):
            if act == "continue":
                _send(int(name), signal.SIGCONT)
            elif name == "serve":
                self._start(name)
        self._due.clear()

    def _assert_stopped(self, name: str) -> None:
        move = self._move
        if name == "source" and "serve" in move.processes.names():
            move.processes.end("serve")
        move.assert_stands_still(name)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def processes_of(folder: Path) -> Iterator[tuple[int, str]]:
    """Process ids and command lines of what a run in this folder started and still lives."""
    mark = f"{RUN_MARK}={folder}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(entry.name), command


def _logs(folder: Path) -> str:
    parts = []
    for path in sorted(folder.glob("*.log")):
        parts.append(f"--- {path.stem}\n{path.read_text(errors='replace')[-LOG_TAIL_BYTES:]}")
    return "\n".join(parts)
