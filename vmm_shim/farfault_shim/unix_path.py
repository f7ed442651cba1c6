"""Paths of unix sockets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from farfault_cli.errors import UsageError

UNIX_PATH_BYTES_MAX: Final = 107
"""What `sockaddr_un.sun_path` holds beside its final zero (linux/un.h)."""


def check_socket_path(path: Path, remedy: str) -> None:
    """Before a socket is bound, or its path given to somebody else: the words of a failed bind do not name it.

    Raises:
        UsageError: with the remedy.
    """
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise UsageError(f"the path of the socket is longer than {UNIX_PATH_BYTES_MAX} bytes: {path}", remedy)
