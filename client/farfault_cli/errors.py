"""Errors that a user meets, each with what to do about it, and the exit codes of every command.

::

    FarfaultError            exit 1   something failed
    ├── UsageError           exit 2   the command line or a file named on it is wrong
    ├── PreflightError       exit 3   the move was refused before anything was stopped
    ├── RolledBackError      exit 4   the move failed; the source VM runs as before
    ├── GuestWaitsError      exit 5   the move failed after the hand-over; the guest waits, nothing is lost
    ├── UnreachableError     exit 6   the other side does not answer
    ├── VerificationError    exit 7   a guest or a page was found wrong
    └── SloError             exit 8   everything worked, but slower than the service level objective allows
"""

from __future__ import annotations

from typing import ClassVar


class FarfaultError(Exception):
    """Something failed. ``str()`` gives the problem and, after it, the remedy.

    Args:
        problem: one sentence that names what is wrong, with the names and numbers that matter.
        remedy: what the user can do; empty where nothing is known.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n  remedy: {self.remedy}" if self.remedy else self.problem


class UsageError(FarfaultError):
    """The command line, a configuration file or a file named there is wrong."""

    exit_code = 2


class PreflightError(FarfaultError):
    """The move was refused before anything was stopped."""

    exit_code = 3


class RolledBackError(FarfaultError):
    """The move failed before the hand-over; the source VM runs as before."""

    exit_code = 4


class GuestWaitsError(FarfaultError):
    """The move failed after the hand-over; the guest waits and nothing is lost."""

    exit_code = 5


class UnreachableError(FarfaultError):
    """The other side does not answer."""

    exit_code = 6


class VerificationError(FarfaultError):
    """A guest or a page was found wrong."""

    exit_code = 7


class SloError(FarfaultError):
    """Everything worked, but slower than the service level objective allows."""

    exit_code = 8


def error_of_exit_code(exit_code: int, problem: str, remedy: str = "") -> FarfaultError:
    """The error that another process ended with."""
    classes = (
        UsageError,
        PreflightError,
        RolledBackError,
        GuestWaitsError,
        UnreachableError,
        VerificationError,
        SloError,
    )
    kind = next((kind for kind in classes if kind.exit_code == exit_code), FarfaultError)
    return kind(problem, remedy)
