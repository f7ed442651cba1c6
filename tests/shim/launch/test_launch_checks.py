"""What farfault run refuses before it starts a VMM, and the variables that it sets."""

from __future__ import annotations

import shlex
import shutil
import stat
from pathlib import Path

import pytest
from farfault_cli.errors import FarfaultError, UsageError
from farfault_shim.annotate import AddressKind, Annotator
from farfault_shim.attach.wire import FaultSource
from farfault_shim.kvm.nowait import EXIT_ON_MISSING, NowaitInterface, NowaitSeries
from farfault_shim.launch import checks
from farfault_shim.launch.environment import as_json, as_shell, merge, shim_variables
from farfault_shim.sources import Choice

LIBRARY = Path("/lib/libfarfault_shim.so")
ATTACH = Path("/run/vm.sock")


def choice(source: FaultSource, interface: NowaitInterface | None = None) -> Choice:
    return Choice(source, (), Annotator(AddressKind.GPA, 100, 24, 8), interface)


def test_library_that_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(FarfaultError, match="make native"):
        checks.find_library(tmp_path)


def test_dynamically_linked_program_is_found_on_path() -> None:
    env = shutil.which("env")
    assert env is not None
    assert checks.find_vmm("env") == Path(env)


def test_missing_program_script_and_other_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an executable file on PATH"):
        checks.find_vmm(str(tmp_path / "qemu"))
    for content, message in ((b"#!/bin/sh\n", "is a script"), (b"MZ" + bytes(64), "is not an ELF program")):
        program = tmp_path / "program"
        program.write_bytes(content)
        program.chmod(0o755)
        with pytest.raises(UsageError, match=message):
            checks.find_vmm(str(program))


@pytest.mark.parametrize(
    ("position", "value", "message"), [(4, 1, "not a 64-bit"), (5, 2, "not a 64-bit"), (56, 0, "statically linked")]
)
def test_other_class_and_static_program(tmp_path: Path, position: int, value: int, message: str) -> None:
    """A real program whose header is changed: class, byte order, number of program headers."""
    image = bytearray(Path(shutil.which("env") or "").read_bytes())
    image[position] = value
    program = tmp_path / "program"
    program.write_bytes(image)
    program.chmod(0o755)
    with pytest.raises(UsageError, match=message):
        checks.find_vmm(str(program))


def test_set_uid_program_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    shutil.copy(shutil.which("env") or "", program)
    program.chmod(0o755 | stat.S_ISUID)
    assert checks.find_vmm(str(program)) == program
    monkeypatch.setattr("os.geteuid", lambda: program.stat().st_uid + 1)
    with pytest.raises(UsageError, match="set-uid"):
        checks.find_vmm(str(program))


def test_attach_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checks.check_attach(Path("vm.sock")) == tmp_path / "vm.sock"
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        checks.check_attach(Path("/" + "x" * 107))
    with pytest.raises(UsageError, match="is not a folder"):
        checks.check_attach(Path("missing/vm.sock"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a socket"):
        checks.check_attach(Path("file"))


def test_ram_files_are_absolute_with_links_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (tmp_path / "real" / "empty.ram").open("wb") as file:
        file.truncate(1 << 20)
    names = ["link/new.ram", "link/empty.ram", "memfd=ram"]
    found = checks.check_ram(names)
    assert found == [str(tmp_path / "real/new.ram"), str(tmp_path / "real/empty.ram"), "memfd=ram"]
    arguments = ["-object", f"memory-backend-file,id=a,mem-path={tmp_path}/real/new.ram"]
    assert checks.ram_not_on_command_line(found, names, arguments) == ["link/empty.ram"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "0 RAM files"),
        (["a"] * 65, "65 RAM files"),
        (["a", "./a"], "named twice"),
        (["a:b"], "must not have a colon"),
        (["missing/a"], "is not a folder"),
        (["."], "is not a file"),
        (["full"], "already holds 4 KiB"),
    ],
)
def test_ram_that_would_go_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").write_bytes(bytes(4096))
    with pytest.raises(UsageError, match=message):
        checks.check_ram(names)


def test_variables_of_each_source() -> None:
    common = {"LD_PRELOAD": str(LIBRARY), "FARFAULT_ATTACH": "/run/vm.sock", "FARFAULT_RAM": "/a:memfd=b"}
    made = {
        source: shim_variables(LIBRARY, ATTACH, ["/a", "memfd=b"], choice(source, EXIT_ON_MISSING))
        for source in (FaultSource.BLOCKING, FaultSource.STOCK_NOWAIT, FaultSource.KERNEL_NOWAIT)
    }
    assert made[FaultSource.BLOCKING] == common | {"FARFAULT_FAULT_SOURCE": "blocking"}
    assert made[FaultSource.STOCK_NOWAIT] == common | {
        "FARFAULT_FAULT_SOURCE": "stock-nowait",
        "FARFAULT_ANNOTATOR": "gpa:100:24:8",
    }
    assert made[FaultSource.KERNEL_NOWAIT] == common | {
        "FARFAULT_FAULT_SOURCE": "kernel-nowait",
        "FARFAULT_KERNEL_NOWAIT": "8",
    }


def test_first_series_names_the_capability_to_enable_and_the_device_is_passed_on() -> None:
    interface = NowaitInterface(NowaitSeries.ABSENT_MAPPING_FAULT, 231, 1 << 4)
    made = shim_variables(LIBRARY, ATTACH, ["/a"], choice(FaultSource.KERNEL_NOWAIT, interface), 5)
    assert made["FARFAULT_KERNEL_NOWAIT"] == "16:232"
    assert made["FARFAULT_UFFD_DEV_FD"] == "5"


def test_merging_keeps_other_libraries_and_drops_stale_variables() -> None:
    variables = shim_variables(LIBRARY, ATTACH, ["/a"], choice(FaultSource.BLOCKING))
    merged = merge({"PATH": "/bin", "LD_PRELOAD": "other.so", "FARFAULT_ANNOTATOR": "gva:1:8:8"}, variables)
    assert merged == variables | {"PATH": "/bin", "LD_PRELOAD": f"{LIBRARY}:other.so"}
    assert merge({}, variables) == variables


def test_printed_forms() -> None:
    variables = {"A": "1", "B": "two words"}
    lines = [shlex.split(line) for line in as_shell(variables).splitlines()]
    assert lines == [["export", "A=1"], ["export", "B=two words"]]
    assert as_json(variables) == '{\n  "A": "1",\n  "B": "two words"\n}\n'
