"""Jittered exponential back-off. Randomness is injected."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def backoff(
    random: Callable[[], float], *, first_s: float = 0.05, longest_s: float = 2.0, factor: float = 2.0
) -> Iterator[float]:
    """Endless waits in seconds: each is between half of and the whole of a step that grows up to `longest_s`.

    Args:
        random: returns a float in [0, 1), as `random.random`.
    """
    step = first_s
    while True:
        yield step * (0.5 + random() / 2)
        step = min(longest_s, step * factor)
