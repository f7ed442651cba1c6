"""Reading what the guest reports, without touching the VM's RAM."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from farfault_shim.guest import Histogram, WorkerState, read_histogram, read_mailboxes, total_touched
from farfault_shim.guest.addresses import histogram_address, mailbox_address


def _ram(path: Path, offset: int = 0) -> Path:
    ram = path / "vm.ram"
    with ram.open("wb") as file:
        file.truncate(offset + (1 << 20))
        for vcpu in range(2):
            file.seek(offset + mailbox_address(vcpu))
            file.write(struct.pack("<15Q", *(100 * vcpu + 10 + i for i in range(7)), 2, *range(8, 15)))
        file.seek(offset + histogram_address(1))
        file.write(struct.pack("<64Q", *range(64)))
    return ram


@pytest.mark.parametrize("offset", [0, 1 << 20])
def test_mailboxes_by_path_and_by_descriptor(tmp_path: Path, offset: int) -> None:
    ram = _ram(tmp_path, offset)
    first, second = read_mailboxes(ram, 2, offset)
    assert (first.passes, first.touched, first.errors, first.boots) == (10, 11, 12, 14)
    assert (second.passes, second.clock_version, second.state) == (110, 116, WorkerState.VERIFY)
    assert total_touched([first, second]) == 11 + 111
    with ram.open("rb") as file:
        assert read_mailboxes(file.fileno(), 2, offset) == [first, second]
    assert read_histogram(str(ram), 1, offset).counts == tuple(range(64))


def test_reading_fills_no_hole(tmp_path: Path) -> None:
    ram = tmp_path / "vm.ram"
    with ram.open("wb") as file:
        file.truncate(1 << 20)
    assert read_mailboxes(ram, 64)[63].state is WorkerState.BOOT
    assert read_histogram(ram, 63).total == 0
    assert ram.stat().st_blocks == 0


def test_short_file_and_nonsense_are_refused(tmp_path: Path) -> None:
    ram = _ram(tmp_path)
    with pytest.raises(IndexError, match="vCPU 64"):
        read_histogram(ram, 64)
    os.truncate(ram, mailbox_address(1))
    with pytest.raises(ValueError, match="ends at 0xa080, 128 bytes too early"):
        read_mailboxes(ram, 2)
    ram.write_bytes(b"\xff" * (1 << 17))
    with pytest.raises(ValueError, match="WorkerState"):
        read_mailboxes(ram, 1)
    with pytest.raises(FileNotFoundError):
        read_mailboxes(tmp_path / "none", 1)


def test_percentiles_are_ends_of_buckets() -> None:
    counts = [0] * 64
    counts[5], counts[10], counts[20] = 90, 9, 1
    histogram = Histogram(tuple(counts))
    assert histogram.total == 100
    assert histogram.percentile_ticks(0) == 63
    assert histogram.percentile_ticks(50) == 63
    assert histogram.percentile_ticks(90) == 63
    assert histogram.percentile_ticks(99) == 2047
    assert histogram.percentile_ticks(100) == (2 << 20) - 1
    assert Histogram((0,) * 64).percentile_ticks(50) == 0


def test_histograms_add_and_subtract() -> None:
    older, newer = Histogram((1,) * 64), Histogram((3,) * 64)
    assert (newer - older).counts == (2,) * 64
    assert (newer + older).total == 256
