"""The Linux guest as a VM: command lines of unmodified QEMU for both ends of a move, and how it is asked and watched.

The guest runs under TCG, where QEMU's own threads make every memory access of the guest: blocking userfaultfd moves it
on any host, with or without KVM. Its RAM is one shared file, which the page server reads.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from farfault_cli.errors import FarfaultError

from farfault_client.demo.linux.image import MIB, GuestImage
from farfault_client.demo.linux.serial_log import SerialLog, parse_serial

QEMU = "qemu-system-x86_64"
ANSWER_PORT = 7
POLL_S = 0.05
CONNECT_TIMEOUT_S = 5.0
"""Of one question to the guest; the host's side of QEMU accepts it even while the guest cannot answer."""

ANSWER_BYTES_MAX = 256
SERIAL_TAIL_LINES = 8


@dataclass(frozen=True)
class LinuxVm:
    """One end of a move. The two ends differ in `directory`, `ram` and `host_port` only (`dataclasses.replace`).

    Attributes:
        image: from `build_image`.
        directory: of this end alone; QEMU's sockets and the console's log lie here. Sockets limit a path to 107 bytes.
        ram: the RAM file, on tmpfs; `create_ram` makes it.
        host_port: TCP port of this host at which the guest answers, see `ask`.
        ram_bytes: at least 192 MiB with the default worker.
        vcpus: 1 or more.
        machine: a QEMU machine type with PCI, such as ``q35`` or ``pc``.
        worker_mib: memory that the worker verifies.
        pause_ms: the worker's rest after each tick.
        stale_mib: memory that is written and freed before all else; without it most free pages are still zero.
        balloon: whether there is a virtio balloon; QMP ``balloon`` inflates it.
    """

    image: GuestImage
    directory: Path
    ram: Path
    host_port: int
    ram_bytes: int = 256 * MIB
    vcpus: int = 2
    machine: str = "q35"
    worker_mib: int = 96
    pause_ms: int = 10
    stale_mib: int = 0
    balloon: bool = False

    @property
    def qmp_socket(self) -> Path:
        """Where QEMU listens for QMP, for the side that moves the VM."""
        return self.directory / "qmp.sock"

    @property
    def operator_socket(self) -> Path:
        """A second QMP socket, for everybody else: QEMU serves one client at a time on each."""
        return self.directory / "operator.sock"

    @property
    def serial_log(self) -> Path:
        """What the guest wrote on its console while it ran at this end."""
        return self.directory / "serial.log"

    def create_ram(self) -> None:
        """Makes the RAM file, sparse and empty."""
        with self.ram.open("xb") as file:
            file.truncate(self.ram_bytes)

    def source_argv(self) -> list[str]:
        """QEMU that boots the guest at once."""
        return [*self._machine_argv(), *self._boot_argv(), *self._devices_argv()]

    def destination_argv(self) -> list[str]:
        """QEMU that waits for QMP ``migrate-incoming``: until then it writes no guest memory.

        Put ``farfault run ... --`` in front of it to have its pages fetched.
        """
        return [*self.source_argv(), "-incoming", "defer"]

    def _machine_argv(self) -> list[str]:
        # The backend's id names the RAM block in the migration stream, so it is the same at both ends.
        backend = f"memory-backend-file,id=mem,size={self.ram_bytes},mem-path={self.ram},share=on"
        return [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none"),
            "-no-reboot",  # a guest that dies ends QEMU; it must not start afresh unseen
            *("-accel", "tcg", "-cpu", "qemu64", "-smp", str(self.vcpus), "-m", f"{self.ram_bytes // MIB}M"),
            *("-object", backend, "-machine", f"{self.machine},memory-backend=mem"),
        ]

    def _boot_argv(self) -> list[str]:
        # An emulated CPU has none of the flaws that mitigations slow it down for.
        options = ["console=ttyS0", "quiet", "panic=-1", "mitigations=off"]
        options += [f"farfault.{name}={getattr(self, name)}" for name in ("worker_mib", "pause_ms", "stale_mib")]
        return [
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs)),
            *("-append", " ".join(options)),
        ]

    def _devices_argv(self) -> list[str]:
        disk = f"if=none,id=disk,file={self.image.disk},format=raw,readonly=on,cache=none,aio=threads"
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.host_port}-:{ANSWER_PORT}"
        balloon = ("-device", "virtio-balloon-pci,id=balloon") if self.balloon else ()
        return [
            *("-drive", disk, "-device", "virtio-blk-pci,drive=disk"),
            *("-netdev", network, "-device", "virtio-net-pci,netdev=net,mac=52:54:00:66:66:01,romfile="),
            *("-device", "virtio-rng-pci", *balloon),
            *("-serial", f"file:{self.serial_log}"),
            *("-qmp", f"unix:{self.qmp_socket},server=on,wait=off"),
            *("-qmp", f"unix:{self.operator_socket},server=on,wait=off"),
        ]


