"""A VMM that holds half a VM ends, whether it obeys or not."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from farfault_cli.errors import UnreachableError
from farfault_client.receive.destination import Destination
from receiver_stub import make_receiver

WAIT_S = 20.0


class FakeVmm:
    """Ends when it is told to, or does not."""

    def __init__(self, *, obeys: bool) -> None:
        self.obeys = obeys
        self.quits = 0

    async def quit(self) -> None:
        self.quits += 1
        if not self.obeys:
            raise UnreachableError("the VMM did not end in 10 s")


@pytest.mark.parametrize("obeys", [True, False])
async def test_only_a_vmm_that_does_not_obey_is_killed(obeys: bool) -> None:
    kills: list[None] = []
    destination = Destination(Path("/run/qmp"), lambda: kills.append(None))
    vmm: Any = FakeVmm(obeys=obeys)
    destination.vmm = vmm
    for _ in range(2):
        await destination.discard()
    assert vmm.quits == 1
    assert len(kills) == (not obeys)
    assert destination.vmm is None


async def test_a_vmm_that_was_never_connected_is_left_alone() -> None:
    kills: list[None] = []
    destination = Destination(Path("/run/qmp"), lambda: kills.append(None))
    await destination.discard()
    await destination.close()
    assert not kills


async def test_the_process_that_attached_is_the_one_that_is_killed(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver._kill_vmm()  # nobody has attached: nobody is killed
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:
        receiver._watch_exit(process.pid)
        receiver._kill_vmm()
        assert await asyncio.to_thread(process.wait, WAIT_S) == -signal.SIGKILL
        receiver._kill_vmm()  # it is gone, which is no error
    await receiver.close()
