"""Real QEMUs for tests of the preload library: a source that has run and stopped, and a destination under the shim."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farfault_shim.guest import GuestParameters, Mailbox, load_image, read_mailboxes

MIB = 1 << 20
RAM_BYTES = 32 * MIB
WAIT_S_MAX = 60.0
POLL_S = 0.01
QEMU = shutil.which("qemu-system-x86_64")
FARFAULT = Path(sys.executable).with_name("farfault")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Polls, bounded."""
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_S_MAX} s: {what}"
        time.sleep(POLL_S)


class Qmp:
    """The few commands that these tests need, each waited for with a bound."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_S_MAX)
        wait_for(lambda: self._connects(path), f"QMP at {path}")
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            reply = json.loads(self._file.readline())
            if "return" in reply:
                return reply["return"]
            assert "event" in reply, reply

    def set_ignore_shared(self) -> None:
        self("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _connects(self, path: Path) -> bool:
        try:
            self._socket.connect(str(path))
        except OSError:
            return False
        return True


class Vm:
    """A QEMU that runs the self-verifying guest."""

    def __init__(self, folder: Path, name: str, parameters: GuestParameters, accelerator: str = "kvm") -> None:
        self.parameters = parameters
        self.ram = folder / f"{name}.ram"
        self._qmp_path = folder / f"{name}.qmp"
        self._log_path = folder / f"{name}.log"
        firmware = folder / "guest.bin"
        firmware.write_bytes(parameters.apply(load_image()))
        self.command = [
            *(str(QEMU), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "pc,memory-backend=ram", "-accel", accelerator, "-bios", str(firmware)),
            *("-object", f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path={self.ram},share=on"),
            *("-m", f"{RAM_BYTES // MIB}M", "-smp", str(parameters.vcpus)),
            *("-qmp", f"unix:{self._qmp_path},server,nowait"),
        ]

    @contextmanager
    def running(self, before: Sequence[str] = (), after: Sequence[str] = (), **options: Any) -> Iterator[Qmp]:
        """Starts it with words before and after its command line."""
        with self._log_path.open("wb") as log:
            process = subprocess.Popen([*before, *self.command, *after], stderr=log, **options)
        with process:
            qmp = None
            try:
                qmp = Qmp(self._qmp_path)
                yield qmp
                assert process.poll() is None, self.log()
            finally:
                process.kill()
                if qmp is not None:
                    qmp.close()

    def log(self) -> str:
        return self._log_path.read_text()

    def mailboxes(self) -> list[Mailbox]:
        return read_mailboxes(self.ram, self.parameters.vcpus)

    def passes(self) -> int:
        return min(mailbox.passes for mailbox in self.mailboxes())


def save_source(folder: Path, parameters: GuestParameters) -> tuple[Vm, Path]:
    """Runs a source until it has verified each page once and stops it. Its RAM file stays as it was left.

    Returns:
        The source, no longer running, and the file with its device state.
    """
    source = Vm(folder, "source", parameters)
    state = folder / "device.state"
    with source.running() as qmp:
        wait_for(lambda: source.ram.exists() and source.ram.stat().st_size == RAM_BYTES, "the source's RAM file")
        wait_for(lambda: source.passes() >= 1, "a pass of the source")
        qmp("stop")
        qmp.set_ignore_shared()
        qmp("migrate", uri=f"exec:cat > {state}")
        wait_for(lambda: qmp("query-migrate").get("status") == "completed", "the device state")
    return source, state


def under_farfault(attach: Path, vm: Vm, fault_source: str) -> list[str]:
    """The words of ``farfault run`` before a VMM's command line."""
    options = ["--attach", str(attach), "--ram", str(vm.ram), "--fault-source", fault_source]
    return [str(FARFAULT), "run", *options, "--"]


def load_state(qmp: Qmp, state: Path) -> None:
    """Reads the device state into a VM that was started with ``-incoming defer``."""
    qmp.set_ignore_shared()
    qmp("migrate-incoming", uri=f"exec:cat {state}")
    wait_for(lambda: qmp("query-migrate").get("status") == "completed", "the device state at the destination")
