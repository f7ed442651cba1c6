"""Every part is killed, every link is broken: the guest waits, then goes on, on exactly one side."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import why_not
from farfault_client.demo.scene import SceneConfig, qmp_status
from farfault_client.demo.vms import VmmKind
from faulty_move import SLOW_BYTES_PER_S, SWITCHOVER_RTT_MS, FaultyMove, continue_vm

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SLOW = ("--bandwidth", str(SLOW_BYTES_PER_S))
LONG_PARTITION_S = 3600
ABORT_RTT_MS = 8000
"""The device state is under way until a command has started and asked for the abort."""
SETTLED_PAGES = 5000
"""Most of 32 MiB: what is left when a part is killed is met by faults and by the background alike."""

CONFIGS = {
    "qemu": SceneConfig(VmmKind.QEMU, ram_bytes=48 * MIB, vcpus=2, receive_flags=SLOW),
    "qemu-blocking": SceneConfig(
        VmmKind.QEMU, ram_bytes=48 * MIB, vcpus=2, fault_source="blocking", receive_flags=SLOW
    ),
    "reference": SceneConfig(VmmKind.REFERENCE, ram_bytes=48 * MIB, vcpus=2, receive_flags=SLOW),
    "reference-grpc": SceneConfig(
        VmmKind.REFERENCE, ram_bytes=48 * MIB, vcpus=1, receive_flags=(*SLOW, "--no-express")
    ),
}
MakeMove = Callable[..., FaultyMove]


@pytest.fixture
def make_move() -> Iterator[MakeMove]:
    """Makes moves by the name of their configuration, and cleans up after them."""
    made: list[tuple[FaultyMove, Path]] = []

    def make(name: str, *, rtt_ms: float = 0) -> FaultyMove:
        config = CONFIGS[name]
        reason = why_not(config)
        if reason:
            pytest.skip(reason)
        folder = Path(tempfile.mkdtemp(prefix="ff-rec-"))
        move = FaultyMove(config, folder, rtt_ms=rtt_ms)
        made.append((move, folder))
        move.__enter__()
        return move

    yield make
    for move, folder in made:
        move.__exit__()
        shutil.rmtree(folder, ignore_errors=True)


def in_postcopy(move: FaultyMove) -> None:
    """Brings a move to the middle of its post-copy."""
    move.start()
    move.begin()
    move.wait_postcopy()


def in_switchover(move: FaultyMove, step: str) -> None:
    """Brings a move over a slow network to a step of its switchover."""
    move.start()
    move.begin()
    move.wait_step(step)


# ---- post-copy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qemu", "reference", "reference-grpc"])
def test_page_server_is_killed_in_postcopy(name: str, make_move: MakeMove) -> None:
    move = make_move(name)
    in_postcopy(move)
    move.kill("serve")
    move.wait_still()
    assert move.status().connected is False
    move.restart("serve")
    move.tune(0)
    move.assert_moved()


@pytest.mark.parametrize("name", ["qemu", "qemu-blocking", "reference"])
def test_receiver_is_killed_in_postcopy(name: str, make_move: MakeMove) -> None:
    move = make_move(name)
    in_postcopy(move)
    move.wait_settled(SETTLED_PAGES)
    move.kill("receive")
    move.wait_still()
    move.restart("receive")
    figures = move.assert_moved()
    assert "pages were in memory already" in move.processes.log("receive").read_text()
    fresh = figures["installed_pages"] + figures["zero_pages"]
    assert fresh < figures["guest_pages"], "the installed set was not rebuilt"


def test_both_sides_are_killed_in_postcopy(make_move: MakeMove) -> None:
    move = make_move("reference")
    in_postcopy(move)
    move.kill("receive")
    move.kill("serve")
    move.wait_still()
    move.restart("serve")
    move.restart("receive")
    move.tune(0)
    move.assert_moved()


def test_source_vmm_and_page_server_are_killed_in_postcopy(make_move: MakeMove) -> None:
    """The memory of the switchover is in a file: it outlives the source VMM, which will never run again anyway."""
    move = make_move("qemu")
    in_postcopy(move)
    move.kill("source")
    move.kill("serve")
    move.restart("serve")
    move.tune(0)
    scene = move.scene
    scene.wait_for_progress(scene.counter(scene.source))
    assert scene.summary_of_receiver()["phase"] == "done"
    move.assert_right(scene.destination)


@pytest.mark.parametrize("name", ["reference", "reference-grpc"])
def test_network_breaks_in_every_way(name: str, make_move: MakeMove) -> None:
    move = make_move(name)
    in_postcopy(move)
    for fault in ("reset", "corrupt", "truncate", "duplicate", "stall 0.5", "half-open", "partition 10"):
        before = move.settled_pages()
        move.proxy.tell(fault)
        if fault.startswith("partition"):
            move.tune(0)
        move.wait_settled(before + 100)
    figures = move.assert_moved()
    assert figures["counters"]["opens"] > 1, "nothing was ever connected again"


def test_migrate_alone_is_killed(make_move: MakeMove) -> None:
    move = make_move("reference")
    in_postcopy(move)
    move.kill("migrate")
    again = move.migrate("--resume", "--json")
    assert again.returncode == 0, again.stderr
    move.assert_moved()


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_destination_vmm_is_killed_in_postcopy(name: str, make_move: MakeMove) -> None:
    """It owned the VM. The receiver says so, and the source, which is older, must not run again."""
    move = make_move(name)
    in_postcopy(move)
    move.signal("destination", signal.SIGKILL)  # and nobody waits for it: it stays a zombie
    assert move.processes.wait("receive", 60) == 5
    assert "the destination VMM has exited" in move.processes.log("receive").read_text()
    move.processes.end("serve")
    assert qmp_status(move.scene.source.qmp) != "running"


def test_destination_vmm_is_replaced_before_the_move(make_move: MakeMove) -> None:
    move = make_move("reference")
    move.start()
    move.wait_attached()
    move.kill("destination")
    move.scene.destination.ram.unlink()
    move.scene.start_destination()
    move.wait_attached(times=2)
    move.begin()
    move.wait_postcopy()
    move.tune(0)
    move.assert_moved()


@pytest.mark.parametrize("for_a_moment", [False, True])
def test_source_is_resumed_by_mistake(for_a_moment: bool, make_move: MakeMove) -> None:
    move = make_move("qemu")
    scene = move.scene
    second_qmp = scene.folder / "second.qmp"  # QEMU serves one client on each socket
    argv = [*scene.source.argv(), "-qmp", f"unix:{second_qmp},server=on,wait=off"]
    move.processes.start("source", argv)
    move.processes.wait_until(lambda: scene.source.has_passes(1), "the guest's first round", 60, "source")
    scene.start_server()
    scene.start_destination()
    scene.start_receiver()
    move.begin()
    move.wait_postcopy()
    continue_vm(second_qmp, for_a_moment=for_a_moment)
    is_told = lambda: "generation" in move.status().error  # noqa: E731
    move.processes.wait_until(is_told, "the receiver says that the memory has changed", 30)
    settled = move.settled_pages()
    move.tune(0)
    move.wait_still()
    assert move.settled_pages() == settled, "pages of two generations were mixed"
    assert "runs although it was stopped" in move.processes.log("serve").read_text()
    refused = move.migrate("--abort")
    assert refused.returncode == 1
    assert "point of no return" in refused.stderr


# ---- switchover --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_receiver_is_killed_before_the_device_state_came(name: str, make_move: MakeMove) -> None:
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "suspending")
    move.kill("receive")
    result = move.take_up()
    assert result.returncode == 4, result.stderr
    assert "the source VM runs as before" in result.stderr
    assert move.receiver_step() == ""
    move.assert_source_runs()


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_receiver_is_killed_before_the_point_of_no_return(name: str, make_move: MakeMove) -> None:
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "handing over")
    move.proxy.tell("reset")  # the request was on its way
    move.kill("receive")
    assert move.server_phase() == "frozen"
    move.proxy.tell("rtt-ms 0")
    move.restart("receive")
    move.tune(0)
    move.assert_moved()


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_receiver_is_killed_after_the_point_of_no_return(name: str, make_move: MakeMove) -> None:
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "handing over")
    move.wait_server("handed over")
    move.kill("receive")  # the answer was on its way
    assert move.receiver_step() == "handing over"
    move.proxy.tell("rtt-ms 0")
    result = move.take_up()
    assert result.returncode == 0, result.stderr
    scene = move.scene
    scene.wait_for_progress(scene.counter(scene.source))
    move.assert_right(scene.destination)
    assert move.server_phase() == "completed"


def test_receiver_and_destination_vmm_are_killed_before_the_point_of_no_return(make_move: MakeMove) -> None:
    move = make_move("reference", rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "handing over")
    move.proxy.tell("reset")
    move.kill("receive")
    move.kill("destination")
    result = move.take_up()
    assert result.returncode == 4, result.stderr
    move.assert_source_runs()


def test_receiver_and_destination_vmm_are_killed_after_the_point_of_no_return(make_move: MakeMove) -> None:
    """The one loss that nobody can make good: the newest state was in that VMM. The source must not run again."""
    move = make_move("reference", rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "handing over")
    move.wait_server("handed over")
    move.kill("receive")
    move.kill("destination")
    result = move.take_up()
    assert result.returncode == 5, result.stderr
    assert "the source VM stays stopped" in result.stderr
    assert move.server_phase() == "handed over"
    move.processes.end("serve")
    assert qmp_status(move.scene.source.qmp) != "running"


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_destination_vmm_is_killed_before_the_hand_over(name: str, make_move: MakeMove) -> None:
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "suspending")
    move.kill("destination")
    assert move.processes.wait("receive", 60) == 4
    assert "the source VM runs as before" in move.processes.log("receive").read_text()
    move.assert_source_runs()


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_page_server_is_killed_before_the_device_state_came(name: str, make_move: MakeMove) -> None:
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "suspending")
    move.wait_server("frozen")
    move.proxy.tell("reset")
    move.kill("serve")
    move.restart("serve")
    assert move.processes.wait("receive", 60) == 4
    move.assert_source_runs()


def test_page_server_is_killed_around_the_point_of_no_return(make_move: MakeMove) -> None:
    move = make_move("reference", rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "handing over")
    move.wait_server("handed over")
    move.kill("serve")  # the record is durable, the answer was on its way
    move.proxy.tell("rtt-ms 0")
    move.restart("serve")
    move.tune(0)
    move.assert_moved()


@pytest.mark.parametrize(("name", "step"), [("reference", "suspending"), ("qemu", "handing over")])
def test_source_runs_again_by_itself_while_the_network_is_cut(name: str, step: str, make_move: MakeMove) -> None:
    """The destination cannot ask for it, and learns of it later: it holds a state that it must not run."""
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, step)
    move.wait_server("frozen")
    move.proxy.tell(f"partition {LONG_PARTITION_S}")
    before = move.scene.counter(move.scene.source)
    goes_on = lambda: move.scene.counter(move.scene.source) > before  # noqa: E731
    move.processes.wait_until(goes_on, "the source goes on", 60, "receive")
    assert "nothing was heard of the destination" in move.processes.log("serve").read_text()
    assert move.receiver_step() == step, "it was told nothing"
    move.proxy.tell("partition 0")
    assert move.processes.wait("receive", 60) == 4
    move.assert_source_runs()


def test_connections_are_half_open_before_the_device_state_came(make_move: MakeMove) -> None:
    move = make_move("reference", rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "suspending")
    move.wait_server("frozen")
    move.proxy.tell("half-open")
    assert move.processes.wait("receive", 60) == 4
    move.assert_source_runs()


def test_connections_are_half_open_at_the_hand_over(make_move: MakeMove) -> None:
    """It is asked for again over another connection, before the source takes its VM back."""
    move = make_move("reference", rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "handing over")
    move.proxy.tell("half-open")
    move.wait_postcopy()
    move.proxy.tell("rtt-ms 0")
    move.tune(0)
    move.assert_moved()


@pytest.mark.parametrize("name", ["qemu", "reference"])
def test_abort_before_the_point_of_no_return(name: str, make_move: MakeMove) -> None:
    move = make_move(name, rtt_ms=SWITCHOVER_RTT_MS)
    in_switchover(move, "suspending")
    move.proxy.tell(f"rtt-ms {ABORT_RTT_MS}")
    result = move.migrate("--abort")
    assert result.returncode == 0, result.stderr
    assert "aborted: the source VM runs as before" in result.stderr
    assert move.processes.wait("receive", 30) == 4
    assert move.processes.wait("migrate", 30) == 4
    move.assert_source_runs()


def test_abort_after_the_point_of_no_return(make_move: MakeMove) -> None:
    move = make_move("reference")
    in_postcopy(move)
    result = move.migrate("--abort")
    assert result.returncode == 1
    assert "point of no return" in result.stderr
    assert "remedy: " in result.stderr
    move.tune(0)
    move.assert_moved()


def test_a_second_receiver_with_the_same_state_is_refused(make_move: MakeMove) -> None:
    move = make_move("reference")
    in_postcopy(move)
    scene = move.scene
    flags = ["--source", str(scene.config.source_target), "--attach", str(scene.folder / "other")]
    flags += ["--qmp", str(scene.destination.qmp), "--state", str(scene.folder / "receiver"), "--now"]
    move.processes.farfault("second", "receive", *flags)
    assert move.processes.wait("second", 30) == 2
    assert "another receiver uses" in move.processes.log("second").read_text()
    move.tune(0)
    move.assert_moved()
