from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from farfault_cli.errors import UsageError
from farfault_cli.main import EntryPointGroup, farfault
from farfault_cli.settings import (
    CONFIG_VARIABLE,
    bind_environment,
    check_tables,
    defaults_of,
    read_config,
    settings_of,
    variable_name,
)

DOCS = Path(__file__).parents[2] / "docs"


@click.command()
@click.option("--bandwidth", type=int, default=1)
@click.option("--json", "as_json", is_flag=True)
@click.option("--express/--no-express", "has_express", default=True)
@click.option("--ram", multiple=True)
@click.option("--token", envvar="FARFAULT_TOKEN")
def show(**values: object) -> None:
    click.echo(json.dumps(values))


@click.group()
def outer() -> None:
    pass


outer.add_command(show, "inner")


def run_show(*arguments: str, config: str = "", **environment: str) -> dict[str, object]:
    bind_environment(show, ("show",))
    defaults = defaults_of(show, tomllib.loads(config), "file: [show]")
    result: Result = CliRunner().invoke(show, arguments, env=environment, default_map=defaults)
    assert result.exit_code == 0, result.output
    values: dict[str, object] = json.loads(result.output)
    return values


def test_flag_beats_environment_beats_file_beats_default() -> None:
    assert run_show()["bandwidth"] == 1
    assert run_show(config="bandwidth = 2")["bandwidth"] == 2
    assert run_show(config="bandwidth = 2", FARFAULT_SHOW_BANDWIDTH="3")["bandwidth"] == 3
    assert run_show("--bandwidth", "4", config="bandwidth = 2", FARFAULT_SHOW_BANDWIDTH="3")["bandwidth"] == 4


def test_names_are_those_of_the_flags() -> None:
    assert run_show(FARFAULT_SHOW_JSON="true")["as_json"] is True
    assert run_show(config="json = true")["as_json"] is True
    assert run_show(FARFAULT_SHOW_EXPRESS="false")["has_express"] is False
    assert run_show(config="express = false")["has_express"] is False


def test_lists_from_both_places() -> None:
    assert run_show(config='ram = ["a", "b"]')["ram"] == ["a", "b"]
    assert run_show(FARFAULT_SHOW_RAM="a b")["ram"] == ["a", "b"]


def test_a_variable_that_an_option_has_of_its_own_goes_on_to_work() -> None:
    assert run_show(FARFAULT_TOKEN="x")["token"] == "x"
    assert run_show(FARFAULT_SHOW_TOKEN="y")["token"] == "y"


def test_commands_within_commands_have_tables_and_variables() -> None:
    bind_environment(outer, ("outer",))

    assert "FARFAULT_OUTER_INNER_BANDWIDTH" in (settings_of(show)["bandwidth"].envvar or ())
    assert defaults_of(outer, {"inner": {"bandwidth": 7}}, "file: [outer]") == {"inner": {"bandwidth": 7}}


@pytest.mark.parametrize(
    ("config", "message", "remedy"),
    [
        ("bandwith = 1", "there is no option 'bandwith'", "did you mean 'bandwidth'?"),
        ("zzz = 1", "there is no option 'zzz'", "known are: bandwidth, express, json, ram, token"),
        ('json = "yes"', "neither true nor false", "without quotes"),
        ('ram = "a"', "is no list", "write [...]"),
        ("bandwidth = [1]", "is not one value", "one string or number"),
        ('bandwidth = "fast"', "is not a valid integer", "correct it"),
    ],
)
def test_a_mistake_in_the_file_is_an_error_with_a_remedy(config: str, message: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        defaults_of(show, tomllib.loads(config), "file: [show]")

    assert message in caught.value.problem
    assert caught.value.problem.startswith("file: [show]")
    assert remedy in caught.value.remedy


def test_tables_name_commands() -> None:
    with pytest.raises(UsageError, match="no command 'recieve'"):
        check_tables({"recieve": {}}, ["receive", "serve"], Path("file"))
    with pytest.raises(UsageError, match="'bandwidth' is in no table"):
        check_tables({"bandwidth": 1}, ["receive"], Path("file"))


def test_only_the_default_file_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farfault_cli.settings.CONFIG_DEFAULT", tmp_path / "none")

    assert read_config(None) == {}
    with pytest.raises(UsageError, match="no configuration file"):
        read_config(tmp_path / "none")


@pytest.mark.parametrize("content", [b"[serve", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)

    with pytest.raises(UsageError, match="is not TOML"):
        read_config(file)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_every_option_of_every_command_has_a_variable_of_its_own() -> None:
    assert isinstance(farfault, EntryPointGroup)
    variables = Counter(
        variable_name(path, option) for path, command in commands(farfault) for option in settings_of(command).values()
    )

    assert len(variables) > 50
    assert [name for name, count in variables.items() if count > 1] == []


def test_every_command_explains_itself() -> None:
    for path, command in commands(farfault):
        assert command.help, path


def test_the_example_of_the_page_is_right(tmp_path: Path) -> None:
    example = (DOCS / "configuration.md").read_text().split("```toml\n")[1].split("```")[0]
    for name, table in tomllib.loads(example).items():
        command = farfault.get_command(click.Context(farfault), name)  # type: ignore[attr-defined]
        assert command is not None
        assert defaults_of(command, table, name)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "farfault_cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_the_command_reads_the_file_it_is_told(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[top]\ncontrol = "/nonexistent/from-file"\n')

    by_flag = run("--config", str(config), "top")
    by_variable = run("top", **{CONFIG_VARIABLE: str(config)})
    overridden = run("--config", str(config), "top", FARFAULT_TOP_CONTROL="/nonexistent/from-environment")

    assert (by_flag.returncode, by_variable.returncode) == (6, 6)
    assert "/nonexistent/from-file" in by_flag.stderr
    assert "/nonexistent/from-file" in by_variable.stderr
    assert "/nonexistent/from-environment" in overridden.stderr


def test_a_mistake_in_the_file_is_exit_code_2(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[top]\ncontrl = 1\n")

    done = run("--config", str(config), "top")

    assert done.returncode == 2
    assert "did you mean 'control'?" in done.stderr


@pytest.mark.parametrize(("words", "expected"), [("farfault rec", "receive"), ("farfault top --con", "--control")])
def test_bash_completes(words: str, expected: str) -> None:
    done = run(_FARFAULT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))

    assert f"plain,{expected}" in done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    done = run("completion", shell)

    assert done.returncode == 0
    assert "_FARFAULT_COMPLETE" in done.stdout
