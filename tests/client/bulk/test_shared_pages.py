"""The receiver and its bulk process never hold the lock at once, and the receiver does not stand in line."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from farfault_client.bulk.shared_pages import SharedPages

OTHER = """
import sys, time
from farfault_client.bulk.shared_pages import SharedPages
shared = SharedPages(4, int(sys.argv[1]))
print("ready", flush=True)
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    with shared.second:
        shared.states[0] = 1
        time.sleep(0.0005)
        shared.states[0] = 0
"""


def other(shared: SharedPages, seconds: float) -> subprocess.Popen[str]:
    """A process that takes the lock over and over."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(shared.fileno()), str(seconds)],
        pass_fds=[shared.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_at_a_time() -> None:
    shared = SharedPages(4)
    process = other(shared, 1.0)
    turns = 0
    while process.poll() is None:
        with shared.first:
            assert shared.states[0] == 0
            turns += 1
            time.sleep(0.0001)
            assert shared.states[0] == 0
    assert process.returncode == 0
    assert turns > 10
    shared.close()


def test_a_process_that_dies_gives_the_lock_back() -> None:
    shared = SharedPages(4)
    process = other(shared, 60.0)
    while shared.states[0] == 0:
        time.sleep(0.0001)
    process.kill()
    process.wait()
    with shared.first:
        pass
    shared.close()


def test_a_receiver_that_is_stopped_while_it_wants_the_lock_does_not_hold_the_other_up() -> None:
    shared = SharedPages(4)
    shared.states[4] = 1  # it is about to take the lock, and never does
    began = time.monotonic()
    with shared.second:
        pass
    assert time.monotonic() - began < 5.0
    shared.close()


def test_both_see_the_same_states() -> None:
    shared = SharedPages(4)
    again = SharedPages(4, os.dup(shared.fileno()))
    shared.states[2] = 7
    assert again.states[2] == 7
    shared.close()
    again.close()
