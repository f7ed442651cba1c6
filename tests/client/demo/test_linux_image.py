"""Where the guest's files come from, and that they are found, ordered and named as promised."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest
from farfault_cli.errors import FarfaultError
from farfault_client.demo.linux import build_image, expected_tick
from farfault_client.demo.linux.image import DISK_MIB, MIB, is_static
from farfault_client.demo.linux.kernel import find_kernel, load_order
from farfault_client.demo.linux.packages import cache_directory, with_fresh_lists
from farfault_client.demo.linux.worker import build_worker

needs_debian = pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get to fetch the guest's kernel")
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def module(*needs: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"


def test_modules_come_after_what_they_need() -> None:
    modules = {
        "virtio_net": module("virtio_ring", "virtio", "net_failover"),
        "net_failover": module("failover"),
        "failover": module(),
        "virtio_ring": module(),
        "virtio": module("virtio_ring"),
    }
    assert list(load_order(["virtio_net", "virtio"], modules.__getitem__)) == [
        "virtio_ring",
        "virtio",
        "failover",
        "net_failover",
        "virtio_net",
    ]


def test_built_in_modules_are_left_out() -> None:
    modules = {"virtio_net": module("virtio"), "virtio": None}
    assert list(load_order(["virtio_net"], modules.__getitem__)) == ["virtio_net"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A root directory with two cloud kernels and one of another flavour."""
    for release in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.0-1-amd64"):
        drivers = tmp_path / "lib/modules" / release / "kernel/drivers"
        drivers.mkdir(parents=True)
        (drivers / "plain.ko").write_bytes(module())
        (drivers / "virtio-rng.ko.xz").write_bytes(lzma.compress(module("virtio")))
        (drivers.parent.parent / "modules.builtin").write_text("kernel/drivers/char/rng-core.ko\n")
        (tmp_path / "boot").mkdir(exist_ok=True)
        (tmp_path / "boot" / f"vmlinuz-{release}").touch()
    return tmp_path


def test_newest_installed_kernel_is_taken(installed: Path, tmp_path: Path) -> None:
    kernel = find_kernel(tmp_path / "cache", root=installed)
    assert kernel.image.name == "vmlinuz-6.1.0-56-cloud-amd64"
    assert kernel.read_module("plain") == module()
    assert kernel.read_module("virtio_rng") == module("virtio")
    assert kernel.read_module("rng_core") is None
    with pytest.raises(FarfaultError, match="has no module vhost"):
        kernel.read_module("vhost")


def test_a_kernel_in_the_cache_needs_no_apt(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    cache = tmp_path / "cache"
    kept = cache / "packages/linux-image-6.1.0-56-cloud-amd64"
    kept.mkdir(parents=True)
    (installed / "boot").rename(kept / "boot")
    (installed / "lib").rename(kept / "lib")
    assert find_kernel(cache, root=tmp_path / "bare").image.parent == kept / "boot"


def test_package_lists_are_renewed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    tries = []

    def fetch() -> Path:
        tries.append(1)
        raise FarfaultError(f"try {len(tries)} failed")

    with pytest.raises(FarfaultError, match="try 2 failed"):
        with_fresh_lists(fetch, "some-package")
    assert (tmp_path / "calls").read_text() == "update -qq\n"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(FarfaultError, match="try 3 failed"):
        with_fresh_lists(fetch, "some-package")


def test_without_apt_the_remedy_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FarfaultError, match="linux-image-cloud-amd64") as error:
        find_kernel(tmp_path / "cache", root=tmp_path)
    assert "linux-image-cloud-amd64" in error.value.remedy


def test_without_a_compiler_the_remedy_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FarfaultError) as error:
        build_worker(tmp_path)
    assert "apt-get install gcc" in error.value.remedy


def test_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "farfault"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/farfault")


@needs_compiler
def test_worker_is_deterministic_and_its_hash_depends_on_all_that_came_before(tmp_path: Path) -> None:
    worker = build_worker(tmp_path)
    assert is_static(worker.read_bytes())
    assert build_worker(tmp_path) == worker
    tick = expected_tick(worker, 50, worker_mib=8)
    assert tick == expected_tick(worker, 50, worker_mib=8)
    assert tick.bad == 0
    others = {expected_tick(worker, 50, worker_mib=9).hash, expected_tick(worker, 51, worker_mib=8).hash}
    assert tick.hash not in others
    with pytest.raises(ValueError, match="the first is 1"):
        expected_tick(worker, 0, worker_mib=8)


def test_programs_with_libraries_are_told_apart() -> None:
    shell = shutil.which("sh")
    assert shell
    assert not is_static(Path(shell).read_bytes())
    assert not is_static(b"#!/bin/sh\n")


@needs_debian
@needs_compiler
def test_image_is_whole_and_the_same_each_time() -> None:
    image = build_image()
    assert image.disk.stat().st_size == DISK_MIB * MIB
    assert image.initramfs.read_bytes().startswith(b"070701")
    assert b"virtio_net.ko" in image.initramfs.read_bytes()
    assert image.kernel.read_bytes()[0x202:0x206] == b"HdrS"
    assert build_image() == image
