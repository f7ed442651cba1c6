"""A running guest moves between two real VMMs, and every byte of it is checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import MakeScene
from farfault.v1 import receiver_pb2 as rpb
from farfault_client.demo.scene import Scene, SceneConfig, qmp_status
from farfault_client.demo.vms import VmmKind
from farfault_client.receive.summary import summary_of
from farfault_shim.guest import GuestKind

pytestmark = pytest.mark.e2e

MIB = 1 << 20
GIB = 1 << 30
STREAM_BYTES_PER_S_MIN = 128 * MIB
STREAM_S_MAX = 4

CONFIGS = {
    "qemu-nowait-1": SceneConfig(VmmKind.QEMU, ram_bytes=128 * MIB, vcpus=1),
    "qemu-nowait-4": SceneConfig(VmmKind.QEMU, ram_bytes=128 * MIB, vcpus=4),
    "qemu-nowait-sequential": SceneConfig(VmmKind.QEMU, ram_bytes=128 * MIB, vcpus=1, guest=GuestKind.SEQUENTIAL),
    "qemu-blocking-1": SceneConfig(VmmKind.QEMU, ram_bytes=128 * MIB, vcpus=1, fault_source="blocking"),
    "qemu-blocking-4": SceneConfig(VmmKind.QEMU, ram_bytes=128 * MIB, vcpus=4, fault_source="blocking"),
    "qemu-nowait-2-2GiB": SceneConfig(VmmKind.QEMU, ram_bytes=2 * GIB, vcpus=2, pages_max=40_000),
    "qemu-nowait-2-hole": SceneConfig(VmmKind.QEMU, ram_bytes=4 * GIB, vcpus=2, pages_max=40_000),
    "qemu-blocking-2-hole": SceneConfig(
        VmmKind.QEMU, ram_bytes=4 * GIB, vcpus=2, pages_max=40_000, fault_source="blocking"
    ),
    "reference-nowait-1": SceneConfig(VmmKind.REFERENCE, ram_bytes=128 * MIB, vcpus=1),
    "reference-nowait-4": SceneConfig(VmmKind.REFERENCE, ram_bytes=128 * MIB, vcpus=4),
    "reference-blocking-2": SceneConfig(VmmKind.REFERENCE, ram_bytes=128 * MIB, vcpus=2, fault_source="blocking"),
    "reference-nowait-2-hole": SceneConfig(VmmKind.REFERENCE, ram_bytes=4 * GIB, vcpus=2, pages_max=20_000),
    "simulated-1": SceneConfig(VmmKind.SIMULATED, ram_bytes=24 * MIB, vcpus=1, fault_source="simulated"),
    "simulated-3": SceneConfig(VmmKind.SIMULATED, ram_bytes=24 * MIB, vcpus=3, fault_source="simulated"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_guest_moves_and_nothing_is_lost(name: str, make_scene: MakeScene) -> None:
    scene = make_scene(unhurried(CONFIGS[name]))
    scene.start_all()
    clock_reads = sum(mailbox.clock_reads for mailbox in scene.source.mailboxes())

    status = scene.move()

    stopped_at = scene.counter(scene.source)
    figures = check_figures(status, scene)
    assert figures["downtime_ms"] > 0
    scene.wait_for_progress(stopped_at)
    assert scene.counter(scene.source) == stopped_at, "the source ran after the hand-over"
    assert scene.processes.wait("receive", 30) == 0
    mailboxes, check = scene.check_guest(scene.destination)
    assert check.ok, check.problems
    assert [mailbox.errors for mailbox in mailboxes] == [0] * scene.config.vcpus
    assert [mailbox.boots for mailbox in mailboxes] == [1] * scene.config.vcpus, "the guest was reset"
    assert sum(mailbox.clock_backwards for mailbox in mailboxes) == 0
    if scene.config.kind is not VmmKind.SIMULATED:
        assert clock_reads > 0
        assert sum(mailbox.clock_reads for mailbox in mailboxes) > clock_reads, "kvmclock is no longer updated"
    assert "complete: " in scene.processes.log("serve").read_text()
    scene.processes.end("serve")
    assert qmp_status(scene.source.qmp) == "postmigrate"


def unhurried(config: SceneConfig) -> SceneConfig:
    """With a cap for the background: without one all pages may be there before a busy host has let a vCPU run, and then
    nothing was missed."""
    bytes_per_s = max(STREAM_BYTES_PER_S_MIN, config.ram_bytes // STREAM_S_MAX)
    return replace(config, receive_flags=(*config.receive_flags, "--bandwidth", str(bytes_per_s)))


def check_figures(status: rpb.MigrationStatus, scene: Scene) -> dict[str, object]:
    """What must hold of the figures of every move that is `unhurried`."""
    figures = summary_of(status)
    counters = figures["counters"]
    assert figures["phase"] == "done"
    assert figures["guest_pages"] * 4096 == scene.config.ram_bytes
    assert figures["installed_pages"] + figures["zero_pages"] == figures["guest_pages"], figures
    assert counters["existed_pages"] == 0, "a page was installed twice"
    assert counters["escalations"] == 0
    assert figures["demand_faults"] > 0
    by_source = figures["faults_by_source"]
    if scene.config.fault_source == "stock-nowait":
        assert by_source.get("tracepoint_gva", 0) + by_source.get("tracepoint_gpa", 0) > 0, by_source
        assert counters["lost_samples"] == 0
    elif scene.config.fault_source == "blocking":
        assert by_source.get("uffd_vcpu", 0) > 0, by_source
    assert figures["fault_latency_us"]["p50"] > 0
    assert figures["bytes_on_wire"] >= figures["installed_pages"] * 4096
    return figures
