"""A helper process does not outlive its parent, not even while it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HELPER = """
import os, signal, sys, time
from farfault_cli.helper_process import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
TRIES_MAX = 500


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for_state(pid: int, *states: str) -> None:
    for _ in range(TRIES_MAX):
        if state_of(pid) in states:
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} is {state_of(pid)!r}, not one of {states}")


def test_a_stopped_helper_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, HELPER], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        wait_for_state(helper, "T")
        os.kill(parent.pid, signal.SIGKILL)
        wait_for_state(helper, "", "Z")
