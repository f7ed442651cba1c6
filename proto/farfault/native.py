"""Libraries in C that do the commonest step of a fault; without one of them the general way does it, more slowly."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def load(path: Path) -> ctypes.PyDLL | None:
    """A library that `make native` built; None, and a line in the log, where it is not there.

    Its functions take microseconds, so they keep the interpreter's lock.
    """
    try:
        return ctypes.PyDLL(str(path))
    except OSError as error:
        logger.warning("faults take the general way, which is slower: %s (build it: `make native`)", error)
        return None
