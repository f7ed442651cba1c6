"""The preload library in a small VMM, a Python that maps a file: what it takes, what it refuses, what it hides."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from farfault_shim.annotate import AddressKind, discover
from farfault_shim.attach.wire import FaultSource, HandOver
from farfault_shim.launch.checks import find_library
from farfault_shim.sources.userfault import find_userfaultfd
from farfault_shim.uffd import abi
from uffd_memory import HUGE, huge_pages

PYTHON = "/usr/bin/python3"
SIZE = 1 << 20
TIMEOUT_S = 20
NOBODY = 65534
DESCRIPTORS_MAX = 8

pytestmark = [
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"no {PYTHON}, which every user may run"),
    pytest.mark.skipif(not find_userfaultfd().permitted, reason="userfaultfd is not permitted"),
]

VMM = f"""
import mmap, os, subprocess, sys
path, size = sys.argv[1], {SIZE}
fd = os.memfd_create(path[6:]) if path.startswith("memfd=") else os.open(path, os.O_RDWR | os.O_CREAT)
if os.fstat(fd).st_size == 0:
    os.truncate(fd, size)
"""
MAP = "whole = mmap.mmap(fd, size)\n"
WAIT = "print('mapped', flush=True); sys.stdin.read()\n"


def variables(ram: str, attach: Path, source: str = "blocking", **more: str) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(find_library()),
        "FARFAULT_ATTACH": str(attach),
        "FARFAULT_RAM": ram,
        "FARFAULT_FAULT_SOURCE": source,
        **more,
    }


def annotator() -> str:
    """Of a tracepoint that this process may sample; which one does not matter here."""
    found = discover()[AddressKind.GPA]
    if found.annotator is None:
        pytest.skip(f"{found.problem}; {found.remedy}")
    return found.annotator.render()


def run_vmm(
    script: str, path: str, extra: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-S", "-c", VMM + script, path],
        env=dict(os.environ) | dict(extra),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def hand_over(
    script: str, path: str, extra: Mapping[str, str], listening: socket.socket, **options: object
) -> tuple[HandOver, list[int]]:
    """Starts a VMM and takes its first hand-over. The caller closes the descriptors."""
    command = [PYTHON, "-S", "-c", VMM + script, path]
    environment = dict(os.environ) | dict(extra)
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, **options)  # type: ignore[call-overload]
    with process:
        try:
            listening.settimeout(TIMEOUT_S)
            connection, _ = listening.accept()
            with connection:
                data, descriptors, _, _ = socket.recv_fds(connection, 65536, DESCRIPTORS_MAX)
                return HandOver.parse(data), list(descriptors)
        finally:
            process.kill()


@pytest.fixture
def listening(place: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(place / "attach.sock"))
    (place / "attach.sock").chmod(0o777)
    made.listen(1)
    return made


def test_inert_without_its_variables(place: Path) -> None:
    result = run_vmm(MAP + "print(whole[0])", str(place / "vm.ram"), {"LD_PRELOAD": str(find_library())})
    assert (result.stdout, result.stderr) == ("0\n", "")


@pytest.mark.parametrize(("source", "aliased"), [("blocking", False), ("stock-nowait", True)])
def test_hand_over_of_a_file_that_the_vmm_makes(
    place: Path, listening: socket.socket, source: str, aliased: bool
) -> None:
    with listening:
        extra = variables(str(place / "vm.ram"), place / "attach.sock", source)
        if aliased:
            extra["FARFAULT_ANNOTATOR"] = annotator()
        handover, descriptors = hand_over(MAP + WAIT, str(place / "vm.ram"), extra, listening)
    try:
        assert handover.fault_source is FaultSource(source)
        (region,) = handover.regions
        assert (region.size_bytes, region.offset_bytes, region.page_size_bytes) == (SIZE, 0, 4096)
        assert (region.alias_hva > 0) == aliased
        assert handover.descriptors == ("uffd", *(("alias_uffd",) if aliased else ()), "state", "ram0")
        assert len(descriptors) == len(handover.descriptors)
        assert os.path.samestat(os.fstat(descriptors[-1]), (place / "vm.ram").stat())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("name", ["link/vm.ram", "../PLACE/vm.ram", "memfd=guest-ram"])
def test_ram_by_link_relative_path_and_memfd(place: Path, listening: socket.socket, name: str) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    name = name.replace("PLACE", place.name)
    with listening:
        handover, descriptors = hand_over(
            MAP + WAIT, name, variables(name, place / "attach.sock"), listening, cwd=place
        )
    for descriptor in descriptors:
        os.close(descriptor)
    assert handover.regions[0].size_bytes == SIZE


@pytest.mark.parametrize("source", ["blocking", "stock-nowait"])
def test_huge_pages_are_handed_over_as_such(place: Path, listening: socket.socket, source: str) -> None:
    script = (
        f"huge = os.memfd_create('guest-huge', os.MFD_HUGETLB); os.truncate(huge, {HUGE})\nmmap.mmap(huge, {HUGE})\n"
    )
    extra = variables("memfd=guest-huge", place / "attach.sock", source, FARFAULT_ANNOTATOR=annotator())
    with huge_pages(1), listening:
        handover, descriptors = hand_over(script + WAIT, "memfd=unused", extra, listening)
        for descriptor in descriptors:
            os.close(descriptor)
    assert [(region.size_bytes, region.page_size_bytes) for region in handover.regions] == [(HUGE, HUGE)]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE)", "is mapped privately; give the VMM's memory backend share=on"),
        ("mmap.mmap(fd, size // 2)", f"{SIZE // 2} bytes mapped at 0 of a file of {SIZE}; map the whole file"),
        (
            "os.pwrite(fd, b'x', 5000); mmap.mmap(fd, size)",
            "already holds 4 KiB; pages that are there are never fetched",
        ),
    ],
)
def test_mappings_that_would_go_wrong_are_refused(place: Path, script: str, message: str) -> None:
    path = str(place / "vm.ram")
    result = run_vmm(script + "\nprint('alive')", path, variables(path, place / "attach.sock"))
    assert result.returncode == 1
    assert message in result.stderr
    assert "alive" not in result.stdout


def test_a_second_mapping_is_reported(place: Path) -> None:
    path = str(place / "vm.ram")
    result = run_vmm(MAP + "again = mmap.mmap(fd, size)\n", path, variables(path, place / "attach.sock"))
    assert result.returncode == 0
    assert "is mapped a second time" in result.stderr


def test_children_see_nothing_of_it(place: Path) -> None:
    path = str(place / "vm.ram")
    extra = variables(path, place / "attach.sock", FARFAULT_ANNOTATOR="gva:133:8:8")
    extra["LD_PRELOAD"] += ":libm.so.6"
    script = "print(subprocess.run(['env'], capture_output=True, text=True).stdout)"
    seen = run_vmm(script, path, extra).stdout
    assert "FARFAULT_" not in seen
    assert [line for line in seen.splitlines() if line.startswith("LD_PRELOAD")] == ["LD_PRELOAD=libm.so.6"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FARFAULT_RAM": ""}, "FARFAULT_ATTACH is set but FARFAULT_RAM is not"),
        ({"FARFAULT_FAULT_SOURCE": "magic"}, "is neither blocking, stock-nowait nor kernel-nowait"),
        ({"FARFAULT_FAULT_SOURCE": "kernel-nowait"}, "FARFAULT_KERNEL_NOWAIT= is not FLAG"),
        ({"FARFAULT_ANNOTATOR": "gva:0:8:8"}, "is not gva|gpa:EVENT_ID:OFFSET:SIZE"),
        ({"FARFAULT_FAULT_SOURCE": "stock-nowait"}, "stock-nowait needs FARFAULT_ANNOTATOR"),
        (
            {"FARFAULT_FAULT_SOURCE": "stock-nowait", "FARFAULT_ANNOTATOR": "gpa:1073741824:8:8"},
            "stock-nowait cannot work for this user",
        ),
        ({"FARFAULT_UFFD_DEV_FD": "77"}, "FARFAULT_UFFD_DEV_FD=77 is not an open descriptor"),
        ({"FARFAULT_ATTACH": "/" + "x" * 200}, "FARFAULT_ATTACH is longer than 107 bytes"),
    ],
)
def test_variables_that_make_no_sense_are_refused(place: Path, change: dict[str, str], message: str) -> None:
    path = str(place / "vm.ram")
    result = run_vmm("print('alive')", path, variables(path, place / "attach.sock") | change)
    assert result.returncode == 1
    assert message in result.stderr
    assert "alive" not in result.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_rights_needs_the_inherited_device(place: Path, listening: socket.socket) -> None:
    path = str(place / "vm.ram")
    other = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    extra = variables(path, place / "attach.sock")
    with listening:
        refused = subprocess.run(
            [PYTHON, "-S", "-c", VMM + MAP, path], env=extra, capture_output=True, text=True, timeout=TIMEOUT_S, **other
        )  # type: ignore[call-overload]
        assert "userfaultfd is not permitted" in refused.stderr
        device = os.open(abi.DEVICE, os.O_RDWR)
        try:
            handover, descriptors = hand_over(
                MAP + WAIT,
                path,
                extra | {"FARFAULT_UFFD_DEV_FD": str(device)},
                listening,
                pass_fds=(device,),
                **other,
            )
        finally:
            os.close(device)
    assert handover.fault_source is FaultSource.BLOCKING
    assert os.readlink(f"/proc/self/fd/{descriptors[0]}") == "anon_inode:[userfaultfd]"  # noqa: PTH115
    for descriptor in descriptors:
        os.close(descriptor)


def test_hand_over_is_plain_json(place: Path, listening: socket.socket) -> None:
    path = str(place / "vm.ram")
    with listening:
        handover, descriptors = hand_over(MAP + WAIT, path, variables(path, place / "attach.sock"), listening)
    for descriptor in descriptors:
        os.close(descriptor)
    assert HandOver.parse(handover.pack()) == handover
    assert json.loads(handover.pack())[0]["farfault"]["fds"] == ["uffd", "state", "ram0"]
