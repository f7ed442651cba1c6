"""QMP's messages without a socket, and the commands of a VM that waits for a state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from farfault_shim.guest import Machine
from farfault_shim.kvm.simulated import SimulatedVm
from farfault_shim.kvm.simulated_memory import Backing
from farfault_shim.refvmm import qmp
from farfault_shim.refvmm.machine import ReferenceVm
from farfault_shim.refvmm.memory import GuestMemory
from farfault_shim.refvmm.migration import MigrationError, opener_of
from farfault_shim.refvmm.qmp_commands import DESCRIPTORS_MAX, QmpCommands
from refvmm_rig import MIB, ram_path, wait_for


def commands_of(requests: list[qmp.Request]) -> list[tuple[str, dict[str, Any], Any]]:
    return [(request.command, dict(request.arguments), request.request_id) for request in requests]


def test_one_object_a_line() -> None:
    reader = qmp.RequestReader()
    requests = reader.received(b'{"execute": "stop", "id": "1"}\r\n{"execute": "x", "arguments": {"a": 1}}\n')
    assert commands_of(requests) == [("stop", {}, "1"), ("x", {"a": 1}, None)]


def test_any_white_space_between_objects_and_braces_in_strings() -> None:
    reader = qmp.RequestReader()
    text = b' \n\t{"execute": "a{\\"}b", "arguments": {"x": {"y": "}"}}}{"execute": "c"} '
    assert commands_of(reader.received(text)) == [('a{"}b', {"x": {"y": "}"}}, None), ("c", {}, None)]


def test_requests_in_pieces() -> None:
    reader = qmp.RequestReader()
    text = b' {"execute": "query-status", "arguments": {}, "id": 7}\r\n{"execute": "quit"}'
    seen = [request for index in range(len(text)) for request in reader.received(text[index : index + 1])]
    assert commands_of(seen) == [("query-status", {}, 7), ("quit", {}, None)]


@pytest.mark.parametrize(
    "text",
    [b"hello\n", b"[1]\n", b'{"a": 1}\n', b'{"execute": 1}\n', b"{oops}\n", b'{"execute": "a", "arguments": 1}\n'],
)
def test_nonsense_is_an_error_and_the_next_request_is_read(text: bytes) -> None:
    reader = qmp.RequestReader()
    bad, good = reader.received(text + b'{"execute": "ok"}\n')
    assert bad.error
    assert good.command == "ok"


def test_a_message_without_end_is_dropped() -> None:
    reader = qmp.RequestReader()
    (request,) = reader.received(b'{"execute": "' + b"x" * qmp.BUFFER_BYTES_MAX)
    assert "more than" in request.error
    assert commands_of(reader.received(b'{"execute": "ok"}')) == [("ok", {}, None)]


def test_messages_of_the_server() -> None:
    request = qmp.Request("stop", request_id="a")
    assert json.loads(qmp.greeting())["QMP"]["capabilities"] == []
    assert json.loads(qmp.reply(request, {})) == {"return": {}, "id": "a"}
    assert json.loads(qmp.failure(request, "no")) == {"error": {"class": "GenericError", "desc": "no"}, "id": "a"}
    assert json.loads(qmp.event("STOP", None, 12.5)) == {
        "event": "STOP",
        "timestamp": {"seconds": 12, "microseconds": 500000},
    }


class Console:
    """A VM in state inmigrate and its commands."""

    def __init__(self, vm: ReferenceVm) -> None:
        self.events: list[tuple[str, Mapping[str, Any] | None]] = []
        self.quits = 0
        self.problem = ""
        self.commands = QmpCommands(vm, lambda *event: self.events.append(event), lambda: self.problem, self.quit)

    def quit(self) -> None:
        self.quits += 1

    def __call__(self, command: str, **arguments: object) -> Any:
        return json.loads(self.commands.run(qmp.Request(command, arguments)))["return"]

    def error(self, command: str, **arguments: object) -> str:
        return str(json.loads(self.commands.run(qmp.Request(command, arguments)))["error"]["desc"])


@pytest.fixture
def console() -> Iterator[Console]:
    with ram_path() as path:
        memory = GuestMemory(path, 32 * MIB, Machine.PC)
        kvm = SimulatedVm([Backing(memory.base.hva, memory.size_bytes, memory.descriptor)], watched=False)
        vm = ReferenceVm(kvm, memory, 2, kvmclock=True, incoming=True)
        made = Console(vm)
        yield made
        made.commands.close()
        vm.close()


def turn_on(console: Console) -> None:
    wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
    assert console("migrate-set-capabilities", capabilities=wanted) == {}


def test_queries(console: Console) -> None:
    assert console("query-status")["status"] == "inmigrate"
    assert console("query-memdev") == [{"id": "ram", "size": 32 * MIB, "share": True}]
    assert console("query-cpus-fast") == [{"cpu-index": 0}, {"cpu-index": 1}]
    assert console("query-kvm")["enabled"] is False
    assert console("qom-get", path="/machine", property="type") == "pc-machine"
    assert console("query-migrate") == {}
    assert console("query-version")["package"] == ""
    assert {item["capability"] for item in console("query-migrate-capabilities")} == {"x-ignore-shared", "events"}


def test_errors(console: Console) -> None:
    assert "has not been found" in console.error("eject")
    assert "has not been found" in console.error("__init__")
    assert "wrong arguments" in console.error("stop", now=True)
    assert "inmigrate" in console.error("cont")
    assert "unknown migration capability" in console.error(
        "migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}]
    )
    assert "no property" in console.error("qom-get", path="/machine", property="name")
    assert "x-ignore-shared" in console.error("migrate", uri="fd:x")
    assert "no descriptor came" in console.error("getfd", fdname="x")
    assert "is open" in console.error("closefd", fdname="x")
    turn_on(console)
    assert "passed by getfd" in console.error("migrate-incoming", uri="fd:x")
    assert "neither" in console.error("migrate-incoming", uri="tcp:1.2.3.4:5")
    console.problem = "memory is still arriving"
    assert "still arriving" in console.error("migrate", uri="fd:x")
    assert console("migrate_cancel") == {}


def test_quit_says_good_bye(console: Console) -> None:
    assert console("quit") == {}
    assert console.quits == 1
    assert console.events[-1][0] == "SHUTDOWN"


def test_descriptors_are_bounded_and_closed(console: Console) -> None:
    ends = [os.pipe() for _ in range(DESCRIPTORS_MAX + 1)]
    console.commands.passed([reader for reader, _ in ends])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends[-1][0])
    assert console("getfd", fdname="state") == {}
    assert console("getfd", fdname="state") == {}  # closes the first of that name
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends[0][0])
    assert console("closefd", fdname="state") == {}
    for _, writer in ends:
        os.close(writer)


def test_a_broken_state_fails_and_the_vm_still_waits(console: Console, tmp_path: object) -> None:
    turn_on(console)
    path = f"{tmp_path}/m.sock"
    assert console("migrate-incoming", uri=f"unix:{path}") == {}
    assert "under way" in console.error("migrate-incoming", uri=f"unix:{path}2")
    with opener_of(f"unix:{path}", {}, incoming=False)() as stream:
        stream.sendall(b"not a state")
    wait_for(lambda: console("query-migrate").get("status") == "failed", "the failure")
    assert "cut short" in console("query-migrate")["error-desc"]
    assert console("query-status")["status"] == "inmigrate"
    statuses = [data["status"] for name, data in console.events if name == "MIGRATION" and data]
    assert statuses == ["setup", "active", "failed"]


def test_a_state_cannot_be_sent_where_nobody_listens(tmp_path: object) -> None:
    with pytest.raises(MigrationError, match="migrate-incoming"):
        opener_of(f"unix:{tmp_path}/nobody", {}, incoming=False)()
