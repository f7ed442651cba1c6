"""The preflight comparison: what must be alike, and what the user is told to do about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from farfault_vmm.description import MemoryBackend, VmDescription, compare

MIB = 1 << 20
RAM = MemoryBackend("ram", 128 * MIB, shared=True)
MORE = MemoryBackend("more", 64 * MIB, shared=True)
SOURCE = VmDescription(
    vmm="qemu 7.2.22",
    machine_type="pc-i440fx-7.2",
    vcpus=2,
    status="running",
    memory=(RAM, MORE),
    capabilities=("events", "x-ignore-shared"),
    accelerator="kvm",
)
DESTINATION = replace(SOURCE, status="inmigrate")


def failed(source: VmDescription, destination: VmDescription) -> dict[str, str]:
    checks = compare(source, destination)
    assert all(bool(check.remedy) != check.passed for check in checks), "a remedy exactly where a check failed"
    return {check.name: check.remedy for check in checks if not check.passed}


def test_proto_round_trip() -> None:
    assert VmDescription.from_proto(SOURCE.to_proto()) == SOURCE


@pytest.mark.parametrize("status", ["running", "paused"])
def test_twins_pass(status: str) -> None:
    assert failed(replace(SOURCE, status=status), DESTINATION) == {}


def test_order_of_backends_does_not_matter() -> None:
    assert failed(SOURCE, replace(DESTINATION, memory=(MORE, RAM))) == {}


@pytest.mark.parametrize(
    ("source", "destination", "name", "option"),
    [
        ({}, {"vmm": "other 7.2.22"}, "same VMM", "qemu 7.2.22"),
        ({}, {"vmm": "qemu 7.1.0"}, "same VMM", "qemu 7.2.22"),
        ({}, {"machine_type": "pc-q35-7.2"}, "same machine type", "-machine pc-i440fx-7.2"),
        ({}, {"vcpus": 3}, "same number of vCPUs", "-smp 2"),
        ({}, {"accelerator": "tcg"}, "same accelerator", "-accel kvm"),
        ({}, {"memory": (RAM,)}, "same memory backends", "id=more,size=67108864"),
        ({}, {"memory": ()}, "same memory backends", "id=ram,size=134217728"),
        ({}, {"memory": (replace(RAM, size_bytes=MIB), MORE)}, "same memory backends", "size=134217728"),
        ({"memory": ()}, {"memory": ()}, "same memory backends", "memory-backend=ram"),
        ({"memory": (replace(RAM, shared=False), MORE)}, {}, "source memory is shared", "share=on"),
        ({}, {"memory": (RAM, replace(MORE, shared=False))}, "destination memory is shared", "share=on"),
        ({"capabilities": ("events",)}, {}, "source leaves shared memory out", "x-ignore-shared on"),
        ({}, {"capabilities": ()}, "destination leaves shared memory out", "x-ignore-shared on"),
        ({"status": "postmigrate"}, {}, "source can be stopped", "cont"),
        ({}, {"status": "running"}, "destination waits for a VM", "-incoming defer"),
    ],
)
def test_each_difference_has_its_check(
    source: dict[str, object], destination: dict[str, object], name: str, option: str
) -> None:
    problems = failed(replace(SOURCE, **source), replace(DESTINATION, **destination))  # type: ignore[arg-type]
    assert list(problems) == [name]
    assert option in problems[name]


@pytest.mark.parametrize(
    ("vmm", "warned"), [("qemu 7.2.22", False), ("qemu 7.2.3", True), ("qemu 8.0.1", True), ("qemu 10.0.0", True)]
)
def test_another_version_that_may_work_is_a_warning(vmm: str, warned: bool) -> None:
    check = compare(SOURCE, replace(DESTINATION, vmm=vmm))[0]
    assert check.passed
    assert ("warning" in check.detail) == warned
