"""The whole command against real page servers of synthetic memory."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SEED = 7
START_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 90.0
ATTEMPTS_MAX = 3
FARFAULT = [sys.executable, "-m", "farfault_cli"]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text().strip()):
            return text
        assert process.poll() is None, "the page server ended"
        time.sleep(0.02)
    raise AssertionError("the page server does not start")


@contextmanager
def page_server(folder: Path, *arguments: str, listen: str = "127.0.0.1:0") -> Iterator[str]:
    """A running `farfault serve`; gives HOST:PORT."""
    port_file = folder / "port"
    port_file.unlink(missing_ok=True)
    command = [*FARFAULT, "serve", "--listen", listen, "--port-file", str(port_file), "--log-level", "warning"]
    process = subprocess.Popen([*command, *arguments])
    try:
        yield f"127.0.0.1:{wait_for(port_file, process)}"
    finally:
        process.terminate()
        process.wait(30)


def wait_until_measuring(load: subprocess.Popen[str]) -> None:
    """Until the log of a load test tells of its first pages. Its end would end this too."""
    assert load.stderr is not None
    seen = []
    while line := load.stderr.readline():
        seen.append(line)
        if "pages/s" in line:
            return
    raise AssertionError("".join(seen))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("load-serve")
    with page_server(folder, "--synthetic", "1GiB", "--seed", str(SEED)) as address:
        yield address


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*FARFAULT, "load", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)


def figures_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def quick(target: str, *arguments: str | Path, seed: int = SEED) -> subprocess.CompletedProcess[str]:
    return run("--source", target, "--seed", str(seed), "--warmup", "0.1", "--duration", "0.4", "--json", *arguments)


@pytest.mark.parametrize("lane", [(), ("--no-express",)])
def test_a_closed_loop_verifies_every_byte(target: str, lane: tuple[str, ...]) -> None:
    carrier = ["grpc"] if lane else ["express"]
    for _ in range(ATTEMPTS_MAX):  # where the host stood still for seconds, gRPC carries what the express lane should
        done = quick(target, *lane)
        figures = figures_of(done)
        if figures["setup"]["carrier"] == carrier:
            break
    assert figures["setup"]["carrier"] == carrier
    assert done.returncode == 0, done.stderr
    assert figures["pages"] > 0
    assert figures["errors"] == figures["verification_errors"] == figures["unexpected_pages"] == 0
    assert figures["verified_pages"] >= figures["pages"]
    assert figures["verified_by"] == "seed"
    assert 0 < figures["latency_us"]["p50"] <= figures["latency_us"]["p999"] <= figures["latency_us"]["max"]
    assert figures["open_loop"] is False
    assert len(done.stdout.splitlines()) == 1


def test_an_open_loop_over_several_processes_with_a_background_beside(target: str) -> None:
    more = ("--processes", "2", "--connections", "3", "--background", "--background-rate", "20MiB/s")
    done = quick(target, "--rate", "300", "--arrivals", "poisson", "--read-write", "1:1", *more)
    figures = figures_of(done)
    assert done.returncode == 0, done.stderr
    assert figures["open_loop"] is True
    assert figures["offered_pages_s"] == 300
    assert 0 < figures["writes"] < figures["faults"]
    assert figures["background"]["pages"] > 0
    assert figures["setup"]["processes"] == 2


def test_a_wrong_seed_is_found(target: str) -> None:
    done = quick(target, "--pages", "200", seed=SEED + 1)
    figures = figures_of(done)
    assert done.returncode == 7
    assert figures["pages"] == 200
    assert figures["verification_errors"] >= 150
    assert figures["problems"]


def test_objectives_give_the_exit_code(target: str, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = quick(target, "--closed", "--slo", "p50=1us", "--html", report, "--csv", tmp_path / "rows.csv")
    assert done.returncode == 8
    assert figures_of(done)["slo"]["holds"] is False
    assert "The objective is broken" in report.read_text()
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert sum(float(row["rate_pages_s"]) for row in rows) > 0
    assert quick(target, "--closed", "--slo", "p50=100s").returncode == 0


def test_a_search_finds_a_rate(target: str) -> None:
    search = ("--slo", "p50=100s", "--rate-first", "200", "--rate-last", "400", "--step", "0.5", "--tries", "5")
    done = run("--source", target, "--seed", str(SEED), "--json", *search)
    figures = figures_of(done)
    assert done.returncode == 0, done.stderr
    assert 0 < figures["slo"]["rate_pages_s"] <= 400
    assert [step["offered_pages_s"] for step in figures["slo"]["steps"]][:1] == [200]


def test_a_replay_ends_with_its_trace(target: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.trace"
    trace.write_text("".join(f"{index / 1000} {index % 3} {index * 11} {'rw'[index % 2]}\n" for index in range(300)))
    done = run("--source", target, "--seed", str(SEED), "--replay", trace, "--json")
    figures = figures_of(done)
    assert done.returncode == 0, done.stderr
    assert figures["pages"] == 300
    assert figures["writes"] == 150
    assert figures["ended_by"] == "the trace was over"
    assert figures["setup"]["vcpus"] == 3


def test_a_comparison_with_an_earlier_run(target: str, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text(quick(target).stdout)
    done = run("--source", target, "--warmup", "0.1", "--duration", "0.4", "--seed", str(SEED), "--compare", earlier)
    assert done.returncode == 0, done.stderr
    assert "now / earlier" in done.stdout
    assert "latency_us.p50" in done.stdout


def test_memory_of_a_file_is_verified_by_checksum(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(os.urandom(1 << 20))
    with page_server(tmp_path, "--ram", str(ram)) as address:
        done = run("--source", address, "--warmup", "0.1", "--duration", "20", "--json")
        figures = figures_of(done)
        assert done.returncode == 0, done.stderr
        assert figures["verified_by"] == "checksum"
        assert figures["ended_by"] == "every page of the memory was fetched"
        assert 240 <= figures["pages"] <= 256
        wrong_use = quick(address)
        assert wrong_use.returncode == 2
        assert "leave --seed out" in wrong_use.stderr


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    """The faults that waited go on to wait, and their wait is counted."""
    state = ("--synthetic", "1GiB", "--seed", str(SEED), "--state", str(tmp_path / "state"))
    with page_server(tmp_path, *state) as address:
        command = [*FARFAULT, "load", "--source", address, "--seed", str(SEED), "--duration", "6", "--json"]
        load = subprocess.Popen([*command, "--warmup", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until_measuring(load)
    with page_server(tmp_path, *state, listen=address):
        output, errors = load.communicate(timeout=COMMAND_TIMEOUT_S)
    figures = json.loads(output)
    assert load.returncode == 0, errors
    assert figures["verification_errors"] == figures["errors"] == 0
    assert figures["reconnects"] >= 1


def test_sigterm_ends_early_and_shows_what_was_measured(target: str) -> None:
    command = [
        *FARFAULT,
        "load",
        "--source",
        target,
        "--seed",
        str(SEED),
        "--duration",
        "60",
        "--warmup",
        "0",
        "--json",
    ]
    load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_measuring(load)
    load.send_signal(signal.SIGTERM)
    output, errors = load.communicate(timeout=COMMAND_TIMEOUT_S)
    figures = json.loads(output)
    assert load.returncode == 0, errors
    assert figures["pages"] > 0
    assert figures["ended_by"] == "it was told to end"
    assert figures["elapsed_s"] < 60


def test_nobody_there() -> None:
    done = run("--source", "127.0.0.1:1", "--json")
    assert done.returncode == 6
    assert "does not answer" in done.stderr
    assert run("--json").returncode == 2
