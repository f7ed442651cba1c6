from __future__ import annotations

import contextlib
import tomllib

import click
import pytest
from click.testing import CliRunner
from farfault_cli.errors import UsageError
from farfault_cli.main import farfault
from farfault_cli.settings import defaults_of
from farfault_cli.sizes import RATE, SIZE, SIZE_BYTES_MAX, parse_rate, parse_size
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1 << 10),
        ("4G", 4 << 30),
        ("4Gi", 4 << 30),
        ("128MiB", 128 << 20),
        ("1TiB", 1 << 40),
        ("1048576T", SIZE_BYTES_MAX),
        ("2 kb", 2000),
        ("125MB", 125_000_000),
        ("3gb", 3_000_000_000),
        ("64mib", 64 << 20),
        (" 64 MiB ", 64 << 20),
        ("1.5G", 3 << 29),
        ("0.1KiB", 102),
        ("1152921504606846975", SIZE_BYTES_MAX - 1),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes
    assert parse_rate(text) == parse_rate(f"{text.rstrip()}/s") == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "MiB", "-1", "+1", "4X", "iB", "4iB", "1..5G", ".5G", "1.G", "1e9", "0x10", "4_096", "1,5G"),
        *("G4", "4GG", "4GiBs", "4G iB", "4  G", "4\nG", "٤", "1K/S", "1 K /s", "True", "None", "1.5", "1.5B"),
        *("1" * 21, "9" * 5000, "1.0000000001G"),
    ],
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size.* examples: 512MiB, 64GiB, 1048576"):
        parse_size(text)
    with pytest.raises(ValueError, match=r"is no rate.* examples: 100MiB/s, 125MB/s, 1048576"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["1048577T", str(SIZE_BYTES_MAX + 1), "99999999999999999999T"])
def test_a_size_has_a_bound(text: str) -> None:
    with pytest.raises(ValueError, match="is more than any size can be"):
        parse_size(text)


def test_only_rates_are_by_the_second() -> None:
    assert parse_rate("1MiB/s") == 1 << 20
    with pytest.raises(ValueError, match="is no size"):
        parse_size("1MiB/s")
    with pytest.raises(ValueError, match="is no rate"):
        parse_rate("1MiB/s/s")


@given(st.integers(0, SIZE_BYTES_MAX))
def test_a_plain_number_is_itself(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == parse_rate(str(size_bytes)) == SIZE.convert(size_bytes, None, None)


@given(st.text(max_size=20))
def test_any_text_is_a_size_within_bounds_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 0 <= parse_size(text) <= SIZE_BYTES_MAX


@click.command()
@click.option("--ram", type=SIZE, default="1GiB", show_default=True)
@click.option("--bandwidth", type=RATE, default=0)
def show(ram: int, bandwidth: int) -> None:
    click.echo(f"{ram} {bandwidth}")


def test_options() -> None:
    help_text = CliRunner().invoke(show, ["--help"]).output
    assert "--ram SIZE" in help_text
    assert "--bandwidth BYTES/S" in help_text
    assert CliRunner().invoke(show, []).output == f"{1 << 30} 0\n"
    assert CliRunner().invoke(show, ["--ram", "2M", "--bandwidth", "2MB/s"]).output == f"{2 << 20} 2000000\n"


@pytest.mark.parametrize("value", ["true", "-1", "1.5", '"much"'])
def test_a_configuration_file_gives_text_or_a_whole_number(value: str) -> None:
    assert defaults_of(show, tomllib.loads("ram = 4096"), "file") == {"ram": 4096}
    with pytest.raises(UsageError, match="is no size"):
        defaults_of(show, tomllib.loads(f"ram = {value}"), "file")


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("serve", "--synthetic"), "size"),
        (("reference-vmm", "--ram", "/dev/null", "--size"), "size"),
        (("demo", "--ram"), "size"),
        (("bench", "compare", "--ram"), "size"),
        (("bench", "compare", "--rate"), "rate"),
        (("receive", "--bandwidth"), "rate"),
        (("migrate", "--bandwidth"), "rate"),
        (("load", "--background-rate"), "rate"),
    ],
)
def test_every_command_takes_the_same_and_says_the_same(command: tuple[str, ...], kind: str) -> None:
    result = CliRunner().invoke(farfault, [*command, "many"])

    assert result.exit_code == 2
    assert f"Invalid value for '{command[-1]}': 'many' is no {kind}; examples: " in result.output
