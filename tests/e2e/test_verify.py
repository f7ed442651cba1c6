"""`--verify`: all of RAM is compared with the page server's before the move is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import why_not
from farfault_client.demo.scene import SceneConfig, qmp_status
from farfault_client.demo.vms import VmmKind
from farfault_shim.guest.addresses import MAILBOX_BYTES, mailbox_address
from faulty_move import SLOW_BYTES_PER_S, FaultyMove

pytestmark = pytest.mark.e2e

MIB = 1 << 20
PAGE_BYTES = 4096
MakeMove = Callable[[VmmKind], FaultyMove]


@pytest.fixture
def make_move() -> Iterator[MakeMove]:
    """Makes moves that are verified, and cleans up after them."""
    made: list[tuple[FaultyMove, Path]] = []

    def make(kind: VmmKind) -> FaultyMove:
        flags = ("--verify", "--bandwidth", str(SLOW_BYTES_PER_S))
        source = "simulated" if kind is VmmKind.SIMULATED else "stock-nowait"
        ram_bytes = (24 if kind is VmmKind.SIMULATED else 32) * MIB
        config = SceneConfig(kind, ram_bytes=ram_bytes, vcpus=2, fault_source=source, receive_flags=flags)
        reason = why_not(config)
        if reason:
            pytest.skip(reason)
        folder = Path(tempfile.mkdtemp(prefix="ff-verify-"))
        made.append((FaultyMove(config, folder), folder))
        return made[-1][0].__enter__()

    yield make
    for move, folder in made:
        move.__exit__()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("kind", [VmmKind.QEMU, VmmKind.REFERENCE, VmmKind.SIMULATED], ids=lambda kind: kind.value)
def test_every_page_is_verified(kind: VmmKind, make_move: MakeMove) -> None:
    move = make_move(kind)
    move.start()
    move.begin()
    move.wait_postcopy()
    move.tune(0)
    figures = move.assert_moved()
    assert figures["counters"]["verified_pages"] == figures["guest_pages"]


def test_only_what_this_receiver_brought_is_verified(make_move: MakeMove) -> None:
    """What was in memory before it started may have been changed by the guest since."""
    move = make_move(VmmKind.REFERENCE)
    move.start()
    move.begin()
    move.wait_postcopy()
    move.wait_settled(1000)
    move.kill("receive")
    move.restart("receive")
    move.tune(0)
    figures = move.assert_moved()
    assert 0 < figures["counters"]["verified_pages"] < figures["guest_pages"]


def test_a_difference_ends_the_move_for_good(make_move: MakeMove) -> None:
    move = make_move(VmmKind.REFERENCE)
    move.start()
    move.begin()
    move.wait_postcopy()
    scene = move.scene
    unused = mailbox_address(0) + MAILBOX_BYTES - 1
    scene_reads_it = lambda: scene.counter(scene.destination) > scene.counter(scene.source)  # noqa: E731
    move.processes.wait_until(scene_reads_it, "the guest uses its mailbox", 60)
    with scene.source.ram.open("r+b") as ram:  # what was fetched is no longer what the source holds
        ram.seek(unused)
        ram.write(b"\xaa")
    move.tune(0)
    assert move.processes.wait("receive", 60) == 7
    log = move.processes.log("receive").read_text()
    assert f"pages 0x0 to {scene.config.ram_bytes // PAGE_BYTES // 2 - 1:#x} of region 0 are not" in log
    assert "remedy: " in log
    assert move.receiver_step() == "found wrong"
    assert move.server_phase() == "handed over", "the source may not free its memory"
    move.kill("receive")
    again = move.take_up()
    assert again.returncode == 7, again.stderr
    assert "an earlier receiver" in again.stderr
    move.processes.end("serve")
    assert qmp_status(scene.source.qmp) != "running"
