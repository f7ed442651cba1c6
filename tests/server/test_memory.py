"""Memory sources: files, memfds of other processes, huge pages, holes."""

import contextlib
import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from farfault.synthetic import ZERO_SHARE, synthetic_page
from farfault_cli.errors import UsageError
from farfault_server.memory.opening import HUGETLBFS_MAGIC, file_system, open_ram
from farfault_server.memory.synthetic_region import SyntheticRegion

PAGE = 4096
HUGE = 2 << 20
NOBODY = 65534
SHM = Path("/dev/shm")
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def page(number: int) -> bytes:
    return (number + 1).to_bytes(4, "little") * (PAGE // 4)


@pytest.fixture
def shm_path() -> Iterator[Path]:
    path = SHM / f"ff-{os.getpid()}-memory-test"
    yield path
    path.unlink(missing_ok=True)


def opened(specification: object, pid: int | None = None) -> contextlib.AbstractContextManager:
    return contextlib.closing(open_ram(str(specification), pid))


def test_a_snapshot(tmp_path):
    path = tmp_path / "snapshot"
    path.write_bytes(page(0) + page(1) + page(2))
    with opened(path) as region:
        assert (region.size_bytes, region.page_size_bytes) == (3 * PAGE, PAGE)
        assert region.name == str(path)
        assert region.read(1, 2) == page(1) + page(2)


def test_reading_leaves_the_holes_of_a_tmpfs_file(shm_path):
    with shm_path.open("wb") as file:
        file.truncate(1000 * PAGE)
        file.seek(500 * PAGE)
        file.write(page(500))
    blocks = shm_path.stat().st_blocks
    with opened(shm_path) as region:
        assert region.backing == "tmpfs"
        assert region.read(0, 1000) == bytes(500 * PAGE) + page(500) + bytes(499 * PAGE)
        assert region.zero_pages_ahead(0, 1000) == 500
        assert region.zero_pages_ahead(100, 50) == 50
        assert region.zero_pages_ahead(500, 100) == 0
        assert region.zero_pages_ahead(501, 499) == 499
    assert shm_path.stat().st_blocks == blocks


def test_a_file_that_was_cut_short_is_no_hole(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(page(1) * 100)
    with opened(path) as region:
        os.truncate(path, 50 * PAGE)
        assert region.zero_pages_ahead(60, 40) == 0
        with pytest.raises(OSError, match="shorter") as caught:
            region.read(49, 2)
        assert caught.value.errno == errno.EIO


def test_the_same_memory_has_the_same_identity(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(page(1))
    with opened(path) as region, opened(path) as again:
        assert region.identity() == again.identity()
        path.with_suffix(".new").write_bytes(page(1))
        path.with_suffix(".new").replace(path)
        with opened(path) as other:
            assert other.identity() != region.identity()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "not a positive multiple"),
        (lambda path: path.write_bytes(b"x" * 5000), "not a positive multiple"),
        (lambda path: path.mkdir(), "not a file"),
    ],
)
def test_what_cannot_be_served_has_a_remedy(tmp_path, make, problem):
    path = tmp_path / "ram"
    make(path)
    with pytest.raises(UsageError, match=problem) as caught:
        open_ram(str(path))
    assert caught.value.remedy


