"""Notices a lane that takes requests and does not answer them: half open, or a request was damaged on its way."""

from __future__ import annotations

from collections.abc import Callable

from farfault.v1 import pages_pb2 as pb

from farfault_client.session.answers import Answer
from farfault_client.session.lane import Lane, LaneUser

ANSWER_TIMEOUT_S = {Lane.DEMAND: 5.0, Lane.BACKGROUND: 60.0}
"""A request that is older than this and unanswered says that the lane is lost. Bulk may queue for long on a slow link."""


class AnswerWatch:
    """Stands between a lane's driver and its user, and knows how long the oldest request has been out.

    Args:
        user: what the driver would have had.
        clock: seconds, monotonic.
    """

    def __init__(self, user: LaneUser, clock: Callable[[], float]) -> None:
        self._user = user
        self._clock = clock
        self._sent_at: dict[int, float] = {}  # request id to when it was sent, oldest first

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        request = self._user.next_request(lane)
        if request is not None:
            self._sent_at[request.request_id] = self._clock()
        return request

    def answered(self, lane: Lane, answer: Answer) -> None:
        for request_id in answer.done:
            self._sent_at.pop(request_id, None)
        self._user.answered(lane, answer)

    def lane_lost(self, lane: Lane) -> None:
        self._sent_at.clear()
        self._user.lane_lost(lane)

    def silent_s(self) -> float:
        """Age of the oldest request that has not been answered in full; 0: there is none."""
        for sent_at in self._sent_at.values():
            return self._clock() - sent_at
        return 0.0
