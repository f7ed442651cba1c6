"""What a lane is: one kind of page traffic of a lease, whatever carries it.

A driver owns connections and nothing else. What to fetch and what an answer means is its user's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from farfault.v1 import pages_pb2 as pb

from farfault_client.session.answers import Answer, LonePage, Placed


class Lane(StrEnum):
    """A kind of page traffic. Strings, because the hash of a plain enum's member is computed in Python each time."""

    DEMAND = "demand"
    BACKGROUND = "background"


class LaneLostError(Exception):
    """The lane's connection is gone; what was in flight on it will not be answered."""


@dataclass(slots=True)
class LaneStats:
    """Counters of one lane since the start.

    Attributes:
        connects: connections made.
        wire_bytes: of answers, headers included.
        answers: verified answers.
        bad_answers: answers that broke the contract.
        refusals: answers with refused ranges.
        carrier: what carries the lane now: ``grpc``, ``express``, ``process`` (gRPC in the bulk process),
            ``express process``; empty while it is down.
    """

    connects: int = 0
    wire_bytes: int = 0
    answers: int = 0
    bad_answers: int = 0
    refusals: int = 0
    carrier: str = ""


@dataclass(slots=True)
class SessionStats:
    """Counters of a session."""

    opens: int = 0
    lanes: dict[Lane, LaneStats] = field(default_factory=lambda: {lane: LaneStats() for lane in Lane})


class LaneUser(Protocol):
    """What a lane asks of its user; every method is called on the event loop and must not block."""

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        """The next request to send on a lane; None: nothing now (`LaneDriver.pump` asks again)."""

    def answered(self, lane: Lane, answer: Answer) -> None:
        """A verified answer. Its data is only valid during the call."""

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        """Bytes of the demand lane: a frame may begin at `position` that answers a request of `Session.send_pages`.
        If it does, it is dealt with within the call. None: it is to be read as any other."""

    def placed(self, lane: Lane, placed: Placed) -> None:
        """A verified answer whose pages were put into the memory that `Session.place_into` named."""

    def lane_lost(self, lane: Lane) -> None:
        """Nothing that is in flight on the lane will be answered."""


class LaneDriver(Protocol):
    """A connected lane."""

    carrier: str

    @property
    def is_ready(self) -> bool:
        """Requests go out at once. Until then `pump` may do nothing, and the driver pumps by itself when it is."""

    def pump(self) -> None:
        """There may be something to send: asks the user, sends what it gives."""

    async def run(self) -> None:
        """Carries answers to the user until the connection ends.

        Raises:
            LaneLostError: the connection is gone.
            BadAnswerError: the peer broke the contract; the connection was dropped.
        """

    async def close(self) -> None:
        """Ends the connection. Idempotent."""
