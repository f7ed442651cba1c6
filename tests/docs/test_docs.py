"""Documents and code say the same: links, commands, tables, and every program that a page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from farfault_cli import errors
from farfault_cli.main import farfault
from farfault_client.demo.processes import Processes
from farfault_client.engine.states import TRANSITIONS, PageInput, PageState
from farfault_server.lanes.limits import LaneLimits

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(?P<language>\w*)(?: (?P<name>\w+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(farfault [^`]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
WAIT_S = 60.0


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def block(page: str, language: str, name: str) -> str:
    """The fenced block that a page calls ``language name``."""
    found = [
        match["text"]
        for match in FENCE.finditer(text_of(page))
        if (match["language"], match["name"]) == (language, name)
    ]
    assert len(found) == 1, f"{page} has {len(found)} blocks {language} {name}"
    return found[0]


def rows(page: str, first_cell: str) -> Iterator[list[str]]:
    """Rows of all tables whose first cell matches, as stripped cells."""
    for line in text_of(page).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and re.fullmatch(first_cell, cells[0]):
            yield cells


def anchors_of(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    titles = (re.sub(r"[`*]", "", title).lower() for title in HEADING.findall(page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


# ---- links and commands --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_relative_link_resolves(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{name}: {link}"


def documented_commands(text: str) -> Iterator[list[str]]:
    """The words of each `farfault` command in code, up to ``--`` or the end of the command."""
    code = [match["text"] for match in FENCE.finditer(text) if match["language"] != "python"]
    for line in "\n".join([*code, *INLINE.findall(text)]).replace("\\\n", " ").splitlines():
        for part in re.split(r"[|;&]|\$\(", line):
            words = re.sub(r"\s#.*|[\"'()\[\]]", "", part).split()
            if "farfault" in words:
                command = words[words.index("farfault") + 1 :]
                yield command[: command.index("--")] if "--" in command else command


def find_command(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The command that the words name, and the rest of them; None: plain ``farfault`` or prose."""
    group: click.Command = farfault
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        context = click.Context(group)
        command = group.get_command(context, words[0])
        if command is None:
            return None
        group, words = command, words[1:]
    return group, words


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_documented_option_exists(name: str) -> None:
    for words in documented_commands(text_of(name)):
        if not words or not re.fullmatch(r"[a-z-]+", words[0]):
            continue
        found = find_command(words)
        assert found is not None, f"{name}: farfault {' '.join(words)}"
        command, rest = found
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, f"{name}: farfault {' '.join(words)}: {word}"


def test_the_readme_lists_every_command() -> None:
    listed = set(re.findall(r"`farfault ([a-z-]+)`", text_of("README.md")))
    assert set(farfault.list_commands(click.Context(farfault))) <= listed


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_documented_make_target_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    code = [match["text"] for match in FENCE.finditer(text_of(name))] + re.findall(r"`([^`\n]+)`", text_of(name))
    for text in code:
        assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets, name


# ---- tables --------------------------------------------------------------------------------------


def test_the_page_life_cycle_is_the_table_of_the_engine() -> None:
    states = {cells[0].strip("*"): cells[1:] for cells in rows("docs/architecture.md", r"\*\*[A-Z_]+\*\*")}

    assert states == {
        state.name: [
            TRANSITIONS[state, page_input].name if (state, page_input) in TRANSITIONS else ""
            for page_input in PageInput
        ]
        for state in PageState
    }


def test_the_layers_are_those_that_import_linter_holds() -> None:
    documented = {
        package: set(re.findall(r"`(\w+)`", cells[1]))
        for cells in rows("docs/architecture.md", r"`farfault\w*`(, `farfault\w*`)?")
        for package in re.findall(r"`(\w+)`", cells[0])
    }
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    held = {
        package: set(contract["forbidden_modules"]) for contract in contracts for package in contract["source_modules"]
    }
    everything = held.pop("farfault")

    assert documented.pop("farfault") == set()  # "anything of ours"
    assert everything == {"farfault_server", "farfault_client", "farfault_cli", "farfault_shim", "farfault_vmm"}
    assert documented == held


