"""How the Python that runs this was built, which decides how long a fault takes (docs/benchmarks.md)."""

from __future__ import annotations

import platform
import sys
import sysconfig
from typing import NamedTuple


class PythonBuild(NamedTuple):
    """What is known of an interpreter.

    Attributes:
        text: version and build, e.g. ``3.11.2, the distribution's build``.
        is_optimised: with profile guidance; without it a fault takes up to a fifth longer.
    """

    text: str
    is_optimised: bool


def python_build() -> PythonBuild:
    """Of this process."""
    if sys.base_prefix == "/usr":  # Debian's is optimised, but what sysconfig tells are the options of another build
        build, is_optimised = "the distribution's build", True
    elif "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")):
        build, is_optimised = "an optimised build", True
    else:
        build, is_optimised = "built without --enable-optimizations", False
    return PythonBuild(f"{platform.python_version()}, {build}", is_optimised)
