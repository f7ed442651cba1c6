"""How a move ends when it does not end well, as its user is to see it."""

from __future__ import annotations

from farfault_cli.errors import FarfaultError, GuestWaitsError, UnreachableError, VerificationError

from farfault_client.receive.journal import Journal, Step


def wrong(problem: str) -> VerificationError:
    """`--verify` found a difference."""
    return VerificationError(
        problem,
        "do not trust this VM; keep the RAM files and the logs of both sides: the page server still holds the memory "
        "as it was at the switchover",
    )


def told_to_end(journal: Journal) -> FarfaultError:
    """What SIGTERM or Ctrl-C means at this moment."""
    if journal.vm_may_be_here:
        return GuestWaitsError(
            "the receiver was told to end in the middle of a move", "start the same command again to take it up"
        )
    return FarfaultError("the receiver was told to end; nothing was moved")


def outcome(journal: Journal, error: FarfaultError) -> FarfaultError:
    """The error that a user should see: after the hand-over the guest waits, whatever went wrong."""
    record = journal.record
    is_plain = type(error) in (FarfaultError, UnreachableError)
    if record is not None and record.step in (Step.RUNNING, Step.HANDING_OVER) and is_plain:
        return GuestWaitsError(error.problem, error.remedy)
    return error
