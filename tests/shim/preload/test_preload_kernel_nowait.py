"""The preload library over a KVM with a NOWAIT interface, which no released kernel has: a fake one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from farfault_shim.attach.wire import AddressSource, ReportKind
from farfault_shim.launch.checks import find_library
from farfault_shim.sources.userfault import find_userfaultfd
from tiny_receiver import TinyReceiver

PAGES = 16
PAGE_BYTES = 4096
TIMEOUT_S = 30
HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(not find_userfaultfd().permitted, reason="userfaultfd is not permitted"),
]


def compile_c(place: Path, name: str, *options: str) -> Path:
    output = place / name
    source = HERE / f"{name}.c"
    command = [str(COMPILER), "-O1", "-Wall", "-Wextra", "-Werror", *options, "-o", str(output), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return output


@pytest.mark.parametrize(("setting", "enabled"), [("8", ""), ("8:232", "enable 232 1\n")])
def test_every_row_of_an_annotated_exit(place: Path, setting: str, enabled: str) -> None:
    source = place / "source.ram"
    source.write_bytes(os.urandom(PAGES * PAGE_BYTES))
    vmm, fake = compile_c(place, "toy_vmm"), compile_c(place, "fake_kvm", "-shared", "-fPIC")
    with TinyReceiver(place / "attach.sock", source) as receiver:
        environment = dict(os.environ) | {
            "LD_PRELOAD": f"{find_library()}:{fake}",
            "FARFAULT_ATTACH": str(receiver.path),
            "FARFAULT_RAM": str(place / "vm.ram"),
            "FARFAULT_FAULT_SOURCE": "kernel-nowait",
            "FARFAULT_KERNEL_NOWAIT": setting,
        }
        command = [vmm, place / "vm.ram", str(PAGES * PAGE_BYTES)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.stdout == (
        f"{enabled}slot flags 0x8\nmmio completed\n"
        "run -1 Memory page has hardware error exit 0\n"
        "run -1 Bad address exit 39\n"
        "run 0 ok exit 5\n"
    )
    assert result.returncode == 0, result.stderr
    assert receiver.gpas == list(range(0, PAGES * PAGE_BYTES, PAGE_BYTES))
    exits = [report for report in receiver.reports if report.kind is ReportKind.EXIT]
    assert {report.address_source for report in exits} == {AddressSource.KVM_RUN, AddressSource.MMIO}
    assert [passed.reason for passed in receiver.passed] == ["a private-memory fault"]
    assert (place / "vm.ram").read_bytes() == source.read_bytes()
