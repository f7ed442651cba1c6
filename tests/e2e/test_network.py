"""Two hosts: network namespaces joined by a veth pair, and a network with a round-trip time."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import MakeScene
from farfault_client.demo.processes import farfault_argv
from farfault_client.demo.scene import PORTS, Scene, SceneConfig, port_flags
from farfault_client.demo.vms import VmmKind
from netsim_helpers import Proxy, free_ports
from test_move import check_figures

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SOURCE_ADDRESS, DESTINATION_ADDRESS = "10.231.77.1", "10.231.77.2"


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces that reach each other."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = (f"ffsrc{os.getpid()}", f"ffdst{os.getpid()}")
    ends = (f"ffs{os.getpid()}", f"ffd{os.getpid()}")
    run = lambda *argv: subprocess.run(argv, check=True)  # noqa: E731
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, (SOURCE_ADDRESS, DESTINATION_ADDRESS), strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/30", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name])


def finish(scene: Scene) -> None:
    """The verdict that every move must earn."""
    check_figures(scene.move(), scene)
    scene.wait_for_progress(scene.counter(scene.source))
    assert scene.processes.wait("receive", 30) == 0
    _, check = scene.check_guest(scene.destination)
    assert check.ok, check.problems


def test_between_two_hosts_with_mutual_tls(two_hosts: tuple[str, str], make_scene: MakeScene) -> None:
    # not `ip netns exec`: that hides tracefs behind a fresh /sys
    source, destination = (("nsenter", f"--net=/run/netns/{name}") for name in two_hosts)
    config = SceneConfig(
        VmmKind.QEMU,
        ram_bytes=128 * MIB,
        vcpus=2,
        listen=SOURCE_ADDRESS,
        source_prefix=source,
        destination_prefix=destination,
    )
    scene = make_scene(config)
    tls = scene.folder / "tls"
    subprocess.run(farfault_argv("certs", str(tls), "--host", SOURCE_ADDRESS), check=True)
    scene.config = replace(
        config, serve_flags=("--tls", str(tls / "server")), receive_flags=("--tls", str(tls / "client"))
    )
    scene.start_all()
    finish(scene)


@pytest.mark.parametrize("kind", [VmmKind.QEMU, VmmKind.REFERENCE], ids=lambda kind: kind.value)
def test_with_a_round_trip_of_5_ms(kind: VmmKind, make_scene: MakeScene) -> None:
    ports = free_ports(PORTS)
    config = SceneConfig(
        kind,
        ram_bytes=64 * MIB,
        vcpus=2,
        serve_flags=port_flags(ports),
        source_target=f"127.0.0.2:{ports[0]}",
    )
    scene = make_scene(config)
    scene.port = ports[0]
    with Proxy(ports, rtt_ms=5):
        scene.start_all()
        finish(scene)
