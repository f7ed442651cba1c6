"""Where the value of an option comes from: one precedence for every command.

::

    flag  >  environment  >  configuration file  >  default

The variable of ``farfault receive --json-logs`` is ``FARFAULT_RECEIVE_JSON_LOGS``; in the file it is ``json-logs`` in
the table ``[receive]``. Commands within commands have tables and names of their own: ``[bench.compare]``,
``FARFAULT_BENCH_COMPARE_QUICK``. docs/configuration.md is the user's page.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from farfault_cli.errors import UsageError

PREFIX: Final = "FARFAULT"
CONFIG_VARIABLE: Final = f"{PREFIX}_CONFIG"
CONFIG_DEFAULT: Final = Path("/etc/farfault/config.toml")
CONFIG_BYTES_MAX: Final = 1 << 20

Table = Mapping[str, Any]


def option_name(option: click.Option) -> str:
    """Its long flag without dashes: the name in the file. Of ``--express/--no-express`` the first."""
    flag = next((name for name in option.opts if name.startswith("--")), option.opts[0])
    return flag.lstrip("-")


def variable_name(path: Sequence[str], option: click.Option) -> str:
    """The environment variable of an option of the command ``farfault PATH...``."""
    return "_".join((PREFIX, *path, option_name(option))).upper().replace("-", "_")


def settings_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that environment and file may set, by their names in the file."""
    return {
        option_name(parameter): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.is_eager
    }


def bind_environment(command: click.Command, path: Sequence[str]) -> None:
    """Gives every option of a command its variable, besides those that it names itself. May be repeated."""
    for option in settings_of(command).values():
        own = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
        variable = variable_name(path, option)
        option.envvar = own if variable in own else [*own, variable]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            bind_environment(inner, (*path, name))


def read_config(path: Path | None) -> dict[str, Any]:
    """The tables of a configuration file.

    Args:
        path: as the user named it; None: `CONFIG_DEFAULT`, which may be absent.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    file = path or CONFIG_DEFAULT
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            raise UsageError(f"{file} is longer than {CONFIG_BYTES_MAX} bytes", "name a configuration file")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path is None:
            return {}
        raise UsageError(f"there is no configuration file {file}", "name one that exists with --config") from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "run as a user that may read it") from error
    except ValueError as error:
        raise UsageError(f"{file} is not TOML: {error}", "see docs/configuration.md for an example") from error


def check_tables(tables: Table, commands: Iterable[str], file: Path) -> None:
    """Every table of a file names a command.

    Raises:
        UsageError: one does not, or there is a key outside of the tables.
    """
    known = list(commands)
    for name, value in tables.items():
        if not isinstance(value, dict):
            raise UsageError(
                f"{file}: {name!r} is in no table", f"put it below the command it is for, for example [{known[0]}]"
            )
        if name not in known:
            raise UsageError(f"{file}: there is no command {name!r}", _suggestion(name, known))


def defaults_of(command: click.Command, table: Table, place: str) -> dict[str, Any]:
    """What a table of the file says, as click's `default_map` of the command.

    Args:
        command: whose table it is.
        table: keys as in the file.
        place: the file and the table, for messages.

    Raises:
        UsageError: a key is unknown, or a value does not fit its option.
    """
    options = settings_of(command)
    inner = command.commands if isinstance(command, click.Group) else {}
    defaults: dict[str, Any] = {}
    for key, value in table.items():
        if key in inner and isinstance(value, dict):
            defaults[key] = defaults_of(inner[key], value, f"{place}.{key}")
        elif key in options:
            name = options[key].name
            assert name is not None
            defaults[name] = _checked(command, options[key], value, f"{place} {key}")
        else:
            raise UsageError(f"{place}: there is no option {key!r}", _suggestion(key, [*options, *inner]))
    return defaults


def _checked(command: click.Command, option: click.Option, value: Any, place: str) -> Any:
    """The value, if the option takes it."""
    if option.is_flag and not isinstance(value, bool):
        raise UsageError(f"{place}: {value!r} is neither true nor false", "write true or false, without quotes")
    if option.multiple and not isinstance(value, list):
        raise UsageError(f"{place}: {value!r} is no list", "write [...] around the values")
    if isinstance(value, dict) or (isinstance(value, list) and not option.multiple):
        raise UsageError(f"{place}: {value!r} is not one value", "write one string or number")
    try:
        option.type_cast_value(click.Context(command), value)
    except click.BadParameter as error:
        raise UsageError(f"{place}: {error.message}", "correct it in the file, or give the flag") from None
    return value


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}"
