"""The life of one page: states, inputs, and the one table that says what follows what.

::

    ABSENT ──WANT──▶ WANTED ──SEND──▶ IN_FLIGHT ──ARRIVE──▶ ARRIVED ──INSTALL──▶ INSTALLED
      │                 ▲                │ │ └──ZERO──▶ REMOVED   │
      └──────SEND───────┼────────────────┘ │                      │
                        └──────LOSE────────┴──────────LOSE────────┘   (LOSE_IDLE: back to ABSENT)

INSTALL, PLACE and REMOVE may happen to a page in any state: somebody else may have installed it, and the guest may
give it back. A pair that the table does not name is an error in the program, never ignored.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Priority(IntEnum):
    """Who needs a page; smaller is more urgent. The values are those of the wire's Priority."""

    VCPU = 1
    VMM = 2
    NEIGHBOUR = 3
    HINT = 4
    BACKGROUND = 5


class PageState(IntEnum):
    """Where one page is in its life; the value is the high half of its byte."""

    ABSENT = 0
    WANTED = 1
    """A thread waits for it, and no request names it yet."""
    IN_FLIGHT = 2
    ARRIVED = 3
    """Its bytes are here; the driver was told to install them. Whatever else brings it is clipped."""
    INSTALLED = 4
    REMOVED = 5
    """Reads as zero from now on and is never fetched: the guest gave it back, or the source said zero."""


class PageInput(IntEnum):
    """What can happen to a page."""

    WANT = 0
    """A thread needs it."""
    SEND = 1
    """A request that names it was sent."""
    ARRIVE = 2
    """A verified answer brought its bytes, or the word that it is zero while a thread waits for it."""
    INSTALL = 3
    """It is present in guest memory, by us or by somebody else (EEXIST)."""
    ZERO = 4
    """The source says that it is zero and nobody waits for it: left as a hole."""
    LOSE = 5
    """Its request was lost or refused, or it could not be installed; somebody waits for the page."""
    LOSE_IDLE = 6
    """The same, and nobody waits for it."""
    PLACE = 7
    """Another process found it in flight and installed it, or found it present; a removal since then stands."""
    REMOVE = 8
    """The guest gave it back (balloon, discard)."""


_S, _I = PageState, PageInput
TRANSITIONS: Final[dict[tuple[PageState, PageInput], PageState]] = {
    (_S.ABSENT, _I.WANT): _S.WANTED,
    (_S.ABSENT, _I.SEND): _S.IN_FLIGHT,
    (_S.ABSENT, _I.INSTALL): _S.INSTALLED,
    (_S.ABSENT, _I.PLACE): _S.INSTALLED,
    (_S.ABSENT, _I.REMOVE): _S.REMOVED,
    (_S.WANTED, _I.WANT): _S.WANTED,
    (_S.WANTED, _I.SEND): _S.IN_FLIGHT,
    (_S.WANTED, _I.INSTALL): _S.INSTALLED,
    (_S.WANTED, _I.PLACE): _S.INSTALLED,
    (_S.WANTED, _I.REMOVE): _S.REMOVED,
    (_S.IN_FLIGHT, _I.WANT): _S.IN_FLIGHT,
    (_S.IN_FLIGHT, _I.ARRIVE): _S.ARRIVED,
    (_S.IN_FLIGHT, _I.INSTALL): _S.INSTALLED,
    (_S.IN_FLIGHT, _I.ZERO): _S.REMOVED,
    (_S.IN_FLIGHT, _I.LOSE): _S.WANTED,
    (_S.IN_FLIGHT, _I.LOSE_IDLE): _S.ABSENT,
    (_S.IN_FLIGHT, _I.PLACE): _S.INSTALLED,
    (_S.IN_FLIGHT, _I.REMOVE): _S.REMOVED,
    (_S.ARRIVED, _I.WANT): _S.ARRIVED,
    (_S.ARRIVED, _I.INSTALL): _S.INSTALLED,
    (_S.ARRIVED, _I.LOSE): _S.WANTED,
    (_S.ARRIVED, _I.LOSE_IDLE): _S.ABSENT,
    (_S.ARRIVED, _I.PLACE): _S.INSTALLED,
    (_S.ARRIVED, _I.REMOVE): _S.REMOVED,
    (_S.INSTALLED, _I.WANT): _S.INSTALLED,
    (_S.INSTALLED, _I.INSTALL): _S.INSTALLED,
    (_S.INSTALLED, _I.PLACE): _S.INSTALLED,
    (_S.INSTALLED, _I.REMOVE): _S.REMOVED,
    (_S.REMOVED, _I.WANT): _S.REMOVED,
    (_S.REMOVED, _I.INSTALL): _S.INSTALLED,
    (_S.REMOVED, _I.PLACE): _S.REMOVED,
    (_S.REMOVED, _I.REMOVE): _S.REMOVED,
}

CARRY_PRIORITY: Final = frozenset({_S.WANTED, _S.IN_FLIGHT, _S.ARRIVED})
"""States whose byte has a priority in its low half; the others are one byte value each."""
PRIORITY_MASK: Final = 0x0F
STATE_SHIFT: Final = 4


class UndefinedTransitionError(AssertionError):
    """A pair of state and input that the table does not name: a bug, not a condition."""

    def __init__(self, state: PageState, page_input: PageInput, page: int) -> None:
        super().__init__(f"page {page}: {page_input.name} while {state.name}")
        self.state = state
        self.page_input = page_input
        self.page = page


def encode(state: PageState, priority: int = 0) -> int:
    """The byte for a state, and for those that carry one its priority (1..5)."""
    return state << STATE_SHIFT | (priority if state in CARRY_PRIORITY else 0)


ABSENT_BYTE: Final = encode(PageState.ABSENT)
INSTALLED_BYTE: Final = encode(PageState.INSTALLED)
REMOVED_BYTE: Final = encode(PageState.REMOVED)

STATE_OF_BYTE: Final[dict[int, PageState]] = {
    encode(state, priority): state
    for state in PageState
    for priority in (Priority if state in CARRY_PRIORITY else (0,))
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
    own = byte & PRIORITY_MASK
    return encode(target, min(own or priority, priority or own))
