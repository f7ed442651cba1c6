"""A load test on a page server in the middle of a real move: neither disturbs the other's pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

FARFAULT = [sys.executable, "-m", "farfault_cli"]
ATTEMPTS_MAX = 40
TIMEOUT_S = 120.0


def load_once_frozen(target: str) -> dict[str, Any]:
    """The figures of a load test that begins once the VM was handed over; before that its pages cannot be had."""
    for _ in range(ATTEMPTS_MAX):
        command = [*FARFAULT, "load", "--source", target, "--rate", "300", "--duration", "1", "--warmup", "0", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode == 0:
            figures: dict[str, Any] = json.loads(done.stdout)
            return figures
        assert done.returncode == 1, done.stderr
        assert "runs: its memory cannot be fetched yet" in done.stderr
    raise AssertionError("the VM was never handed over")


@pytest.mark.e2e
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")
def test_load_beside_a_move() -> None:
    command = [*FARFAULT, "demo", "--vmm", "reference", "--ram", "1GiB", "--fault-source", "blocking"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        found = None
        while found is None and (line := demo.stdout.readline()):
            found = re.search(r"page server +(\S+);", line)
        assert found is not None
        figures = load_once_frozen(found[1])
        output, _ = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 0, output
    assert "0 errors" in output
    assert figures["pages"] > 0
    assert figures["errors"] == figures["verification_errors"] == 0
    assert figures["setup"]["backing"] == ["tmpfs"]
