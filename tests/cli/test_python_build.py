"""Which Pythons count as optimised."""

import sys
import sysconfig

import pytest
from farfault_cli.python_build import python_build


@pytest.mark.parametrize(
    ("prefix", "options", "expected"),
    [
        ("/usr", "'--enable-shared'", True),
        ("/usr/local", "'--enable-optimizations' '--with-lto'", True),
        ("/opt/python", "'--prefix=/opt/python' '--enable-shared'", False),
        ("/opt/python", None, False),
    ],
)
def test_what_counts(monkeypatch: pytest.MonkeyPatch, prefix: str, options: str | None, expected: bool) -> None:
    monkeypatch.setattr(sys, "base_prefix", prefix)
    monkeypatch.setattr(sysconfig, "get_config_var", {"CONFIG_ARGS": options}.get)
    build = python_build()
    assert build.is_optimised is expected
    assert ".".join(map(str, sys.version_info[:3])) in build.text
