"""Reference VMMs as processes, controlled as a QEMU is: they save, load, move and end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from farfault_cli.errors import FarfaultError
from farfault_shim.guest import GuestParameters, Mailbox, read_mailboxes, total_touched, verify_ram
from farfault_vmm.description import compare
from farfault_vmm.qmp import QmpVmm
from refvmm_rig import MIB, POLL_S, needs_image, needs_kvm, ram_path, wait_for
from tiny_receiver import TinyReceiver

RAM_BYTES = 64 * MIB
PAGES = 2000
VCPUS = 2
PARAMETERS = GuestParameters.for_ram(RAM_BYTES, VCPUS, pages_max=PAGES)
END_TIMEOUT_S = 20.0
pytestmark = needs_image

kvms = pytest.mark.parametrize(
    "kvm", [pytest.param([], marks=needs_kvm, id="kvm"), pytest.param(["--simulated"], id="simulated")]
)


def command(ram: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "farfault_cli", "reference-vmm", "--ram", str(ram), "--size", "64MiB"),
        *("--vcpus", str(VCPUS), "--pages", str(PAGES), *options),
    ]


@contextmanager
def process(ram: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command(ram, *options), stderr=subprocess.PIPE) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.kill()


class Host:
    """A reference VMM with QMP."""

    def __init__(self, ram: Path, qmp: Path, started: subprocess.Popen[bytes]) -> None:
        self.ram = ram
        self.qmp = qmp
        self.process = started

    def mailboxes(self) -> list[Mailbox]:
        return read_mailboxes(self.ram, VCPUS)

    def wait_for_passes(self, least: int) -> None:
        def done() -> bool:
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read().decode()
            return all(mailbox.passes >= least for mailbox in self.mailboxes())

        wait_for(done, f"{least} passes")

    async def connect(self) -> QmpVmm:
        async with asyncio.timeout(END_TIMEOUT_S):
            while not self.qmp.exists():
                assert self.process.poll() is None, self.process.stderr and self.process.stderr.read().decode()
                await asyncio.sleep(POLL_S)
        return await QmpVmm.connect(self.qmp)


@contextmanager
def host(*options: str) -> Iterator[Host]:
    with ExitStack() as stack:
        ram = stack.enter_context(ram_path())
        qmp = ram.with_suffix(".qmp")
        stack.callback(qmp.unlink, missing_ok=True)
        started = stack.enter_context(process(ram, "--qmp", str(qmp), *options))
        yield Host(ram, qmp, started)


async def state_of(source: QmpVmm) -> list[bytes]:
    return [chunk async for chunk in source.suspend()]


async def replay(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@kvms
async def test_a_saved_vm_goes_on_in_another_process_on_a_copy_of_its_ram(kvm: list[str]) -> None:
    with host(*kvm) as one, host(*kvm, "--incoming", "defer") as two:
        source, destination = await one.connect(), await two.connect()
        one.wait_for_passes(1)
        await source.prepare_source()
        await destination.prepare_destination()
        problems = [
            check for check in compare(await source.describe(), await destination.describe()) if not check.passed
        ]
        assert not problems

        state = await state_of(source)
        assert await source.status() == "postmigrate"
        stopped = one.mailboxes()
        with one.ram.open("rb") as copied, two.ram.open("r+b") as copy:
            shutil.copyfileobj(copied, copy)
        await destination.load(replay(state))
        assert await destination.status() == "paused"
        assert two.mailboxes() == stopped
        await destination.cont()
        two.wait_for_passes(max(mailbox.passes for mailbox in stopped) + 1)
        await destination.stop()

        went_on = two.mailboxes()
        assert one.mailboxes() == stopped
        assert total_touched(went_on) > total_touched(stopped)
        assert all(mailbox.boots == 1 and mailbox.errors == 0 for mailbox in went_on)
        assert all(mailbox.clock_reads and not mailbox.clock_backwards for mailbox in went_on)
        with two.ram.open("rb") as file:
            check = verify_ram(file.fileno(), PARAMETERS, went_on)
        assert check.ok, check.problems

        await source.resume()
        one.wait_for_passes(max(mailbox.passes for mailbox in stopped) + 1)
        for vmm, which in ((source, one), (destination, two)):
            await vmm.quit()
            assert which.process.wait(END_TIMEOUT_S) == 0
            assert not which.qmp.exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--fault-source", "stock-nowait"], marks=needs_kvm, id="stock-nowait"),
        pytest.param(["--fault-source", "blocking"], marks=needs_kvm, id="blocking"),
        pytest.param(["--simulated"], id="simulated"),
        pytest.param(["--simulated", "--profile", "rough", "--seed", "3"], id="rough"),
    ],
)
async def test_post_copy(options: list[str]) -> None:
    kvm = [option for option in options if option == "--simulated"]
    attach = Path(f"/dev/shm/ff-{os.getpid()}-{options[-1]}.sock")
    with host(*kvm) as one, host(*options, "--incoming", "defer", "--attach", str(attach)) as two:
        source, destination = await one.connect(), await two.connect()
        one.wait_for_passes(1)
        await source.prepare_source()
        await destination.prepare_destination()
        with TinyReceiver(attach, one.ram) as receiver:
            assert await asyncio.to_thread(receiver.attached.wait, END_TIMEOUT_S)
            state = await state_of(source)
            stopped = one.mailboxes()
            await destination.load(replay(state))
            await destination.cont()
            await asyncio.to_thread(two.wait_for_passes, max(mailbox.passes for mailbox in stopped) + 2)
            assert await destination.status() == "running"
            with pytest.raises(FarfaultError, match="still arriving"):
                await state_of(destination)
            await asyncio.to_thread(receiver.release)
            assert not receiver.escalated
        await destination.stop()
        went_on = two.mailboxes()
        assert all(mailbox.boots == 1 and mailbox.errors == 0 and mailbox.clock_version for mailbox in went_on)
        assert not any(mailbox.clock_backwards for mailbox in went_on)
        with two.ram.open("rb") as file:
            check = verify_ram(file.fileno(), PARAMETERS, went_on)
        assert check.ok, check.problems
        await source.close()
        await destination.quit()
        assert two.process.wait(END_TIMEOUT_S) == 0


@kvms
async def test_a_failed_save_lets_the_source_go_on(kvm: list[str]) -> None:
    with host(*kvm) as one:
        source = await one.connect()
        one.wait_for_passes(1)
        chunks = source.suspend()
        await anext(chunks)
        await chunks.aclose()
        assert await source.status() == "running"
        one.wait_for_passes(max(mailbox.passes for mailbox in one.mailboxes()) + 1)
        await source.close()


async def test_a_state_of_another_vm_is_refused() -> None:
    with host("--simulated") as one, host("--simulated", "--machine", "q35", "--incoming", "defer") as two:
        source, destination = await one.connect(), await two.connect()
        await destination.prepare_destination()
        with pytest.raises(FarfaultError, match="another machine: pc, this VM has q35"):
            await destination.load(replay(await state_of(source)))
        await source.close()
        await destination.close()


@kvms
def test_the_command_ends_after_its_passes_with_a_verdict(kvm: list[str]) -> None:
    with ram_path() as path:
        for _ in range(2):  # the file may be used again
            done = subprocess.run(command(path, "--passes", "2", "--json", *kvm), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            result = json.loads(done.stdout)
            assert result["kvm"] == ("simulated" if kvm else "kvm")
            assert result["passes"] >= 2
            assert (result["errors"], result["wrong"], result["pages"]) == (0, 0, PAGES)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(number: signal.Signals) -> None:
    with host("--simulated") as one:
        wait_for(one.qmp.exists, "the QMP socket")  # RAM is there before
        wait_for(lambda: one.mailboxes()[0].filled > 0, "the guest to run")
        one.process.send_signal(number)
        assert one.process.wait(END_TIMEOUT_S) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--incoming", "defer"], "add --qmp"),
        (["--size", "64"], "the guest does not fit"),
        (["--size", "some"], "is no size"),
        (["--qmp", "/nowhere/q"], "cannot listen"),
        (["--qmp", "/tmp/" + "x" * 120], "is longer than"),
    ],
)
def test_wrong_use_says_what_to_do(options: list[str], message: str) -> None:
    with ram_path() as path:
        done = subprocess.run(command(path, "--simulated", *options), capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr


def test_a_ram_file_of_another_size_is_not_touched() -> None:
    with ram_path() as path:
        path.write_bytes(b"precious")
        done = subprocess.run(command(path, "--simulated"), capture_output=True, text=True)
        assert done.returncode == 2
        assert "is not a file of 67108864 bytes" in done.stderr
        assert path.read_bytes() == b"precious"
