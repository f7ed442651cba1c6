"""Wrong use is answered with what to do, and leaves the source VM running with its RAM untouched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from conftest import MakeScene
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import PreflightError
from farfault_client.demo.processes import farfault_argv
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import VmmKind

pytestmark = pytest.mark.e2e

MIB = 1 << 20
CONFIG = SceneConfig(VmmKind.QEMU, ram_bytes=64 * MIB, vcpus=1)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A `farfault` command to its end."""
    return subprocess.run(farfault_argv(*arguments), capture_output=True, text=True, timeout=60)


def assert_explains(result: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    """The exit code, the words, a remedy, and no traceback."""
    assert result.returncode == exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert "remedy: " in result.stderr
    for word in words:
        assert word in result.stderr


def assert_source_goes_on(scene: Scene) -> None:
    """The source VM runs, and none of its pages is wrong."""
    before = scene.counter(scene.source)
    scene.processes.wait_until(lambda: scene.counter(scene.source) > before, "the source goes on", 20, "source")
    if "serve" in scene.processes.names():
        scene.processes.end("serve")
    _, check = scene.check_guest(scene.source)
    assert check.ok, check.problems


def test_ram_file_is_missing(tmp_path: Path) -> None:
    result = run("serve", "--ram", str(tmp_path / "nothing.ram"), "--listen", "127.0.0.1:0")
    assert_explains(result, 2, "nothing.ram")


def test_port_is_in_use(tmp_path: Path) -> None:
    ram = tmp_path / "vm.ram"
    ram.write_bytes(bytes(8192))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--ram", str(ram), "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert_explains(result, 2, "in use")


def test_plain_tcp_on_all_addresses_is_refused(tmp_path: Path) -> None:
    ram = tmp_path / "vm.ram"
    ram.write_bytes(bytes(8192))
    result = run("serve", "--ram", str(ram), "--listen", "0.0.0.0:0")
    assert_explains(result, 2, "--tls", "--insecure")


def test_plain_tcp_to_another_host_is_refused(tmp_path: Path) -> None:
    result = run("receive", "--source", "192.0.2.1:7777", "--attach", str(tmp_path / "attach"))
    assert_explains(result, 2, "--tls", "--insecure")


def test_source_is_unreachable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ("--attach", str(tmp_path / "attach"), "--state", str(tmp_path / "state"))
    result = run("receive", "--source", f"127.0.0.1:{port}", *flags)
    assert_explains(result, 6, f"127.0.0.1:{port}", "farfault serve")


def test_server_speaks_another_version(tmp_path: Path) -> None:
    class FromTheFuture(pages_pb2_grpc.PageServiceServicer):
        def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenResponse:
            return pb.OpenResponse(protocol_version=2)

    server = grpc.server(futures.ThreadPoolExecutor(1))
    pages_pb2_grpc.add_PageServiceServicer_to_server(FromTheFuture(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        flags = ("--attach", str(tmp_path / "attach"), "--state", str(tmp_path / "state"))
        result = run("receive", "--source", f"127.0.0.1:{port}", *flags)
    finally:
        server.stop(None)
    assert_explains(result, 1, "protocol 2", "same farfault version")


def test_memory_sizes_differ(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    scene.start_source()
    scene.start_server()
    scene.destination = replace(scene.destination, ram_bytes=96 * MIB)
    scene.start_destination()
    scene.start_receiver()
    with pytest.raises(PreflightError) as refused:
        scene.move()
    assert "96 MiB" in str(refused.value) or "no VMM" in str(refused.value)
    assert scene.processes.wait("receive", 30) == 3
    assert_source_goes_on(scene)


def test_source_ram_is_not_shared(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    argv = [word.replace("share=on", "share=off") for word in scene.source.argv()]
    scene.processes.start("source", argv)
    scene.processes.wait_until(scene.source.qmp.exists, "the source VM listens", 30, "source")
    scene.start_server()
    scene.start_destination()
    scene.start_receiver()
    with pytest.raises(PreflightError) as refused:
        scene.move()
    assert "share=on" in str(refused.value)


def test_destination_ram_is_not_shared(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    argv = scene.destination.argv(incoming=True, attach=scene.attach, fault_source="blocking")
    scene.processes.start("destination", [word.replace("share=on", "share=off") for word in argv])
    assert scene.processes.wait("destination", 30) != 0
    assert "share=on" in scene.processes.log("destination").read_text()


def test_destination_does_not_wait_for_a_vm(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    scene.start_source()
    scene.start_server()
    argv = scene.destination.argv(attach=scene.attach, fault_source="blocking")
    scene.processes.start("destination", [*argv, "-S"])
    scene.processes.wait_until(scene.destination.qmp.exists, "the destination VM listens", 30, "destination")
    scene.start_receiver()
    with pytest.raises(PreflightError, match="-incoming defer"):
        scene.move()
    assert_source_goes_on(scene)


def test_destination_ram_file_holds_data(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    scene.destination.ram.write_bytes(b"left over" * 1000)
    with scene.destination.ram.open("r+b") as file:
        file.truncate(CONFIG.ram_bytes)
    argv = scene.destination.argv(incoming=True, attach=scene.attach, fault_source="blocking")
    scene.processes.start("destination", argv)
    assert scene.processes.wait("destination", 30) != 0
    assert "already holds" in scene.processes.log("destination").read_text()


def test_userfaultfd_is_not_permitted(make_scene: MakeScene) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("taking the permission away needs root and setpriv")
    scene = make_scene(CONFIG)
    argv = scene.destination.argv(incoming=True, attach=scene.attach, fault_source="blocking")
    script = 'mount --bind /dev/null /dev/userfaultfd && exec setpriv --bounding-set=-sys_ptrace "$@"'
    scene.processes.start("destination", ["unshare", "--mount", "sh", "-c", script, "sh", *argv])
    assert scene.processes.wait("destination", 30) != 0
    log = scene.processes.log("destination").read_text()
    assert "userfaultfd" in log
    assert "unprivileged_userfaultfd" in log
