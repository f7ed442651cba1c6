"""A lane that takes requests and does not answer them is noticed, whatever carries it."""

from __future__ import annotations

from farfault.v1 import pages_pb2 as pb
from farfault_client.session.answer_watch import AnswerWatch
from farfault_client.session.answers import Answer
from farfault_client.session.lane import Lane


class User:
    """Has three requests to send, and remembers what it was told."""

    def __init__(self) -> None:
        self.requests = [pb.FetchRequest(request_id=number) for number in (1, 2, 3)]
        self.told: list[object] = []

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        return self.requests.pop(0) if self.requests else None

    def answered(self, lane: Lane, answer: Answer) -> None:
        self.told.append(answer.done)

    def lane_lost(self, lane: Lane) -> None:
        self.told.append("lost")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def answer(*done: int) -> Answer:
    return Answer([], b"", 0, done, (), 0, 0)


def test_silence_is_the_age_of_the_oldest_request() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    assert watch.silent_s() == 0
    watch.next_request(Lane.DEMAND)
    clock.now += 2
    watch.next_request(Lane.DEMAND)
    clock.now += 1
    assert watch.silent_s() == 3
    watch.answered(Lane.DEMAND, answer(1))
    assert watch.silent_s() == 1
    watch.answered(Lane.DEMAND, answer(2))
    clock.now += 10
    assert watch.silent_s() == 0
    assert user.told == [(1,), (2,)]


def test_answers_to_other_requests_do_not_hide_a_forgotten_one() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    for _ in range(3):
        watch.next_request(Lane.DEMAND)
    assert watch.next_request(Lane.DEMAND) is None
    clock.now += 7
    watch.answered(Lane.DEMAND, answer(2, 3, 99))
    assert watch.silent_s() == 7


def test_a_lost_lane_owes_nothing() -> None:
    user, clock = User(), Clock()
    watch = AnswerWatch(user, clock)
    watch.next_request(Lane.DEMAND)
    clock.now += 7
    watch.lane_lost(Lane.DEMAND)
    assert watch.silent_s() == 0
    assert user.told == ["lost"]