def test_every_exit_code_is_documented() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.FarfaultError)}
    documented = {int(cells[0]) for cells in rows("docs/operations.md", r"\d")}

    assert documented == codes | {0}


def test_the_limits_are_those_of_the_server() -> None:
    limits = LaneLimits()
    for name, value, _ in rows("docs/wire-protocol.md", r"`max_\w+`"):
        assert int(value.split(",")[0]) == getattr(limits, name.strip("`"))


def test_the_attach_protocol_page_has_the_numbers_of_the_header() -> None:
    header = text_of("vmm_shim/preload/farfault_attach.h")
    for name, value, *_ in rows("docs/attach-protocol.md", r"`FF_[A-Z_]+`"):
        if value.isdigit():
            assert re.search(rf"#define {name.strip('`')} {value}u?$", header, re.MULTILINE), name
    for name, value in rows("docs/attach-protocol.md", r"`ff_\w+`"):
        assert f"_Static_assert(sizeof(struct {name.strip('`')}) == {value}," in header, name


# ---- programs ------------------------------------------------------------------------------------


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as running:
        yield running


@pytest.fixture
def target(processes: Processes, tmp_path: Path) -> str:
    """A page server of 16 MiB of made-up memory."""
    port_file = tmp_path / "port"
    arguments = ["--synthetic", "16MiB", "--listen", "127.0.0.1:0", "--port-file", str(port_file)]
    processes.farfault("serve", "serve", *arguments)
    processes.wait_until(port_file.exists, "the page server listens", WAIT_S, "serve")
    return f"127.0.0.1:{port_file.read_text().strip()}"


def run_python(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["client", "reflection", "express"])
def test_a_program_of_the_wire_protocol_prints_what_the_page_says(name: str, target: str) -> None:
    page = "docs/wire-protocol.md"
    program = block(page, "python", name)
    assert "127.0.0.1:7777" in program

    assert run_python(program.replace("127.0.0.1:7777", target)) == block(page, "text", name)


CHECK = """
from farfault.synthetic import synthetic_page
for page in range(SIZE_BYTES // 4096):
    assert memory[page * 4096 : (page + 1) * 4096] == synthetic_page(1, 0, page, 4096), page
print("every page is right")
"""


@pytest.mark.parametrize(("page", "name"), [("docs/api.md", "attach"), ("docs/attach-protocol.md", "plain")])
def test_a_program_that_attaches_gets_its_memory(
    page: str, name: str, processes: Processes, target: str, tmp_path: Path
) -> None:
    program = block(page, "python", name)
    lines = [line for line in program.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) < 20
    attach, ram = tmp_path / "attach", Path(f"/dev/shm/ff-{os.getpid()}-docs.ram")
    receive = ["--source", target, "--attach", str(attach), "--state", str(tmp_path / "state")]
    processes.farfault("receive", "receive", *receive)
    try:
        words = program.replace("/run/ff.sock", str(attach)).replace("/dev/shm/vm.ram", str(ram))
        processes.wait_until(attach.exists, "the receiver listens", WAIT_S, "receive")
        assert run_python(words + CHECK).endswith("every page is right\n")
    finally:
        ram.unlink(missing_ok=True)
    assert processes.wait("receive", WAIT_S) == 0


@pytest.mark.parametrize(("page", "name"), [("docs/api.md", "attach"), ("docs/api.md", "follow")])
def test_a_program_of_the_python_api_is_typed(page: str, name: str, tmp_path: Path) -> None:
    program = tmp_path / f"example_{name}.py"
    program.write_text(block(page, "python", name))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(program)]
    environment = os.environ | {
        "MYPYPATH": ":".join(str(ROOT / part) for part in ("proto", "server", "client", "vmm_shim"))
    }

    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)

    assert result.returncode == 0, result.stdout
