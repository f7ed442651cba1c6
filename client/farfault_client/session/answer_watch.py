"""Notices a lane that takes requests and does not answer them: half open, or a request was damaged on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from farfault.v1 import pages_pb2 as pb

from farfault_client.session.answers import Answer, LonePage, Placed
from farfault_client.session.lane import Lane, LaneUser

SILENCE_MAX_S = {Lane.DEMAND: 8.0, Lane.BACKGROUND: 20.0}
"""A lane that owes answers and has brought none for so long is lost. Bulk may queue for long on a slow link."""
FORGOTTEN_MAX_S = 60.0
"""So is one that answers others, but not a request that is older than this."""


class AnswerWatch:
    """Stands between a lane's driver and its user, and knows how long the oldest request has been out.

    Args:
        user: what the driver would have had.
        clock: seconds, monotonic.
    """

    def __init__(self, user: LaneUser, clock: Callable[[], float]) -> None:
        self._user = user
        self._clock = clock
        self._answered_at = float("-inf")
        self._sent_at: dict[int, float] = {}  # request id to when it was sent, oldest first

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        request = self._user.next_request(lane)
        if request is not None:
            self._sent_at[request.request_id] = self._clock()
        return request

    def answered(self, lane: Lane, answer: Answer) -> None:
        self._done(answer.done)
        self._user.answered(lane, answer)

    def pages_sent(self, request_ids: Iterable[int]) -> None:
        """Requests went out that the user was not asked for."""
        now = self._clock()
        for request_id in request_ids:
            self._sent_at[request_id] = now

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        came = self._user.page_came(data, position)
        if came is not None:
            self._answered_at = self._clock()
            self._sent_at.pop(came.request_id, None)
        return came

    def placed(self, lane: Lane, placed: Placed) -> None:
        self._done(placed.done)
        self._user.placed(lane, placed)

    def lane_lost(self, lane: Lane) -> None:
        self._sent_at.clear()
        self._user.lane_lost(lane)

    def _done(self, request_ids: Iterable[int]) -> None:
        self._answered_at = self._clock()
        for request_id in request_ids:
            self._sent_at.pop(request_id, None)

    def complaint(self, lane: Lane) -> str:
        """Why the lane is to be taken for lost; empty: it is well."""
        now = self._clock()
        for sent_at in self._sent_at.values():
            silent_s = now - max(sent_at, self._answered_at)
            if silent_s > SILENCE_MAX_S[lane]:
                return f"no answer for {silent_s:.0f} s"
            if now - sent_at > FORGOTTEN_MAX_S:
                return f"a request was not answered in {now - sent_at:.0f} s"
            return ""  # the others are younger
        return ""
