"""What a receiver must remember over its own death: the lease, and how far the move has come.

A record is on disk before it is acted on: written to a new file, synced, renamed, folder synced.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from farfault_cli.errors import UsageError

from farfault_client.session.lease import LeaseKey


class Step(StrEnum):
    """How far a move has come; each is written before the act that it names, RUNNING after it."""

    OPENED = "opened"
    SUSPENDING = "suspending"
    HANDING_OVER = "handing over"
    """The point of no return lies in this step, and the start of the VM; the page server's record decides on which side
    of it."""
    RUNNING = "running"
    WRONG = "found wrong"
    """`--verify` found a difference: the move is never completed."""
    COMPLETED = "completed"
    ROLLED_BACK = "rolled back"


STEPS_WITH_VM_HERE = frozenset({Step.HANDING_OVER, Step.RUNNING, Step.WRONG, Step.COMPLETED})
"""Steps in which a VMM on this host may hold the VM."""


@dataclass(frozen=True, slots=True)
class Record:
    """One journal entry."""

    step: Step
    target: str
    lease_id: str
    token: str
    generation: int

    @property
    def lease(self) -> LeaseKey:
        return LeaseKey(self.lease_id, self.token, self.generation)

    @property
    def vm_may_be_here(self) -> bool:
        """A VMM on this host may hold the VM: after a restart the receiver waits for it."""
        return self.step in STEPS_WITH_VM_HERE


class Journal:
    """The journal file of one receiver.

    Args:
        directory: made if missing, mode 0700.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "receiver.json"
        self._lock = -1
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.record: Record | None = self._load()

    @property
    def vm_may_be_here(self) -> bool:
        """As the record says; False where there is none."""
        return self.record is not None and self.record.vm_may_be_here

    def lock(self) -> None:
        """Keeps every other receiver out until `unlock` or our end, and reads the record anew.

        Raises:
            UsageError: another receiver uses the folder; it may be in the middle of the very same move.
        """
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise UsageError(
                f"another receiver uses the state folder {self.directory}",
                "each move needs a folder of its own; name another --state",
            ) from None
        self.record = self._load()

    def unlock(self) -> None:
        """Lets another receiver use the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write(self, record: Record) -> None:
        """Makes a record durable."""
        scratch = self.path.with_suffix(".new")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(self.path)
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.record = record

    def step(self, step: Step) -> None:
        """Moves on to a step."""
        assert self.record is not None
        self.write(replace(self.record, step=step))

    def write_generation(self, step: Step, generation: int) -> None:
        """Moves on to a step, and remembers the generation of the memory that was frozen."""
        assert self.record is not None
        self.write(replace(self.record, step=step, generation=generation))

    def forget(self) -> None:
        """The move is over; nothing is left to take up again."""
        self.path.unlink(missing_ok=True)
        self.record = None

    def _load(self) -> Record | None:
        try:
            fields = json.loads(self.path.read_text())
            return Record(
                Step(fields["step"]),
                fields["target"],
                fields["lease_id"],
                fields["token"],
                int(fields["generation"]),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"receiver journal {self.path} cannot be read: {error}",
                "if no move is under way on this host, delete the file",
            ) from error
