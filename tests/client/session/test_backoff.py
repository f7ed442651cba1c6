"""Waits between attempts."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from farfault_client.session.backoff import backoff


def test_steps_double_up_to_the_longest() -> None:
    waits = list(islice(backoff(lambda: 1.0, first_s=1, longest_s=10), 6))
    assert waits == [1, 2, 4, 8, 10, 10]


def test_waits_are_jittered_within_their_upper_half() -> None:
    assert list(islice(backoff(lambda: 0.0, first_s=1, longest_s=4), 4)) == [0.5, 1, 2, 2]
    for wait, step in zip(islice(backoff(random.Random(1).random), 20), [0.05 * 2**i for i in range(20)], strict=True):
        assert min(step, 2.0) / 2 <= wait <= min(step, 2.0)


def test_another_factor() -> None:
    assert list(islice(backoff(lambda: 1.0, first_s=1, longest_s=100, factor=3), 4)) == pytest.approx([1, 3, 9, 27])
