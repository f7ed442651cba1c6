"""Sizes and rates as people write them, for every command alike.

Units mean what they mean to GNU coreutils, and to QEMU where it knows them: ``K``, ``M``, ``G``, ``T`` and ``KiB``,
``MiB``, ... are powers of 1024; ``KB``, ``MB``, ... are powers of 1000. No unit: bytes.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Final

import click

SIZE_BYTES_MAX: Final = 1 << 60
"""1 EiB; more is a slip of the keyboard."""
SIZE_EXAMPLES: Final = "512MiB, 64GiB, 1048576"
RATE_EXAMPLES: Final = "100MiB/s, 125MB/s, 1048576"

_PREFIXES: Final = "KMGT"
_AMOUNT: Final = re.compile(r"(\d{1,20}(?:\.\d{1,9})?) ?(?:([KMGT])(i?B?)|B?)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes: ``64MiB``, ``1.5G``, ``4096``; parts of a byte are left out.

    Raises:
        ValueError: it is none, or more than `SIZE_BYTES_MAX`; the message is for the user.
    """
    return _parse(text, text.strip(), "size", SIZE_EXAMPLES)


def parse_rate(text: str) -> int:
    """Bytes a second: a size, with or without ``/s`` behind it.

    Raises:
        ValueError: as `parse_size`.
    """
    return _parse(text, text.strip().removesuffix("/s"), "rate", RATE_EXAMPLES)


def _parse(text: str, amount: str, kind: str, examples: str) -> int:
    match = _AMOUNT.fullmatch(amount)
    if match is None:
        raise ValueError(f"{text!r} is no {kind}; examples: {examples}")
    number, prefix, rest = match.groups()
    if prefix is None and "." in number:
        raise ValueError(f"{text!r} is no {kind}: there are no parts of a byte; examples: {examples}")
    base = 1000 if rest and rest.upper() == "B" else 1024
    size_bytes = int(Fraction(number) * (base ** (_PREFIXES.index(prefix.upper()) + 1) if prefix else 1))
    if size_bytes > SIZE_BYTES_MAX:
        raise ValueError(f"{text!r} is more than any {kind} can be, {SIZE_BYTES_MAX} bytes")
    return size_bytes


class SizeType(click.ParamType[int]):
    """The type of an option; see `parse_size`. A configuration file may also give a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RateType(click.ParamType[int]):
    """The type of an option; see `parse_rate`."""

    name = "bytes/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_rate(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE: Final = SizeType()
RATE: Final = RateType()
