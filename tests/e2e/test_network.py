"""Two hosts: network namespaces joined by a veth pair, and a network with a round-trip time."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import MakeScene
from farfault_cli.errors import PreflightError
from farfault_client.demo.processes import farfault_argv
from farfault_client.demo.scene import PORTS, Scene, SceneConfig, port_flags
from farfault_client.demo.vms import VmmKind
from farfault_client.netsim.hosts import SOURCE_ADDRESS, TwoHosts, check_namespaces, two_hosts
from netsim_helpers import Proxy, free_ports
from test_move import check_figures, unhurried

pytestmark = pytest.mark.e2e

MIB = 1 << 20


@pytest.fixture
def joined_hosts() -> Iterator[TwoHosts]:
    try:
        check_namespaces()
    except PreflightError as error:
        pytest.skip(error.problem)
    with two_hosts() as hosts:
        yield hosts


def finish(scene: Scene) -> None:
    """The verdict that every move must earn."""
    check_figures(scene.move(), scene)
    scene.wait_for_progress(scene.counter(scene.source))
    assert scene.processes.wait("receive", 30) == 0
    _, check = scene.check_guest(scene.destination)
    assert check.ok, check.problems


def test_between_two_hosts_with_mutual_tls(joined_hosts: TwoHosts, make_scene: MakeScene) -> None:
    config = SceneConfig(
        VmmKind.QEMU,
        ram_bytes=128 * MIB,
        vcpus=2,
        listen=SOURCE_ADDRESS,
        source_prefix=joined_hosts.source_prefix,
        destination_prefix=joined_hosts.destination_prefix,
    )
    scene = make_scene(config)
    tls = scene.folder / "tls"
    subprocess.run(farfault_argv("certs", str(tls), "--host", SOURCE_ADDRESS), check=True)
    with_tls = replace(config, serve_flags=("--tls", str(tls / "server")), receive_flags=("--tls", str(tls / "client")))
    scene.config = unhurried(with_tls)
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
    scene = make_scene(unhurried(config))
    scene.port = ports[0]
    with Proxy(ports, rtt_ms=5):
        scene.start_all()
        finish(scene)
