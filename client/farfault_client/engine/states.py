"""The life of one page: states, inputs, and the one table that says what follows what.

::

    ABSENT ──WANT──▶ WANTED ──SEND──▶ IN_FLIGHT ──INSTALL──▶ INSTALLED
      │                 ▲                 │  └────ZERO─────▶ REMOVED
      └──────SEND───────┼────────▶        │
                        └──────LOSE───────┘   (back to ABSENT where nobody waits)

A pair that the table does not name is an error in the program, never ignored.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class Priority(IntEnum):
    """Who needs a page; smaller is more urgent. The values are those of the wire's Priority."""

    VCPU = 1
    VMM = 2
    NEIGHBOUR = 3
    HINT = 4
    BACKGROUND = 5


class PageState(Enum):
    """Where one page is in its life."""

    ABSENT = "absent"
    WANTED = "wanted"
    IN_FLIGHT = "in flight"
    INSTALLED = "installed"
    REMOVED = "removed"
    """Reads as zero from now on and is never fetched: the guest gave it back, or the source said zero."""


class PageInput(Enum):
    """What can happen to a page."""

    WANT = "want"
    """Somebody needs it (a fault, a neighbour, a hint)."""
    SEND = "send"
    """A request that names it was sent."""
    INSTALL = "install"
    """It is present in guest memory, by us or by somebody else (EEXIST)."""
    ZERO = "zero"
    """The source says that it is zero and nobody waits for it: left as a hole."""
    LOSE = "lose"
    """The request was lost, or its answer was refused; somebody waits for the page."""
    LOSE_IDLE = "lose, idle"
    """The same, and nobody waits for it."""
    REMOVE = "remove"
    """The guest gave it back (balloon, discard)."""


_S, _I = PageState, PageInput
TRANSITIONS: dict[tuple[PageState, PageInput], PageState] = {
    (_S.ABSENT, _I.WANT): _S.WANTED,
    (_S.ABSENT, _I.SEND): _S.IN_FLIGHT,
    (_S.ABSENT, _I.INSTALL): _S.INSTALLED,
    (_S.ABSENT, _I.REMOVE): _S.REMOVED,
    (_S.WANTED, _I.WANT): _S.WANTED,
    (_S.WANTED, _I.SEND): _S.IN_FLIGHT,
    (_S.WANTED, _I.INSTALL): _S.INSTALLED,
    (_S.WANTED, _I.REMOVE): _S.REMOVED,
    (_S.IN_FLIGHT, _I.WANT): _S.IN_FLIGHT,
    (_S.IN_FLIGHT, _I.INSTALL): _S.INSTALLED,
    (_S.IN_FLIGHT, _I.ZERO): _S.REMOVED,
    (_S.IN_FLIGHT, _I.LOSE): _S.WANTED,
    (_S.IN_FLIGHT, _I.LOSE_IDLE): _S.ABSENT,
    (_S.IN_FLIGHT, _I.REMOVE): _S.REMOVED,
    (_S.INSTALLED, _I.WANT): _S.INSTALLED,
    (_S.INSTALLED, _I.INSTALL): _S.INSTALLED,
    (_S.INSTALLED, _I.REMOVE): _S.REMOVED,
    (_S.REMOVED, _I.WANT): _S.REMOVED,
    (_S.REMOVED, _I.INSTALL): _S.INSTALLED,
    (_S.REMOVED, _I.REMOVE): _S.REMOVED,
}


class UndefinedTransitionError(AssertionError):
    """A pair of state and input that the table does not name: a bug, not a condition."""

    def __init__(self, state: PageState, page_input: PageInput, page: int) -> None:
        super().__init__(f"page {page}: {page_input.value!r} while {state.value!r}")
        self.state = state
        self.page_input = page_input
        self.page = page


# One byte a page. Absent, installed and removed pages are one value each, so that a scan is one
# search for a byte; wanted and in-flight pages carry their priority.
ABSENT_BYTE = 0
WANTED_BASE = 0x10
IN_FLIGHT_BASE = 0x20
INSTALLED_BYTE = 0x40
REMOVED_BYTE = 0x41


def encode(state: PageState, priority: int = 0) -> int:
    """The byte for a state, and for wanted and in-flight pages its priority (1..5)."""
    match state:
        case PageState.ABSENT:
            return ABSENT_BYTE
        case PageState.WANTED:
            return WANTED_BASE | priority
        case PageState.IN_FLIGHT:
            return IN_FLIGHT_BASE | priority
        case PageState.INSTALLED:
            return INSTALLED_BYTE
        case PageState.REMOVED:
            return REMOVED_BYTE


STATE_OF_BYTE: dict[int, PageState] = {
    ABSENT_BYTE: PageState.ABSENT,
    INSTALLED_BYTE: PageState.INSTALLED,
    REMOVED_BYTE: PageState.REMOVED,
    **{WANTED_BASE | priority: PageState.WANTED for priority in Priority},
    **{IN_FLIGHT_BASE | priority: PageState.IN_FLIGHT for priority in Priority},
}


def next_byte(byte: int, page_input: PageInput, priority: int = 0, *, page: int = -1) -> int:
    """The byte after an input.

    Args:
        byte: the page's byte now.
        page_input: what happened.
        priority: of a WANT or SEND. A page keeps the more urgent of its own and this one.
        page: for the error message only.

    Raises:
        UndefinedTransitionError: the table does not name the pair.
    """
    state = STATE_OF_BYTE[byte]
    target = TRANSITIONS.get((state, page_input))
    if target is None:
        raise UndefinedTransitionError(state, page_input, page)
    if target in (PageState.WANTED, PageState.IN_FLIGHT):
        own = byte & 0x0F
        return encode(target, min(own or priority, priority or own))
    return encode(target)
