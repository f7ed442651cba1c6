"""What the source VM is doing, as the record knows it: one table, and anything else is refused.

::

    RUNNING ──SUSPEND──▶ SUSPENDING ──STATE_SENT──▶ FROZEN ──HAND_OVER──▶ HANDED_OVER ──COMPLETE──▶ COMPLETED
       ▲                     │ RESUME                 │ RESUME
       └──────RESUMED──── RESUMING ◀──────────────────┘

A VM that nobody controls from here (a snapshot, a VM stopped by other means) starts in FROZEN; there COMPLETE leads
to COMPLETED at once.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from farfault.v1 import pages_pb2 as pb


class Phase(Enum):
    """The values are those of the record on disk."""

    RUNNING = "running"
    SUSPENDING = "suspending"
    FROZEN = "frozen"
    RESUMING = "resuming"
    HANDED_OVER = "handed over"
    COMPLETED = "completed"


class Step(Enum):
    """What can happen to the VM. The values go into messages: "cannot <value>"."""

    SUSPEND = "suspend the VM"
    STATE_SENT = "note that the device state was sent"
    HAND_OVER = "hand the VM over"
    RESUME = "resume the VM"
    RESUMED = "note that the VM runs"
    COMPLETE = "complete the move"
    FOUND_RUNNING = "note that the VM was found running"


TRANSITIONS: Final[dict[tuple[Phase, Step], Phase]] = {
    (Phase.RUNNING, Step.SUSPEND): Phase.SUSPENDING,
    (Phase.RUNNING, Step.RESUME): Phase.RUNNING,
    (Phase.SUSPENDING, Step.STATE_SENT): Phase.FROZEN,
    (Phase.SUSPENDING, Step.RESUME): Phase.RESUMING,
    (Phase.FROZEN, Step.HAND_OVER): Phase.HANDED_OVER,
    (Phase.FROZEN, Step.RESUME): Phase.RESUMING,
    (Phase.FROZEN, Step.FOUND_RUNNING): Phase.RUNNING,
    (Phase.RESUMING, Step.RESUME): Phase.RESUMING,
    (Phase.RESUMING, Step.RESUMED): Phase.RUNNING,
    (Phase.HANDED_OVER, Step.HAND_OVER): Phase.HANDED_OVER,
    (Phase.HANDED_OVER, Step.COMPLETE): Phase.COMPLETED,
    (Phase.HANDED_OVER, Step.FOUND_RUNNING): Phase.HANDED_OVER,
    (Phase.COMPLETED, Step.HAND_OVER): Phase.COMPLETED,
    (Phase.COMPLETED, Step.COMPLETE): Phase.COMPLETED,
    (Phase.COMPLETED, Step.FOUND_RUNNING): Phase.COMPLETED,
}

UNCONTROLLED_TRANSITIONS: Final[dict[tuple[Phase, Step], Phase]] = {
    (Phase.FROZEN, Step.COMPLETE): Phase.COMPLETED,
    (Phase.COMPLETED, Step.COMPLETE): Phase.COMPLETED,
}

STOPPED: Final = frozenset({Phase.FROZEN, Phase.HANDED_OVER, Phase.COMPLETED})
"""The memory does not change: pages are served."""

TAKEN: Final = frozenset({Phase.SUSPENDING, Phase.FROZEN, Phase.RESUMING})
"""The VM may stand still for a destination that does not own it: it can be brought back."""

GONE: Final = frozenset({Phase.HANDED_OVER, Phase.COMPLETED})
"""A destination owns the VM: the source is never resumed again."""

VM_STATES: Final = {
    Phase.RUNNING: pb.VM_STATE_RUNNING,
    Phase.SUSPENDING: pb.VM_STATE_RUNNING,
    Phase.FROZEN: pb.VM_STATE_FROZEN,
    Phase.RESUMING: pb.VM_STATE_RUNNING,
    Phase.HANDED_OVER: pb.VM_STATE_HANDED_OVER,
    Phase.COMPLETED: pb.VM_STATE_COMPLETED,
}
