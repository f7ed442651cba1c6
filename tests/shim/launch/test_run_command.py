"""farfault run, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from farfault_shim.launch.checks import find_library
from farfault_shim.sources.userfault import find_userfaultfd

FARFAULT = Path(sys.executable).with_name("farfault")
TIMEOUT_S = 30
pytestmark = [
    pytest.mark.skipif(not FARFAULT.exists(), reason="farfault is not installed beside python"),
    pytest.mark.skipif(not find_userfaultfd().permitted, reason="userfaultfd is not permitted"),
]


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    common = ["--attach", str(tmp_path / "vm.sock"), "--ram", str(tmp_path / "vm.ram")]
    return subprocess.run(
        [FARFAULT, "run", *common, *words], capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
    )


def test_it_becomes_the_vmm_under_the_library(tmp_path: Path) -> None:
    result = run(tmp_path, "--fault-source", "blocking", "--", "cat", "/proc/self/maps")
    assert result.returncode == 0
    assert str(find_library()) in result.stdout
    assert "farfault run: fault source blocking; not stock-nowait: " in result.stderr
    assert "kernel-nowait" not in result.stderr  # nothing was configured
    assert f"warning: no argument of the VMM names {tmp_path / 'vm.ram'}" in result.stderr


def test_the_vmms_own_exit_code_and_options_pass_through(tmp_path: Path) -> None:
    result = run(tmp_path, "--", "env", "--ignore-environment", "sh", "-c", "exit 9")
    assert result.returncode == 9


def test_variables_for_other_launchers(tmp_path: Path) -> None:
    result = run(tmp_path, "--fault-source", "blocking", "--print-env", "json")
    assert json.loads(result.stdout) == {
        "LD_PRELOAD": str(find_library()),
        "FARFAULT_ATTACH": str(tmp_path / "vm.sock"),
        "FARFAULT_RAM": str(tmp_path / "vm.ram"),
        "FARFAULT_FAULT_SOURCE": "blocking",
    }
    shell = run(tmp_path, "--fault-source", "blocking", "--print-env", "shell")
    assert f"export FARFAULT_RAM={tmp_path / 'vm.ram'}\n" in shell.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "no VMM is given"),
        (("--", "no-such-vmm"), 2, "not an executable file on PATH"),
        (("--fault-source", "kernel-nowait", "--", "cat"), 3, "no interface is configured"),
        (("--kernel-interface", "userfault:flag=8:cap=9", "--", "cat"), 2, "does not keep a userfault bitmap"),
        (("--kernel-interface", "nonsense", "--", "cat"), 2, "is not SERIES:flag=N:cap=N"),
    ],
)
def test_refusals_have_a_code_and_a_remedy(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    result = run(tmp_path, *words)
    assert result.returncode == code
    assert message in result.stderr
    assert "remedy:" in result.stderr
