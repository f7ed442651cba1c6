"""Kernel interfaces on the command line."""

from __future__ import annotations

import pytest
from farfault_cli.errors import UsageError
from farfault_shim.kvm.nowait import EXIT_ON_MISSING, NowaitSeries
from farfault_shim.sources import parse_interface
from farfault_shim.sources.kernel_interface import describe_interface, info_capability


def test_numbers_decimal_and_hexadecimal_in_any_order() -> None:
    assert parse_interface("exit-on-missing:flag=0x8:cap=236") == EXIT_ON_MISSING
    assert parse_interface("exit-on-missing:cap=0xec:flag=8") == EXIT_ON_MISSING
    assert describe_interface(EXIT_ON_MISSING) == "exit-on-missing (memslot flag 0x8, capability 236)"


def test_only_the_first_series_needs_the_information_enabled() -> None:
    needs = {s for s in NowaitSeries if info_capability(parse_interface(f"{s.value}:flag=8:cap=1")) is not None}
    assert needs == {NowaitSeries.ABSENT_MAPPING_FAULT}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exit-on-missing",
        "exit-on-missing:flag=8",
        "exit-on-missing:flag=8:cap=1:flag=8",
        "exit-on-missing:flag=9:cap=1",
        "exit-on-missing:flag=0:cap=1",
        "exit-on-missing:flag=0x100000000:cap=1",
        "exit-on-missing:flag=eight:cap=1",
        "something:flag=8:cap=1",
        "userfault:flag=8:cap=1:bitmap=3",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_interface(text)
    assert "exit-on-missing:flag=0x8:cap=236" in caught.value.remedy
