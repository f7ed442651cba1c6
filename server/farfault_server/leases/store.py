"""The record on disk: one JSON file, replaced as a whole, durable before anyone acts on it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Final, Protocol

from farfault_cli.errors import FarfaultError, UsageError

from farfault_server.leases.book import Lease, LeaseBook
from farfault_server.leases.phases import Phase

FORMAT: Final = 1
FILE_NAME: Final = "leases.json"
LOCK_NAME: Final = "lock"


class Store(Protocol):
    """Where the record lives."""

    def load(self) -> LeaseBook | None:
        """The last record that was saved; None: none yet."""

    def save(self, book: LeaseBook) -> None:
        """Returns when the record would survive a power cut.

        Raises:
            OSError: it may or may not have been saved; do not act on it.
        """


class MemoryStore:
    """Nothing survives the server."""

    def load(self) -> LeaseBook | None:
        return None

    def save(self, book: LeaseBook) -> None:
        """Nothing to do."""


class DirectoryStore:
    """A record in a directory, which one server at a time may use.

    Args:
        directory: made, readable for its owner only, where it does not exist.

    Raises:
        UsageError: another server uses it, or it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"cannot use the state directory {directory}: {error.strerror}", "name another directory with --state"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UsageError(
                f"another page server uses the state directory {directory}",
                "each VM needs a directory of its own; end the other server or name another --state",
            ) from None

    def load(self) -> LeaseBook | None:
        path = self._directory / FILE_NAME
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            return book_from_json(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise FarfaultError(
                f"the lease record {path} cannot be read: {error!r}",
                "it says who owns the VM: find that out before you move the file away and start again",
            ) from error

    def save(self, book: LeaseBook) -> None:
        temporary = self._directory / f"{FILE_NAME}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", closefd=False) as file:
                json.dump(book_to_json(book), file, indent=1)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(self._directory / FILE_NAME)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Lets another server use the directory."""
        os.close(self._lock)


def book_to_json(book: LeaseBook) -> dict[str, Any]:
    """The form on disk."""
    return {
        "format": FORMAT,
        "is_controlled": book.is_controlled,
        "phase": book.phase.value,
        "generation": book.generation,
        "memory_identity": book.memory_identity,
        "leases": [lease._asdict() for lease in book.leases.values()],
        "released": dict(book.released),
    }


def book_from_json(fields: dict[str, Any]) -> LeaseBook:
    """Reads the form on disk.

    Raises:
        ValueError, KeyError, TypeError: it is no such record.
    """
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']}, this version knows {FORMAT}")
    leases = [Lease(**lease) for lease in fields["leases"]]
    return LeaseBook(
        is_controlled=bool(fields["is_controlled"]),
        phase=Phase(fields["phase"]),
        generation=int(fields["generation"]),
        leases={lease.lease_id: lease for lease in leases},
        released={str(lease_id): str(hashed) for lease_id, hashed in fields["released"].items()},
        memory_identity=fields["memory_identity"],
    )
