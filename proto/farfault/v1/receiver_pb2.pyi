from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_WAITING: _ClassVar[Phase]
    PHASE_PREFLIGHT: _ClassVar[Phase]
    PHASE_SWITCHOVER: _ClassVar[Phase]
    PHASE_POSTCOPY: _ClassVar[Phase]
    PHASE_DONE: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
PHASE_WAITING: Phase
PHASE_PREFLIGHT: Phase
PHASE_SWITCHOVER: Phase
PHASE_POSTCOPY: Phase
PHASE_DONE: Phase
PHASE_FAILED: Phase

class PreflightRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Check(_message.Message):
    __slots__ = ("name", "passed", "detail", "remedy")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    name: str
    passed: bool
    detail: str
    remedy: str
    def __init__(self, name: _Optional[str] = ..., passed: _Optional[bool] = ..., detail: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class PreflightResponse(_message.Message):
    __slots__ = ("checks",)
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    checks: _containers.RepeatedCompositeFieldContainer[Check]
    def __init__(self, checks: _Optional[_Iterable[_Union[Check, _Mapping]]] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("status_interval_ms",)
    STATUS_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    status_interval_ms: int
    def __init__(self, status_interval_ms: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval_ms", "map_cells")
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    MAP_CELLS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    map_cells: int
    def __init__(self, interval_ms: _Optional[int] = ..., map_cells: _Optional[int] = ...) -> None: ...

class WorkingSetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkingSetResponse(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: bytes
    def __init__(self, pages: _Optional[bytes] = ...) -> None: ...

class TuneRequest(_message.Message):
    __slots__ = ("background_bytes_per_s",)
    BACKGROUND_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    background_bytes_per_s: int
    def __init__(self, background_bytes_per_s: _Optional[int] = ...) -> None: ...

class TuneResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LatencySummary(_message.Message):
    __slots__ = ("p50_us", "p90_us", "p99_us", "max_us", "mean_us", "count")
    P50_US_FIELD_NUMBER: _ClassVar[int]
    P90_US_FIELD_NUMBER: _ClassVar[int]
    P99_US_FIELD_NUMBER: _ClassVar[int]
    MAX_US_FIELD_NUMBER: _ClassVar[int]
    MEAN_US_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    mean_us: float
    count: int
    def __init__(self, p50_us: _Optional[float] = ..., p90_us: _Optional[float] = ..., p99_us: _Optional[float] = ..., max_us: _Optional[float] = ..., mean_us: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class LaneStatus(_message.Message):
    __slots__ = ("name", "carrier", "bytes", "connects", "bad_answers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CONNECTS_FIELD_NUMBER: _ClassVar[int]
    BAD_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    carrier: str
    bytes: int
    connects: int
    bad_answers: int
    def __init__(self, name: _Optional[str] = ..., carrier: _Optional[str] = ..., bytes: _Optional[int] = ..., connects: _Optional[int] = ..., bad_answers: _Optional[int] = ...) -> None: ...

class VcpuStatus(_message.Message):
    __slots__ = ("vcpu", "blocked_s", "waiting_s", "waiting_page", "exits")
    VCPU_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_PAGE_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    vcpu: int
    blocked_s: float
    waiting_s: float
    waiting_page: int
    exits: int
    def __init__(self, vcpu: _Optional[int] = ..., blocked_s: _Optional[float] = ..., waiting_s: _Optional[float] = ..., waiting_page: _Optional[int] = ..., exits: _Optional[int] = ...) -> None: ...

class MigrationStatus(_message.Message):
    __slots__ = ("phase", "message", "error", "remedy", "guest_pages", "installed_pages", "zero_pages", "removed_pages", "demand_faults", "faults_by_source", "fault_latency", "bytes_on_wire", "downtime_ms", "postcopy_s", "fault_source", "page_size_bytes", "connected", "counters", "checks", "lanes", "vcpus", "map", "eta_s", "background_bytes_per_s", "exit_code", "longest_wait_s")
    class FaultsBySourceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    GUEST_PAGES_FIELD_NUMBER: _ClassVar[int]
    INSTALLED_PAGES_FIELD_NUMBER: _ClassVar[int]
    ZERO_PAGES_FIELD_NUMBER: _ClassVar[int]
    REMOVED_PAGES_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FAULTS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_BY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    FAULT_LATENCY_FIELD_NUMBER: _ClassVar[int]
    BYTES_ON_WIRE_FIELD_NUMBER: _ClassVar[int]
    DOWNTIME_MS_FIELD_NUMBER: _ClassVar[int]
    POSTCOPY_S_FIELD_NUMBER: _ClassVar[int]
    FAULT_SOURCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    LONGEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    message: str
    error: str
    remedy: str
    guest_pages: int
    installed_pages: int
    zero_pages: int
    removed_pages: int
    demand_faults: int
    faults_by_source: _containers.ScalarMap[str, int]
    fault_latency: LatencySummary
    bytes_on_wire: int
    downtime_ms: float
    postcopy_s: float
    fault_source: str
    page_size_bytes: int
    connected: bool
    counters: _containers.ScalarMap[str, int]
    checks: _containers.RepeatedCompositeFieldContainer[Check]
    lanes: _containers.RepeatedCompositeFieldContainer[LaneStatus]
    vcpus: _containers.RepeatedCompositeFieldContainer[VcpuStatus]
    map: bytes
    eta_s: float
    background_bytes_per_s: int
    exit_code: int
    longest_wait_s: float
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., message: _Optional[str] = ..., error: _Optional[str] = ..., remedy: _Optional[str] = ..., guest_pages: _Optional[int] = ..., installed_pages: _Optional[int] = ..., zero_pages: _Optional[int] = ..., removed_pages: _Optional[int] = ..., demand_faults: _Optional[int] = ..., faults_by_source: _Optional[_Mapping[str, int]] = ..., fault_latency: _Optional[_Union[LatencySummary, _Mapping]] = ..., bytes_on_wire: _Optional[int] = ..., downtime_ms: _Optional[float] = ..., postcopy_s: _Optional[float] = ..., fault_source: _Optional[str] = ..., page_size_bytes: _Optional[int] = ..., connected: _Optional[bool] = ..., counters: _Optional[_Mapping[str, int]] = ..., checks: _Optional[_Iterable[_Union[Check, _Mapping]]] = ..., lanes: _Optional[_Iterable[_Union[LaneStatus, _Mapping]]] = ..., vcpus: _Optional[_Iterable[_Union[VcpuStatus, _Mapping]]] = ..., map: _Optional[bytes] = ..., eta_s: _Optional[float] = ..., background_bytes_per_s: _Optional[int] = ..., exit_code: _Optional[int] = ..., longest_wait_s: _Optional[float] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
