"""The built image and the contract between guest.S and the Python that reads what the guest writes."""

from __future__ import annotations

import ast
import dataclasses
import operator
import re
from collections.abc import Callable
from pathlib import Path

import farfault_shim.guest
import pytest
from farfault_cli.errors import FarfaultError
from farfault_shim.guest import addresses, mailbox, parameters, program

SOURCE = Path(farfault_shim.guest.__file__).with_name("guest.S")
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.BitOr: operator.or_,
}


def _constants() -> dict[str, int]:
    """The .equ lines of guest.S."""
    values: dict[str, int] = {}

    def evaluate(node: ast.expr) -> int:
        match node:
            case ast.Constant(int(value)):
                return value
            case ast.Name(name):
                return values[name]
            case ast.BinOp(left, operation, right):
                return OPERATORS[type(operation)](evaluate(left), evaluate(right))
        raise AssertionError(ast.dump(node))

    for name, text in re.findall(r"^\.equ\s+(\w+),\s*([^#\n]+)", SOURCE.read_text(), re.MULTILINE):
        values[name] = evaluate(ast.parse(text.strip(), mode="eval").body)
    return values


EQU = _constants()


@pytest.mark.parametrize("name", ["WORKER", "PARAMETERS", "MAILBOXES", "HISTOGRAMS", "CLOCKS"])
def test_addresses_agree(name: str) -> None:
    assert EQU[name] == getattr(addresses, name)


def test_constants_agree() -> None:
    assert EQU["GOLDEN"] == parameters.GOLDEN
    assert EQU["SECOND_WORD"] == parameters.SECOND_WORD_BYTES
    assert EQU["PARAMETERS_IN_IMAGE"] == parameters.BLOCK_IN_IMAGE
    assert EQU["PARAMETERS_BYTES"] == parameters.BLOCK_BYTES
    assert EQU["CLASS_STEPS"] == mailbox.CLASS_STEPS_BYTES
    assert EQU["STATE_FILL"] == mailbox.WorkerState.FILL
    assert EQU["STATE_VERIFY"] == mailbox.WorkerState.VERIFY
    assert EQU["PAGE_DIRECTORIES"] + addresses.MAPPED_GIB_MAX * 4096 <= addresses.DATA_START_MIN


def test_mailbox_fields_agree() -> None:
    places = {name[2:].lower(): value for name, value in EQU.items() if name.startswith("M_")}
    assert places == {field.name: 8 * i for i, field in enumerate(dataclasses.fields(mailbox.Mailbox))}


def test_parameter_fields_agree() -> None:
    guest = parameters.GuestParameters(
        vcpus=3,
        low_bytes=100 * 8192,
        high_bytes=50 * 8192,
        step_bytes=8192,
        kind=parameters.GuestKind.RANDOM,
        clock_interval_pages=7,
    )
    block = guest.pack()

    def packed(name: str) -> int:
        place = EQU[name] - EQU["PARAMETERS"]
        return int.from_bytes(block[place : place + 8], "little")

    assert packed("P_VCPUS") == 3
    assert packed("P_LOW_START") == guest.data_start
    assert packed("P_LOW_PAGES") == 100
    assert packed("P_HIGH_START") == 4 << 30
    assert packed("P_PAGES_PER_VCPU") == 50
    assert packed("P_STEP_BYTES") == 8192
    assert packed("P_ORDER_MASK") == 63
    assert packed("P_ORDER_SHIFT") == 3
    assert packed("P_ORDER_MULTIPLIER") % 4 == 1
    assert packed("P_ORDER_INCREMENT") % 2 == 0
    assert packed("P_CLOCK_INTERVAL_PAGES") == 7
    assert packed("P_MAPPED_GIB") == 5
    assert packed("P_SKEW_CLASSES") == packed("P_PAUSE_TICKS") == 0
    assert packed("P_ROUND_VISITS") == 50


def test_kvmclock_off_is_interval_zero() -> None:
    place = EQU["P_CLOCK_INTERVAL_PAGES"] - EQU["PARAMETERS"]
    block = parameters.GuestParameters(low_bytes=4096, kvmclock=False).pack()
    assert block[place : place + 8] == bytes(8)


def test_missing_image_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "image_path", lambda: tmp_path / "guest.bin")
    with pytest.raises(FarfaultError, match="make native"):
        program.load_image()


def test_damaged_image_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(bytes(parameters.IMAGE_BYTES))
    monkeypatch.setattr(program, "image_path", lambda: tmp_path / "guest.bin")
    with pytest.raises(FarfaultError, match=r"no parameter block.*\n.*make native"):
        program.load_image()


@pytest.mark.skipif(not program.image_path().exists(), reason="the guest image is not built: make native")
def test_built_image_holds_a_worker_that_fits_its_page() -> None:
    image = program.load_image()
    code = program.worker_code(image)
    assert 256 < len(code) <= 4096
    assert image.count(code) == 1
    assert image[0xFFF0:0xFFF1] == b"\xea"  # the reset vector jumps
