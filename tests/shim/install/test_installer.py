"""Installers on the real kernel, and the rules of a run on a scripted one."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from farfault_shim.attach.wire import FaultSource, HandOver, HandOverRegion
from farfault_shim.install.installer import (
    DrainEvents,
    FileInstaller,
    InstallError,
    NoSpace,
    UffdInstaller,
    VmmGone,
)
from farfault_shim.layout import Layout, PageIndex, PageRun
from farfault_shim.uffd import abi
from farfault_shim.uffd.userfaultfd import CopyResult, Removed, Userfaultfd
from uffd_memory import (
    FEATURES,
    HUGE,
    PAGE,
    WAIT_S,
    Memory,
    huge_pages,
    libc,
    make_userfaultfd,
    memfd_memory,
    pattern,
    until,
)

PAGES = 16


def run(first: int, count: int = 1) -> PageRun:
    return PageRun(PageIndex(first), count)


def _handover(*regions: tuple[int, int, int, int]) -> HandOver:
    """Of ``(base_hva, alias_hva, size_bytes, page_size_bytes)``."""
    offset, found = 0, []
    for base, alias, size_bytes, page_size_bytes in regions:
        found.append(HandOverRegion(base, alias, size_bytes, offset, page_size_bytes))
        offset += size_bytes
    return HandOver(tuple(found), FaultSource.BLOCKING, ("uffd",))


@contextmanager
def _guest(descriptor: int, size_bytes: int = PAGES * PAGE) -> Iterator[tuple[UffdInstaller, Userfaultfd, Memory]]:
    """One region of 4 KiB pages without an alias."""
    memory, uffd = Memory(descriptor, size_bytes), make_userfaultfd()
    uffd.register(memory.address, size_bytes)
    handover = _handover((memory.address, 0, size_bytes, PAGE))
    yield UffdInstaller(handover.layout(), handover, uffd, None), uffd, memory
    memory.close()
    uffd.close()


@pytest.fixture
def guest() -> Iterator[tuple[UffdInstaller, Userfaultfd, Memory]]:
    descriptor = os.memfd_create("farfault-test-ram")
    os.ftruncate(descriptor, PAGES * PAGE)
    with _guest(descriptor) as made:
        yield made
    os.close(descriptor)


Guest = tuple[UffdInstaller, Userfaultfd, Memory]


def test_a_run_is_installed(guest: Guest) -> None:
    installer, _, memory = guest
    result = installer.install(run(2, 4), b"head" + pattern(2, 4), 4)
    assert (result.installed, result.existed) == ([run(2, 4)], [])
    assert memory.map[2 * PAGE : 6 * PAGE] == pattern(2, 4)


def test_pages_that_exist_are_stepped_over(guest: Guest) -> None:
    installer, _, memory = guest
    for page in (0, 3, 4, 7):
        installer.install(run(page), pattern(50 + page, 1), 0)
    result = installer.install(run(0, 8), pattern(0, 8), 0)
    assert result.installed == [run(1, 2), run(5, 2)]
    assert result.existed == [run(0), run(3, 2), run(7)]
    expected = b"".join(pattern(50 + page if page in (0, 3, 4, 7) else page, 1) for page in range(8))
    assert memory.map[: 8 * PAGE] == expected


def test_zero_pages_are_installed(guest: Guest) -> None:
    installer, _, memory = guest
    installer.install(run(1), pattern(1, 1), 0)
    result = installer.install_zero(run(0, 3))
    assert (result.installed, result.existed) == ([run(0), run(2)], [run(1)])
    assert memory.map[: 3 * PAGE] == bytes(PAGE) + pattern(1, 1) + bytes(PAGE)


def test_a_removal_must_be_read_before_the_rest_is_installed(guest: Guest) -> None:
    installer, uffd, memory = guest
    installer.install(run(0, 2), pattern(0, 2), 0)
    remover = threading.Thread(
        target=lambda: libc.madvise(ctypes.c_void_p(memory.address), ctypes.c_size_t(PAGE), mmap.MADV_REMOVE)
    )
    remover.start()
    pages = iter(range(2, PAGES))

    def held_back() -> bool:
        try:
            installer.install(run(next(pages)), pattern(0, 1), 0)
        except DrainEvents as drain:
            return not drain.partial.installed
        return False

    until(held_back)
    (event,) = uffd.read_events()
    assert isinstance(event, Removed)
    assert installer.pages_of_range(event.start, event.end) == [run(0)]
    remover.join(WAIT_S)
    until(lambda: installer.install_zero(run(0)).installed == [run(0)])


def test_a_full_filesystem_is_no_space(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * PAGE}", "farfault-test", tmp_path]).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        descriptor = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, PAGES * PAGE)
        with _guest(descriptor) as (installer, _, memory):
            with pytest.raises(NoSpace, match="no memory left on this host") as caught:
                installer.install(run(0, PAGES), pattern(0, PAGES), 0)
            (done,) = caught.value.partial.installed
            assert done == run(0, 4)
            assert memory.map[: 4 * PAGE] == pattern(0, 4)
        os.close(descriptor)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_alias_is_written_and_the_vmms_own_mapping_is_woken() -> None:
    with memfd_memory(PAGES * PAGE) as (descriptor, base):
        alias = Memory(descriptor, PAGES * PAGE)
        uffd, alias_uffd = make_userfaultfd(), make_userfaultfd(FEATURES | abi.FEATURE_SIGBUS)
        uffd.register(base.address, base.size_bytes)
        alias_uffd.register(alias.address, alias.size_bytes)
        handover = _handover((base.address, alias.address, base.size_bytes, PAGE))
        installer = UffdInstaller(handover.layout(), handover, uffd, alias_uffd)
        seen: list[bytes] = []

        def touch() -> None:
            target = ctypes.create_string_buffer(8)
            libc.memcpy(target, ctypes.c_void_p(base.address + PAGE), ctypes.c_size_t(8))
            seen.append(target.raw)

        sleeper = threading.Thread(target=touch)
        sleeper.start()
        until(lambda: len(uffd.read_events()) == 1)
        assert installer.install(run(1), pattern(1, 1), 0).installed == [run(1)]
        installer.wake(run(1))
        sleeper.join(WAIT_S)
        assert seen == [pattern(1, 1)[:8]]
        assert alias.map[PAGE : 2 * PAGE] == pattern(1, 1)
        installer.unregister()
        assert alias.map[:PAGE] == bytes(PAGE)
        assert base.map[2 * PAGE : 3 * PAGE] == bytes(PAGE)
        alias.close()
        uffd.close()
        alias_uffd.close()


def test_mixed_regions_with_huge_pages() -> None:
    uffd = make_userfaultfd(FEATURES | abi.FEATURE_MISSING_HUGETLBFS)
    with (
        huge_pages(4),
        memfd_memory(4 * PAGE) as (_, small),
        memfd_memory(4 * HUGE, os.MFD_HUGETLB) as (_, large),
    ):
        for memory in (small, large):
            uffd.register(memory.address, memory.size_bytes)
        handover = _handover((small.address, 0, 4 * PAGE, PAGE), (large.address, 0, 4 * HUGE, HUGE))
        installer = UffdInstaller(handover.layout(), handover, uffd, None)
        assert installer.install(run(3), pattern(3, 1), 0).installed == [run(3)]
        assert installer.install(run(5), pattern(5, 1, HUGE), 0).installed == [run(5)]
        result = installer.install_zero(run(4, 3))
        assert (result.installed, result.existed) == ([run(4), run(6)], [run(5)])
        assert installer.install(run(4, 4), pattern(0, 4, HUGE), 0).installed == [run(7)]
        assert large.map[:HUGE] == bytes(HUGE)
        assert large.map[HUGE : HUGE + 16] == pattern(5, 1, HUGE)[:16]
        assert installer.page_of_fault(large.address + HUGE + 5) == 5
        assert installer.pages_of_range(large.address + PAGE, large.address + 3 * HUGE + PAGE) == [run(5, 2)]
        installer.unregister()
    uffd.close()


def test_addresses_and_pages(guest: Guest) -> None:
    installer, _, memory = guest
    assert installer.page_of_fault(memory.address) == 0
    assert installer.page_of_fault(memory.address + PAGES * PAGE - 1) == PAGES - 1
    assert installer.page_of_fault(memory.address + PAGES * PAGE) is None
    assert installer.page_of_fault(memory.address - 1) is None
    assert installer.pages_of_range(0, 1 << 62) == [run(0, PAGES)]
    assert installer.pages_of_range(memory.address + 1, memory.address + 2 * PAGE) == [run(1)]
    assert installer.pages_of_range(memory.address + 1, memory.address + PAGE) == []
    assert installer.pages_of_range(0, 4096) == []


# ---- a scripted kernel --------------------------------------------------------------------------------


class ScriptedUffd:
    """Answers copies from a list of ``(done_pages, error)``; past its end everything is copied."""

    def __init__(self, script: list[tuple[int, int]]) -> None:
        self.script = script
        self.calls: list[tuple[int, int]] = []

    def copy(self, address: int, data: bytes, data_offset: int, size_bytes: int) -> CopyResult:
        assert data_offset == address, "data and memory go along"
        self.calls.append((address // PAGE, size_bytes // PAGE))
        if not self.script:
            return CopyResult(size_bytes, 0)
        done, error = self.script.pop(0)
        return CopyResult(done * PAGE, error)


def _scripted(script: list[tuple[int, int]]) -> tuple[ScriptedUffd, Callable[[], object]]:
    handover = _handover((0, 0, 8 * PAGE, PAGE))
    uffd = ScriptedUffd(script)
    installer = UffdInstaller(handover.layout(), handover, uffd, None)  # type: ignore[arg-type]
    return uffd, lambda: installer.install(run(0, 8), bytes(8 * PAGE), 0)


def test_a_partial_copy_goes_on_where_it_stopped() -> None:
    uffd, install = _scripted([(3, errno.EAGAIN), (0, errno.EEXIST), (1, errno.EAGAIN)])
    result = install()
    assert uffd.calls == [(0, 8), (3, 5), (4, 4), (5, 3)]
    assert result.installed == [run(0, 3), run(4), run(5, 3)]  # type: ignore[attr-defined]
    assert result.existed == [run(3)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.EAGAIN, DrainEvents),
        (errno.ESRCH, VmmGone),
        (errno.ENOSPC, NoSpace),
        (errno.ENOMEM, NoSpace),
        (errno.ENOENT, InstallError),
        (errno.EFAULT, InstallError),
    ],
)
def test_errors_say_how_far_it_came(error: int, expected: type[InstallError]) -> None:
    _, install = _scripted([(2, errno.EAGAIN), (0, error)])
    with pytest.raises(expected) as caught:
        install()
    assert type(caught.value) is expected
    assert caught.value.partial.installed == [run(0, 2)]
    assert "pages 0+8" in str(caught.value)


def test_a_kernel_that_never_gets_on_is_not_asked_for_ever() -> None:
    uffd, install = _scripted([(0, 0)] * 100)
    install()
    assert len(uffd.calls) <= 17


# ---- files -----------------------------------------------------------------------------------------------


def test_the_file_installer_writes_pages_once(tmp_path: Path) -> None:
    layout = Layout([(4 * PAGE, PAGE), (2 * HUGE, HUGE)])
    descriptors = []
    for region in layout.regions:
        descriptors.append(os.memfd_create(f"farfault-test-ram{region.index}"))
        os.ftruncate(descriptors[-1], region.size_bytes)
    installer = FileInstaller(layout, descriptors)
    assert installer.install(run(1, 2), b"x" + pattern(1, 2), 1).installed == [run(1, 2)]
    result = installer.install(run(0, 4), pattern(10, 4), 0)
    assert (result.installed, result.existed) == ([run(0), run(3)], [run(1, 2)])
    assert os.pread(descriptors[0], 4 * PAGE, 0) == pattern(10, 1) + pattern(1, 2) + pattern(13, 1)
    assert installer.install_zero(run(4)).installed == [run(4)]
    assert installer.install_zero(run(4)).existed == [run(4)]
    assert installer.install(run(5), pattern(5, 1, HUGE), 0).installed == [run(5)]
    assert os.pread(descriptors[1], 2 * HUGE, 0) == bytes(HUGE) + pattern(5, 1, HUGE)
    installer.wake(run(0))
    installer.unregister()
    assert installer.page_of_fault(0) is None
    assert installer.pages_of_range(0, PAGE) == []
    for descriptor in descriptors:
        os.close(descriptor)
