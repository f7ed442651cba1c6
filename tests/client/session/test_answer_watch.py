"""A lane that takes requests and does not answer them is noticed, whatever carries it."""

from __future__ import annotations

from farfault.v1 import pages_pb2 as pb
from farfault_client.session.answer_watch import FORGOTTEN_MAX_S, SILENCE_MAX_S, AnswerWatch
from farfault_client.session.answers import Answer, LonePage
from farfault_client.session.lane import Lane

SPOILT, GOOD = b"spoilt", b"good"


class User:
    """Has three requests to send, and remembers what it was told."""

    def __init__(self) -> None:
        self.requests = [pb.FetchRequest(request_id=number) for number in (1, 2, 3)]
        self.told: list[object] = []

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        return self.requests.pop(0) if self.requests else None

    def answered(self, lane: Lane, answer: Answer) -> None:
        self.told.append(answer.done)

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        self.told.append((data, position))
        return None if data == SPOILT else LonePage(7, 0, 4, 0, 0, 0)

    def lane_lost(self, lane: Lane) -> None:
        self.told.append("lost")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def answer(*done: int) -> Answer:
    return Answer([], b"", 0, done, (), 0, 0)


def test_a_lane_that_brings_nothing_is_lost() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    assert watch.complaint(Lane.DEMAND) == ""
    watch.next_request(Lane.DEMAND)
    clock.now += SILENCE_MAX_S[Lane.DEMAND]
    assert watch.complaint(Lane.DEMAND) == ""
    clock.now += 1
    assert "no answer for 9 s" in watch.complaint(Lane.DEMAND)
    watch.answered(Lane.DEMAND, answer(1))
    clock.now += 1000
    assert watch.complaint(Lane.DEMAND) == "", "it owes nothing"
    assert user.told == [(1,)]


def test_a_slow_lane_is_not_lost() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    for _ in range(3):
        watch.next_request(Lane.DEMAND)
    assert watch.next_request(Lane.DEMAND) is None
    for _ in range(int(FORGOTTEN_MAX_S / SILENCE_MAX_S[Lane.DEMAND])):
        clock.now += SILENCE_MAX_S[Lane.DEMAND]
        assert watch.complaint(Lane.DEMAND) == ""
        watch.answered(Lane.DEMAND, answer())  # a part


def test_answers_to_other_requests_do_not_hide_a_forgotten_one() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    for _ in range(3):
        watch.next_request(Lane.DEMAND)
    clock.now += FORGOTTEN_MAX_S + 1
    watch.answered(Lane.DEMAND, answer(2, 3, 99))
    assert "not answered in 61 s" in watch.complaint(Lane.DEMAND)


def test_a_lost_lane_owes_nothing() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    watch.next_request(Lane.DEMAND)
    watch.lane_lost(Lane.DEMAND)
    clock.now += 1000
    assert watch.complaint(Lane.DEMAND) == ""
    assert user.told == ["lost"]


def test_a_page_that_nobody_brings_is_noticed_and_one_that_came_is_not() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    watch.pages_sent((7,))
    clock.now += SILENCE_MAX_S[Lane.DEMAND] + 1
    assert watch.page_came(SPOILT, 0) is None
    assert "no answer" in watch.complaint(Lane.DEMAND), "the answer is told again, the long way"
    assert watch.page_came(GOOD, 3) is not None
    assert watch.complaint(Lane.DEMAND) == ""
    assert user.told == [(SPOILT, 0), (GOOD, 3)]
