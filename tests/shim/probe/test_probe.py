"""farfault probe: the parts on made-up trees, the report, and the command on this machine."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from farfault_shim.probe.command import probe
from farfault_shim.probe.host_memory import find_memory
from farfault_shim.probe.render import render
from farfault_shim.probe.survey import Item, State, survey
from farfault_shim.probe.vmms import find_vmms
from farfault_shim.uffd import abi
from rich.console import Console


def test_huge_pages_and_thp(tmp_path: Path) -> None:
    for size, counts in (("2048kB", (8, 5, 1)), ("1048576kB", (0, 0, 0))):
        folder = tmp_path / f"hugepages-{size}"
        folder.mkdir()
        for name, count in zip(("nr", "free", "resv"), counts, strict=True):
            (folder / f"{name}_hugepages").write_text(f"{count}\n")
    thp = tmp_path / "shmem_enabled"
    thp.write_text("always within_size [advise] never deny force\n")
    found = dict(find_memory(tmp_path, thp, tmp_path))
    assert list(found) == ["tmpfs", "huge pages of 2 MiB", "huge pages of 1024 MiB", "THP in shmem"]
    assert found["huge pages of 2 MiB"][:2] == (True, "8 in the pool, 5 free, 1 reserved")
    assert not found["huge pages of 1024 MiB"].ok
    assert "nr_hugepages" in found["huge pages of 1024 MiB"].remedy
    assert found["THP in shmem"][:2] == (True, "advise")


def test_memory_of_a_kernel_without_any(tmp_path: Path) -> None:
    found = dict(find_memory(tmp_path / "none", tmp_path / "none", tmp_path / "none"))
    assert [finding.ok for finding in found.values()] == [False, False, False]


def test_vmms(tmp_path: Path) -> None:
    assert not dict(find_vmms([str(tmp_path / "qemu")]))["QEMU"].ok
    script = tmp_path / "qemu-wrapper"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    found = dict(find_vmms(["env", str(script)]))
    assert found["env"].ok
    assert "is a script" in found[str(script)].detail


def test_report_shows_each_item_and_the_remedy_of_what_is_missing() -> None:
    found = survey()
    extra = Item("made up", "thing [1]", State.MISSING, "is not there", "make it")
    output = io.StringIO()
    shown = type(found)((*found.items, extra), found.facts, found.choice, found.hazards)
    render(shown, Console(file=output, width=400))
    text = output.getvalue()
    for item in shown.items:
        assert item.name in text
        assert item.detail in text
    assert "→ make it" in text
    for verdict in found.choice.verdicts:
        assert verdict.reason in text


def test_json_of_this_machine() -> None:
    result = CliRunner().invoke(probe, ["--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["fault_source"] else 3)
    assert [one["fault_source"] for one in report["candidates"]] == [
        "kernel-nowait",
        "stock-nowait",
        "simulated",
        "blocking",
    ]
    assert [one["fault_source"] for one in report["candidates"] if one["chosen"]] == [report["fault_source"]]
    assert {item["state"] for item in report["items"]} <= {"ok", "missing", "optional"}
    assert all(one["remedy"] or one["works"] or one["fault_source"] == "simulated" for one in report["candidates"])


def test_exit_code_where_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user who may neither open KVM nor make a userfaultfd."""

    def refuse(*unused: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("farfault_shim.sources.host.os.open", refuse)
    monkeypatch.setattr("farfault_shim.sources.userfault._libc.syscall", lambda *unused: -1)
    result = CliRunner().invoke(probe, ["--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 3
    assert report["fault_source"] is None
    assert all(item["remedy"] for item in report["items"] if item["state"] == "missing")
    assert report["hazards"] == []
    tables = CliRunner().invoke(probe, [])
    assert tables.exit_code == 3
    assert "no fault source works here" in tables.stdout


@pytest.mark.skipif(not os.access(abi.DEVICE, os.R_OK | os.W_OK), reason=f"{abi.DEVICE} cannot be opened")
def test_an_inherited_device_is_used_by_scratch_vms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farfault_shim.sources.userfault._libc.syscall", lambda *unused: -1)
    device = os.open(abi.DEVICE, os.O_RDWR)
    try:
        result = CliRunner().invoke(probe, ["--json", "--userfaultfd-device-fd", str(device)])
    finally:
        os.close(device)
    report = json.loads(result.stdout)
    found = {item["name"]: item for item in report["items"]}
    assert found["/dev/userfaultfd"]["detail"] == f"descriptor {device}"
    if "absent page, SIGBUS userfaultfd" in found:
        assert found["absent page, SIGBUS userfaultfd"]["state"] == "ok"


def test_a_kernel_interface_that_is_not_there_is_reported() -> None:
    result = CliRunner().invoke(probe, ["--json", "--kernel-interface", "exit-on-missing:flag=0x80000000:cap=236"])
    candidate = json.loads(result.stdout)["candidates"][0]
    assert not candidate["works"]
    assert candidate["remedy"]