def test_no_permission(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(page(1))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(UsageError, match="no permission to read") as caught:
            open_ram(str(path))
    finally:
        os.seteuid(user)
    assert caught.value.remedy


# ---- another process -----------------------------------------------------------------------------

HOLDER = """
import os, sys
first = os.memfd_create("pc.ram"); os.write(first, b"A" * 8192)
other = os.memfd_create("twin"); os.write(other, b"B" * 4096)
twin = os.memfd_create("twin"); os.write(twin, b"C" * 4096)
copy = os.dup(first)
file = os.open(sys.argv[1], os.O_RDWR)
os.unlink(sys.argv[1])
print(first, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """``(pid, number of the first memfd)`` of a process with memory."""
    (tmp_path / "deleted.ram").write_bytes(b"D" * 4096)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "deleted.ram")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.communicate()


def test_memory_of_another_process(holder, tmp_path):
    pid, number = holder
    for specification, first, size in (
        (f"fd:{number}", b"A", 8192),
        ("memfd=pc.ram", b"A", 8192),  # open twice, but one file
        (tmp_path / "deleted.ram", b"D", 4096),
    ):
        with opened(specification, pid) as region:
            assert region.read(0, 1) == first * PAGE
            assert region.size_bytes == size
    with opened("memfd=pc.ram", pid) as region:
        assert region.backing == "memfd"


def test_memory_that_another_process_does_not_have(holder):
    pid, _ = holder
    with pytest.raises(UsageError, match="2 files"):
        open_ram("memfd=twin", pid)
    with pytest.raises(UsageError, match="no open file") as caught:
        open_ram("memfd=nothing", pid)
    assert "memfd:pc.ram" in caught.value.remedy
    with pytest.raises(UsageError, match="does not exist"):
        open_ram("fd:999", pid)
    with pytest.raises(UsageError, match="no process"):
        open_ram("memfd=pc.ram", 2**22 + 1)


# ---- huge pages ----------------------------------------------------------------------------------


@pytest.fixture
def huge_memfd() -> Iterator[int]:
    """A memfd of four huge pages, the second and the last of them written."""
    before = int(HUGE_PAGES.read_text())
    try:
        HUGE_PAGES.write_text(str(before + 4))  # others may use theirs meanwhile
    except OSError:
        pytest.skip("needs the right to reserve huge pages")
    reserved = int(HUGE_PAGES.read_text()) - before
    descriptor = os.memfd_create("huge", os.MFD_HUGETLB)
    try:
        if reserved < 4:
            pytest.skip("needs 8 MiB of unfragmented memory")
        os.ftruncate(descriptor, 4 * HUGE)
        with mmap.mmap(descriptor, 4 * HUGE) as memory:
            memory[HUGE : HUGE + PAGE] = page(1)
            memory[4 * HUGE - PAGE :] = page(3)
        yield descriptor
    finally:
        os.close(descriptor)
        HUGE_PAGES.write_text(str(int(HUGE_PAGES.read_text()) - reserved))


def test_huge_pages(huge_memfd):
    assert file_system(huge_memfd).magic == HUGETLBFS_MAGIC
    with opened(f"fd:{huge_memfd}", os.getpid()) as region:
        assert (region.page_size_bytes, region.size_bytes) == (HUGE, 4 * HUGE)
        assert region.read(0, 1) == bytes(HUGE)
        assert region.read(1, 1) == page(1) + bytes(HUGE - PAGE)
        assert region.read(2, 2) == bytes(2 * HUGE - PAGE) + page(3)
    assert os.fstat(huge_memfd).st_blocks == 2 * HUGE // 512


async def test_huge_pages_are_served(huge_memfd):
    from farfault.v1 import pages_pb2 as pb
    from server_client import TIMEOUT_S, connected, request, serving

    region = open_ram(f"fd:{huge_memfd}", os.getpid())
    async with serving(regions=[region]) as server, connected(server.port) as client:
        opened = await client.open()
        assert opened.regions[0].page_size_bytes == HUGE
        assert opened.limits.max_batch_bytes == HUGE
        stream = client.stream()
        await stream.write(request(1, (0, 0, 4)))
        kinds, done, data = [], [], b""
        while 1 not in done:
            batch = await stream.read()
            kinds += [(extent.first_page, extent.page_count, extent.kind) for extent in batch.extents]
            done += batch.done_request_ids
            data += batch.data
        assert kinds == [
            (0, 1, pb.EXTENT_KIND_ZERO),
            (1, 1, pb.EXTENT_KIND_DATA),
            (2, 1, pb.EXTENT_KIND_ZERO),
            (3, 1, pb.EXTENT_KIND_DATA),
        ]
        assert data == region.read(1, 1) + region.read(3, 1)
        digest = pb.DigestRequest(ranges=[pb.PageRange(page_count=4)])
        await client.pages.Digest(digest, metadata=client.metadata, timeout=TIMEOUT_S)


# ---- synthetic -----------------------------------------------------------------------------------


def test_synthetic_pages_are_their_own():
    region = SyntheticRegion(5, 2, 64 << 30)
    data = region.read(0, 1000)
    pages = [data[start : start + PAGE] for start in range(0, len(data), PAGE)]
    assert pages == [synthetic_page(5, 2, number, PAGE) for number in range(1000)]
    zero = pages.count(bytes(PAGE))
    assert 1000 // ZERO_SHARE // 2 < zero < 1000 // ZERO_SHARE * 2
    assert len(set(pages)) == 1000 - zero + 1
    assert region.read(0, 100) != SyntheticRegion(6, 2, 64 << 30).read(0, 100)
    assert region.read(0, 100) != SyntheticRegion(5, 1, 64 << 30).read(0, 100)


def test_synthetic_pages_never_change():
    """Both hosts make them, perhaps with different versions of Python."""
    import xxhash

    pages = [synthetic_page(7, 0, number, PAGE) for number in (0, 1, 2, 16_777_215)]
    assert [xxhash.xxh3_64_hexdigest(content) for content in pages] == SYNTHETIC_DIGESTS


SYNTHETIC_DIGESTS = ["9784be3599621a43", "893362e171835b3e", "00cce6dd24c98270", "93d76fe148c689ba"]


def test_struct_statfs_fits():
    assert ctypes.sizeof(ctypes.c_long) * 32 >= 120
