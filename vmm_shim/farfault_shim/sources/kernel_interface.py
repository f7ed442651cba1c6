"""Kernel NOWAIT interfaces as configuration: no released kernel has allocated their numbers. No I/O."""

from __future__ import annotations

from typing import Final

from farfault_cli.errors import UsageError

from farfault_shim.kvm import abi
from farfault_shim.kvm.nowait import NowaitInterface, NowaitSeries

FLAG_MAX: Final = 0xFFFF_FFFF
_SETTINGS: Final = {"flag", "cap"}


def parse_interface(text: str) -> NowaitInterface:
    """Reads ``SERIES:flag=N:cap=N``; numbers decimal or 0x.

    Raises:
        UsageError: anything else, or a flag that is not one bit of 32.
    """
    name, *settings = text.split(":")
    try:
        pairs = [setting.partition("=") for setting in settings]
        numbers = {key: int(value, 0) for key, _, value in pairs}
        if numbers.keys() != _SETTINGS or len(pairs) != len(_SETTINGS):
            raise ValueError("flag and cap are needed")
        flag = numbers["flag"]
        if not 0 < flag <= FLAG_MAX or flag & (flag - 1):
            raise ValueError(f"memslot flag {flag:#x} is not one bit of 32")
        return NowaitInterface(NowaitSeries(name), numbers["cap"], flag)
    except ValueError as error:
        raise UsageError(
            f"kernel interface {text!r} is not SERIES:flag=N:cap=N: {error}",
            f"SERIES is one of {', '.join(series.value for series in NowaitSeries)}; the numbers are those of the "
            "patched kernel's linux/kvm.h, as in exit-on-missing:flag=0x8:cap=236",
        ) from None


def describe_interface(interface: NowaitInterface) -> str:
    """For people."""
    return f"{interface.series.value} (memslot flag {interface.memslot_flag:#x}, capability {interface.capability})"


def info_capability(interface: NowaitInterface) -> int | None:
    """The capability that must be enabled before exits are annotated; None: none must."""
    return abi.CAP_MEMORY_FAULT_INFO if interface.needs_info_enabled else None
