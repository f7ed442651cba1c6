"""Which steps are measured, and which belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from farfault_client.bench.micro.bench_host import BenchHost

FETCHES: Final = 3000
STREAM_MIB: Final = 256
INSTALL_PAGES: Final = 40_000
FAULTS: Final = 4000
THREADS: Final = (1, 8)

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure; all cases of a group run in turn."""

    group: str
    name: str
    run: Callable[[BenchHost], Figures]


@dataclass(frozen=True, slots=True)
class Pair:
    """Ours beside its limit.

    Attributes:
        title: of the row.
        group: of both cases.
        ours, limit: names of cases.
        figure: of both that is compared.
        unit: it is in.
        more_is_better: else less is.
    """

    title: str
    group: str
    ours: str
    limit: str
    figure: str
    unit: str
    more_is_better: bool = False

    @property
    def name(self) -> str:
        """Of the ratio, for scripts."""
        return f"{self.group}.{self.ours}.{self.figure}"


def _fetch(lane: str, *, background: bool) -> Callable[[BenchHost], Figures]:
    def run(host: BenchHost) -> Figures:
        with host.page_server() as (target, _):
            return host.worker("lane_worker", "fetch", target, lane, FETCHES, int(background))

    return run


def _bulk(*, install: bool) -> Callable[[BenchHost], Figures]:
    def run(host: BenchHost) -> Figures:
        with host.page_server() as (target, _):
            return host.worker("lane_worker", "bulk", target, int(install))

    return run


def _pingpong(kind: str) -> Callable[[BenchHost], Figures]:
    return lambda host: host.c("pingpong", kind, FETCHES)


def _stream(install: int) -> Callable[[BenchHost], Figures]:
    return lambda host: host.c("stream", "tcp", STREAM_MIB, install)


def _c_install(run_pages: int) -> Callable[[BenchHost], Figures]:
    return lambda host: host.c("install", run_pages, INSTALL_PAGES)


def _install(run_pages: int) -> Callable[[BenchHost], Figures]:
    return lambda host: host.worker("install_worker", run_pages, INSTALL_PAGES)


def _c_faults(threads: int) -> Callable[[BenchHost], Figures]:
    return lambda host: host.faults("c", threads, FAULTS, None, "tcp")


def _faults(pager: str, threads: int, *flags: str) -> Callable[[BenchHost], Figures]:
    def run(host: BenchHost) -> Figures:
        with host.receiver(*flags) as attach:
            return host.faults(pager, threads, FAULTS, attach, "tcp")

    return run


def _fault_cases(threads: int) -> list[Case]:
    group = f"fault-{threads}"
    return [
        Case(group, "c", _c_faults(threads)),
        Case(group, "uffd", _faults("uffd", threads)),
        Case(group, "uffd-grpc", _faults("uffd", threads, "--no-express")),
        Case(group, "vcpu", _faults("vcpu", threads)),
    ]


def _fault_pairs(threads: int) -> list[Pair]:
    group = f"fault-{threads}"
    names = {
        "uffd": "userfaultfd, express",
        "uffd-grpc": "userfaultfd, gRPC",
        "vcpu": "vCPU exits (asked from Python), express",
    }
    who = f"{threads} thread" + ("s" if threads > 1 else "")
    pairs = []
    for case, name in names.items():
        pairs.append(Pair(f"fault, {who}, {name}: p50", group, case, "c", "p50_us", "us"))
        pairs.append(Pair(f"fault, {who}, {name}: p99", group, case, "c", "p99_us", "us"))
        pairs.append(Pair(f"fault, {who}, {name}: rate", group, case, "c", "faults_per_s", "1/s", True))
    return pairs


CASES: Final = (
    Case("fetch", "c-unix", _pingpong("unix")),
    Case("fetch", "c-tcp", _pingpong("tcp")),
    Case("fetch", "grpc", _fetch("grpc", background=False)),
    Case("fetch", "express", _fetch("express", background=False)),
    Case("fetch", "grpc-busy", _fetch("grpc", background=True)),
    Case("fetch", "express-busy", _fetch("express", background=True)),
    Case("bulk", "c", _stream(0)),
    Case("bulk", "c-install", _stream(1)),
    Case("bulk", "ours", _bulk(install=False)),
    Case("bulk", "ours-install", _bulk(install=True)),
    Case("install", "c-1", _c_install(1)),
    Case("install", "ours-1", _install(1)),
    Case("install", "c-64", _c_install(64)),
    Case("install", "ours-64", _install(64)),
    *(case for threads in THREADS for case in _fault_cases(threads)),
)

PAIRS: Final = (
    Pair("fetch 4 KiB, gRPC: p50 over C (TCP)", "fetch", "grpc", "c-tcp", "p50_us", "us"),
    Pair("fetch 4 KiB, express: p50 over C (TCP)", "fetch", "express", "c-tcp", "p50_us", "us"),
    Pair("fetch 4 KiB, gRPC: p99 over C (TCP)", "fetch", "grpc", "c-tcp", "p99_us", "us"),
    Pair("fetch 4 KiB, express: p99 over C (TCP)", "fetch", "express", "c-tcp", "p99_us", "us"),
    Pair("fetch while background flows, gRPC: p50 over idle", "fetch", "grpc-busy", "grpc", "p50_us", "us"),
    Pair("fetch while background flows, gRPC: p99 over idle", "fetch", "grpc-busy", "grpc", "p99_us", "us"),
    Pair("fetch while background flows, express: p50 over idle", "fetch", "express-busy", "express", "p50_us", "us"),
    Pair("fetch while background flows, express: p99 over idle", "fetch", "express-busy", "express", "p99_us", "us"),
    Pair("background, thrown away, over C (TCP)", "bulk", "ours", "c", "mb_per_s", "MB/s", True),
    Pair("background, installed, over C (TCP)", "bulk", "ours-install", "c-install", "mb_per_s", "MB/s", True),
    Pair("install 1 page, over C", "install", "ours-1", "c-1", "us_per_call", "us"),
    Pair("install 64 pages, over C", "install", "ours-64", "c-64", "us_per_call", "us"),
    *(pair for threads in THREADS for pair in _fault_pairs(threads)),
)
