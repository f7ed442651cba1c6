from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from farfault_cli.errors import UsageError
from farfault_shim.unix_path import UNIX_PATH_BYTES_MAX, check_socket_path


def path_of(folder: Path, size_bytes: int) -> Path:
    return folder / ("x" * (size_bytes - len(os.fsencode(folder)) - 1))


def test_the_longest_path_is_the_longest_that_can_be_bound(tmp_path: Path) -> None:
    longest, longer = path_of(tmp_path, UNIX_PATH_BYTES_MAX), path_of(tmp_path, UNIX_PATH_BYTES_MAX + 1)

    check_socket_path(longest, "unused")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(longest))
    with socket.socket(socket.AF_UNIX) as refused, pytest.raises(OSError, match="too long"):
        refused.bind(str(longer))
    with pytest.raises(UsageError, match=f"longer than 107 bytes: {longer}\n  remedy: choose another"):
        check_socket_path(longer, "choose another")


def test_bytes_are_counted_not_letters() -> None:
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        check_socket_path(Path("/" + "ü" * 60), "")
