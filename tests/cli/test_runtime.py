"""Freed memory stays with the process: batch after batch takes no page faults."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from farfault_cli.runtime import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no mallopt")
def batches(count):
    for _ in range(count):
        block = bytes(256 << 10)
        b"".join((b"header", block))
batches(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
batches(200)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    ran = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True)
    if "no mallopt" in ran.stderr:
        pytest.skip("this C library has no mallopt")
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def test_batches_take_no_page_faults():
    assert page_faults("keep") < 200