def free_tcp_port() -> int:
    """A port of the loopback address that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_serial(*ends: LinuxVm) -> SerialLog:
    """What the guest has written, the ends in the order in which it ran there: ``read_serial(source, destination)``."""
    return parse_serial(b"".join(_read_if_there(end.serial_log) for end in ends))


async def wait_for(
    condition: Callable[[SerialLog], bool],
    *ends: LinuxVm,
    timeout_s: float,
    alive: Callable[[], bool] = lambda: True,
) -> SerialLog:
    """Watches the console until the condition holds for it.

    Args:
        condition: such as ``lambda log: log.last_tick >= 100``.
        ends: as for `read_serial`.
        timeout_s: bound of the wait.
        alive: False ends the wait: QEMU is gone.

    Raises:
        FarfaultError: not in time, the guest's kernel died, or QEMU is gone. It quotes the console's last lines.
    """
    for _ in range(max(1, round(timeout_s / POLL_S))):
        running = alive()
        log = read_serial(*ends)
        if condition(log):
            return log
        if log.panic or not running:
            raise FarfaultError(f"the guest is gone after tick {log.last_tick}; {_tail(ends)}")
        await asyncio.sleep(POLL_S)
    raise FarfaultError(f"the guest is at tick {log.last_tick} after {timeout_s} s; {_tail(ends)}")


@dataclass(frozen=True)
class Answer:
    """What the guest said: the text of the question, and its seconds since boot."""

    text: str
    uptime_s: float


async def ask(end: LinuxVm, text: str, *, timeout_s: float) -> Answer:
    """Sends the guest a line over TCP and reads its answer; tries again until the guest answers.

    Args:
        end: where the guest runs.
        text: without a newline.
        timeout_s: bound of all tries together.

    Raises:
        FarfaultError: no answer in time.
    """
    reason: object = "never tried"
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for _ in range(max(1, round(timeout_s / POLL_S))):
                try:
                    return await _ask_once(end.host_port, text)
                except (OSError, ValueError) as error:
                    reason = error
                await asyncio.sleep(POLL_S)
    raise FarfaultError(f"the guest behind 127.0.0.1:{end.host_port} has not answered in {timeout_s} s: {reason!r}")


async def _ask_once(port: int, text: str) -> Answer:
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=ANSWER_BYTES_MAX)
        try:
            writer.write(f"{text}\n".encode())
            line = (await reader.readline()).decode()
        finally:
            writer.close()
    echoed, _, uptime_s = line.rstrip("\n").rpartition(" ")
    if echoed != text:
        raise ValueError(f"answered {line!r}")
    return Answer(echoed, float(uptime_s))


def _read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _tail(ends: tuple[LinuxVm, ...]) -> str:
    lines = b"".join(_read_if_there(end.serial_log) for end in ends).decode(errors="replace").splitlines()
    return "its console ends with:\n    " + "\n    ".join(lines[-SERIAL_TAIL_LINES:] or ["(nothing)"])
