"""What a load test does, as data: it travels as JSON from the command to its worker processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

VCPUS_MAX = 4096
CONNECTIONS_MAX = 256
PROCESSES_MAX = 64
DURATION_MAX_S = 86_400.0
PAGES_PER_REQUEST = 256
"""Faults that wait at the same moment travel in one request, up to this many."""
OUTSTANDING_MAX = 4096
"""Faults of one process that may wait for an answer at one time; more stay due, and their latency grows."""
DRAIN_S_MAX = 10.0
"""After the last fault was issued, answers are waited for this long; what is still missing is an error."""
ERRORS_IN_A_ROW_MAX = 1000
"""Refused faults without one good answer between them: the run ends."""


class PatternKind(Enum):
    """Which page a vCPU touches next."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"
    ZIPF = "zipf"
    STRIDE = "stride"
    REPLAY = "replay"


class Arrivals(Enum):
    """When the faults of an open loop are due."""

    CONSTANT = "constant"
    POISSON = "poisson"
    RECORDED = "recorded"


@dataclass(frozen=True, slots=True)
class PatternPlan:
    """What vCPUs touch.

    Attributes:
        kind: which pattern.
        stride_pages: distance of two accesses, for STRIDE.
        zipf_exponent: skew, for ZIPF; larger is more skewed.
        write_share: share of accesses that are writes, 0 to 1.
        refetch: a page that was fetched may be asked for again.
        random_seed: of all random choices.
        trace: file to replay; empty: none.
        trace_speed: times as fast as recorded.
    """

    kind: PatternKind = PatternKind.RANDOM
    stride_pages: int = 16
    zipf_exponent: float = 0.99
    write_share: float = 0.0
    refetch: bool = False
    random_seed: int = 1
    trace: str = ""
    trace_speed: float = 1.0


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """How to reach the page server; see `farfault_client.session.connect.session_config`."""

    target: str
    tls: str = ""
    insecure: bool = False
    admission_token_file: str = ""
    express: bool = True
    name: str = "farfault load"


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What one worker process is.

    Attributes:
        server: where it connects.
        pattern: what its vCPUs touch.
        vcpus: numbers of its vCPUs among all `vcpus_total`.
        vcpus_total: of the whole test.
        process, processes: which of how many workers; a trace's vCPUs are dealt out by them.
        connections: that its vCPUs share, each with a clone lease of its own.
        memory_seed: that synthetic pages are compared with; None: checksums only.
        pages_per_request: most pages in one request.
        background: it has no vCPUs and streams memory over the background lane.
        background_bytes_per_s: cap of that stream; 0: none.
    """

    server: ServerPlan
    pattern: PatternPlan = PatternPlan()
    vcpus: tuple[int, ...] = (0,)
    vcpus_total: int = 1
    process: int = 0
    processes: int = 1
    connections: int = 1
    memory_seed: int | None = None
    pages_per_request: int = PAGES_PER_REQUEST
    background: bool = False
    background_bytes_per_s: int = 0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One measurement by one worker.

    Attributes:
        start_at: on CLOCK_MONOTONIC, so that all workers start together.
        warmup_s: faults due within it are not counted.
        duration_s: faults are issued for this long after the warm-up.
        rate_per_s: faults due each second at this worker; None: closed loop.
        arrivals: of an open loop; RECORDED needs no rate.
        pages_max: counted faults after which no more are issued; 0: no bound but the duration.
    """

    start_at: float
    warmup_s: float
    duration_s: float
    rate_per_s: float | None = None
    arrivals: Arrivals = Arrivals.CONSTANT
    pages_max: int = 0

    @property
    def is_open_loop(self) -> bool:
        return self.rate_per_s is not None or self.arrivals is Arrivals.RECORDED


P = TypeVar("P", PatternPlan, ServerPlan, WorkerPlan, RunPlan)

_NESTED: dict[str, Any] = {"server": ServerPlan, "pattern": PatternPlan}
_ENUMS: dict[str, Any] = {"kind": PatternKind, "arrivals": Arrivals}


def to_json(plan: PatternPlan | ServerPlan | WorkerPlan | RunPlan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {name: _plain(value) for name, value in dataclasses.asdict(plan).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.value if isinstance(value, Enum) else value


def from_json(kind: type[P], values: dict[str, Any]) -> P:
    """The plan that `to_json` wrote."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NESTED:
            fields[name] = from_json(_NESTED[name], value)
        elif name in _ENUMS:
            fields[name] = _ENUMS[name](value)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)
