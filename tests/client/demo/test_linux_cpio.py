"""The initramfs archive, read back by another implementation."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from farfault_client.demo.linux import cpio

ENTRIES = [
    cpio.directory("bin"),
    cpio.program("bin/odd", b"12345"),
    cpio.program("bin/empty", b""),
    cpio.text("bin/lines", ["one", "two"]),
]


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed")
def test_archive_unpacks_elsewhere(tmp_path: Path) -> None:
    subprocess.run(["busybox", "cpio", "-i", "-d"], input=cpio.archive(ENTRIES), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/odd").read_bytes() == b"12345"
    assert (tmp_path / "bin/odd").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/empty").read_bytes() == b""
    assert (tmp_path / "bin/lines").read_text() == "one\ntwo\n"


def test_device_node_carries_its_numbers() -> None:
    record = cpio.archive([cpio.character_device("console", 5, 1)])
    fields = [int(record[start : start + 8], 16) for start in range(6, 110, 8)]
    assert stat.S_ISCHR(fields[1])
    assert fields[9:11] == [5, 1]


def test_every_record_is_aligned_and_the_archive_is_the_same_each_time() -> None:
    data = cpio.archive(ENTRIES)
    assert len(data) % 4 == 0
    assert data == cpio.archive(ENTRIES)
