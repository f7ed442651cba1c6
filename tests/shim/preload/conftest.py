"""Lets these tests use the small receiver of the attach tests, and gives them a place for sockets and RAM files."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "attach"))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder on tmpfs that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="farfault-preload-", dir="/dev/shm"))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
