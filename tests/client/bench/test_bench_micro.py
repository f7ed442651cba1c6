"""The baselines in C compile and do what they are compared for; the workers measure what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from farfault_client.bench import programs
from farfault_client.bench.micro.bench_host import PROCESSORS, BenchHost
from farfault_client.bench.micro.cases import CASES, PAIRS
from farfault_client.bench.micro.ram_file import PAGE_BYTES, make_ram_file, page

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
PAGES = 512


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield programs.compiled()


def run(program: Path, *arguments: object) -> dict[str, float]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, check=True, timeout=60)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def test_programs_are_compiled_once(compiled: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in compiled.iterdir()}
    assert programs.compiled() == compiled
    assert {path: path.stat().st_mtime_ns for path in compiled.iterdir()} == before
    assert len(before) == len(programs.SOURCES)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_baselines_measure(compiled: Path, kind: str) -> None:
    assert run(compiled / "pingpong", kind, 50)["p50_us"] > 0
    assert run(compiled / "stream", kind, 4, 1)["mb_per_s"] > 0
    assert run(compiled / "install", 8, 64)["us_per_call"] > 0


def test_pages_of_the_ram_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    make_ram_file(path, PAGES)
    assert path.stat().st_size == PAGES * PAGE_BYTES
    data = path.read_bytes()
    assert all(data[n * PAGE_BYTES : (n + 1) * PAGE_BYTES] == page(n) for n in (0, 1, PAGES - 1))


@pytest.mark.parametrize("threads", [1, 4])
def test_faults_of_the_c_pager_bring_the_right_pages(compiled: Path, tmp_path: Path, threads: int) -> None:
    ram = tmp_path / "ram"
    make_ram_file(ram, PAGES)
    options = {
        "pager": "c",
        "programs": str(compiled),
        "ram": str(ram),
        "attach": "",
        "pages": PAGES,
        "each": 64,
        "threads": threads,
        "socket": "unix",
    }
    command = [sys.executable, "-m", "farfault_client.bench.micro.fault_worker", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0 < figures["p50_us"] <= figures["p99_us"]
    assert figures["faults_per_s"] > 0


@pytest.mark.parametrize("pager", ["uffd", "vcpu"])
def test_faults_of_a_receiver_bring_the_right_pages(pager: str) -> None:
    with BenchHost() as host, host.receiver() as attach:
        assert host.faults(pager, 2, 64, attach, "tcp")["faults_per_s"] > 0


@pytest.mark.parametrize("lane", ["grpc", "express"])
def test_a_bare_lane_fetches_while_the_background_flows(lane: str) -> None:
    with BenchHost() as host, host.page_server() as (target, _):
        figures = host.worker("lane_worker", "fetch", target, lane, 40, 1)
    assert 0 < figures["p50_us"] <= figures["p99_us"]


def test_every_pair_has_its_cases() -> None:
    cases = {(case.group, case.name) for case in CASES}
    assert {(pair.group, name) for pair in PAIRS for name in (pair.ours, pair.limit)} <= cases
    assert len({pair.name for pair in PAIRS}) == len(PAIRS)


def test_everything_shares_two_processors() -> None:
    usable = os.sched_getaffinity(0)
    with BenchHost():
        assert os.sched_getaffinity(0) == set(sorted(usable)[:PROCESSORS])
    assert os.sched_getaffinity(0) == usable
