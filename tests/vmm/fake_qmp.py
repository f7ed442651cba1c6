"""A VMM that serves the subset of QMP that farfault_vmm documents, and misbehaves as a test tells it to."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECEIVE_BYTES_MAX = 64 << 10
DESCRIPTORS_MAX = 4
GREETING = {"QMP": {"version": {"fake": {"major": 1, "minor": 2, "micro": 3}, "package": ""}, "capabilities": []}}


@dataclass(frozen=True)
class Refuse:
    """The reply is an error with this description."""

    description: str


class Hang:
    """There is no reply."""


class Drop:
    """The VMM ends instead of a reply."""


Handler = Callable[["FakeVmm", Mapping[str, Any]], object]


class FakeVmm:
    """The state of the VMM. Change it, or put an entry of `replies` in place, before or while it is used.

    Attributes:
        status: run state; `commands` change it as QEMU does.
        commands: names of all commands so far.
        replies: by command: `Refuse`, `Hang`, `Drop`, a value, or a function that gives one of these.
        device_state: what `migrate` writes; after `migrate-incoming`: what was read.
        ends_as: the last MIGRATION status of the next `migrate` or `migrate-incoming`.
        error: ``error-desc`` of query-migrate.
        greeting: what a client is told first; None: nothing.
        connections: open ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = "running"
        self.commands: list[str] = []
        self.replies: dict[str, object] = dict(DEFAULT_REPLIES)
        self.device_state = bytes(range(256)) * 1000
        self.ends_as = "completed"
        self.error = ""
        self.greeting: bytes | None = json.dumps(GREETING).encode() + b"\r\n"
        self.connections = 0
        self.migration = ""
        self.capabilities: dict[str, bool] = {"events": False, "x-ignore-shared": False}
        self.descriptors: dict[str, socket.socket] = {}
        self._passed: list[int] = []
        self._client: socket.socket | None = None
        self._transfer: asyncio.Task[None] | None = None
        self.release = asyncio.Event()
        self.half_sent = asyncio.Event()
        self.may_stop = asyncio.Event()

    def event(self, name: str, **data: object) -> None:
        """Sends an event."""
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        timestamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
        self._send({"event": name, "timestamp": timestamp, "data": data})

    def migration_event(self, status: str) -> None:
        self.migration = status
        if self.capabilities["events"]:
            self.event("MIGRATION", status=status)

    def drop(self) -> None:
        """Ends the connection."""
        if self._client is not None:
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)

    def start(self, transfer: Callable[[socket.socket], Any], arguments: Mapping[str, Any]) -> None:
        state = self.descriptors.pop(arguments["uri"].removeprefix("fd:"))
        self._transfer = asyncio.create_task(self._run(transfer, state))

    async def _run(self, transfer: Callable[[socket.socket], Any], state: socket.socket) -> None:
        with state:
            self.migration_event("active")
            try:
                await transfer(state)
            except OSError:
                self.migration_event("failed")
                return
            self.migration_event(self.ends_as)

    async def save(self, state: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(state, self.device_state)
        self.status = "postmigrate"

    async def load(self, state: socket.socket) -> None:
        received = b""
        while chunk := await asyncio.get_running_loop().sock_recv(state, RECEIVE_BYTES_MAX):
            received += chunk
        self.device_state, self.status = received, "paused"

    def cancel_transfer(self) -> None:
        if self._transfer is not None and not self._transfer.done():
            self._transfer.cancel()
            self.migration_event("cancelled")

    async def serve(self, listener: socket.socket) -> None:
        """Serves one client after the other."""
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            self._client = client
            self.connections += 1
            try:
                with client:
                    if self.greeting is not None:
                        await loop.sock_sendall(client, self.greeting)
                    await self._talk(client)
            except OSError:
                pass
            finally:
                self.connections -= 1

    async def _talk(self, client: socket.socket) -> None:
        buffer = ""
        while data := await self._receive(client):
            buffer = (buffer + data.decode()).lstrip()
            while buffer:
                try:
                    request, end = json.JSONDecoder().raw_decode(buffer)
                except ValueError:
                    break  # the rest is still on its way
                buffer = buffer[end:].lstrip()
                self._obey(request)

    async def _receive(self, client: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(client, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(client)
        data, descriptors, _, _ = socket.recv_fds(client, RECEIVE_BYTES_MAX, DESCRIPTORS_MAX)
        self._passed += descriptors
        return data

    def _obey(self, request: Mapping[str, Any]) -> None:
        command, arguments = request["execute"], request.get("arguments", {})
        identity = {"id": request["id"]} if "id" in request else {}
        self.commands.append(command)
        reply = self.replies.get(command, Refuse(f"The command {command} has not been found"))
        if callable(reply):
            reply = reply(self, arguments)
        if isinstance(reply, Refuse):
            self._send({"error": {"class": "GenericError", "desc": reply.description}} | identity)
        elif isinstance(reply, Drop):
            self.drop()
        elif not isinstance(reply, Hang):
            self._send({"return": reply} | identity)

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._client is not None
        with suppress(OSError):
            self._client.sendall(json.dumps(message).encode() + b"\r\n")

    def take_descriptor(self, name: str) -> object:
        if not self._passed:
            return Refuse("No file descriptor supplied via SCM_RIGHTS")
        descriptor = self._passed.pop(0)
        os.set_blocking(descriptor, False)
        self.descriptors[name] = socket.socket(fileno=descriptor)
        return {}

    def close(self) -> None:
        self.cancel_transfer()
        for descriptor in self.descriptors.values():
            descriptor.close()
        for number in self._passed:
            os.close(number)


@asynccontextmanager
async def fake_vmm(path: Path, *, status: str = "running") -> AsyncIterator[FakeVmm]:
    """A fake VMM that listens at `path`."""
    vmm = FakeVmm(path)
    vmm.status = status
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
        server = asyncio.create_task(vmm.serve(listener))
        try:
            yield vmm
        finally:
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)
            vmm.close()


def stop(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    vmm.may_stop.set()
    if vmm.status == "running":
        vmm.status = "paused"
        vmm.event("STOP")
    return {}


def cont(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    vmm.status = "running"
    vmm.event("RESUME")
    return {}


def migrate(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    vmm.start(vmm.save, arguments)
    return {}


def migrate_and_wait(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    """Writes half of the device state, and the rest only when `release` is set."""

    async def save(state: socket.socket) -> None:
        half = len(vmm.device_state) // 2
        await asyncio.get_running_loop().sock_sendall(state, vmm.device_state[:half])
        await vmm.release.wait()
        await asyncio.get_running_loop().sock_sendall(state, vmm.device_state[half:])

    vmm.start(save, arguments)
    return {}


def migrate_as_qemu(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    """Writes half of the device state, and the rest when `may_stop` is set, as by `stop`: the VM stops then."""

    async def save(state: socket.socket) -> None:
        half = len(vmm.device_state) // 2
        await asyncio.get_running_loop().sock_sendall(state, vmm.device_state[:half])
        vmm.half_sent.set()
        await vmm.may_stop.wait()
        if vmm.status == "running":
            vmm.event("STOP")
        vmm.status = "finish-migrate"
        await asyncio.get_running_loop().sock_sendall(state, vmm.device_state[half:])
        vmm.status = "postmigrate"

    vmm.start(save, arguments)
    return {}


def migrate_incoming(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    if vmm.status != "inmigrate":
        return Refuse("'-incoming' was not specified on the command line")
    vmm.start(vmm.load, arguments)
    return {}


def migrate_cancel(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    vmm.cancel_transfer()
    return {}


def query_migrate(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    status = {"status": vmm.migration} if vmm.migration else {}
    return status | ({"error-desc": vmm.error} if vmm.error else {})


def set_capabilities(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
    for item in arguments["capabilities"]:
        if item["capability"] not in vmm.capabilities:
            return Refuse(f"Parameter 'capability' does not accept value '{item['capability']}'")
        vmm.capabilities[item["capability"]] = item["state"]
    return {}


DEFAULT_REPLIES: Mapping[str, object] = {
    "qmp_capabilities": {},
    "query-status": lambda vmm, _: {"status": vmm.status, "running": vmm.status == "running"},
    "qom-get": "fake-board-1.2-machine",
    "query-memdev": [{"id": "ram", "size": 128 << 20, "share": True}, {"size": 1 << 20, "share": False}],
    "query-cpus-fast": [{"cpu-index": 0}, {"cpu-index": 1}],
    "query-kvm": {"enabled": False, "present": True},
    "query-migrate": query_migrate,
    "query-migrate-capabilities": lambda vmm, _: [
        {"capability": name, "state": state} for name, state in vmm.capabilities.items()
    ],
    "migrate-set-capabilities": set_capabilities,
    "getfd": lambda vmm, arguments: vmm.take_descriptor(arguments["fdname"]),
    "stop": stop,
    "cont": cont,
    "migrate": migrate,
    "migrate-incoming": migrate_incoming,
    "migrate_cancel": migrate_cancel,
    "quit": Drop(),
}
