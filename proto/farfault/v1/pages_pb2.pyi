from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_KIND_UNSPECIFIED: _ClassVar[LeaseKind]
    LEASE_KIND_MIGRATION: _ClassVar[LeaseKind]
    LEASE_KIND_CLONE: _ClassVar[LeaseKind]

class VmState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VM_STATE_UNSPECIFIED: _ClassVar[VmState]
    VM_STATE_RUNNING: _ClassVar[VmState]
    VM_STATE_FROZEN: _ClassVar[VmState]
    VM_STATE_HANDED_OVER: _ClassVar[VmState]
    VM_STATE_COMPLETED: _ClassVar[VmState]

class LaneKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LANE_KIND_UNSPECIFIED: _ClassVar[LaneKind]
    LANE_KIND_BACKGROUND: _ClassVar[LaneKind]
    LANE_KIND_EXPRESS: _ClassVar[LaneKind]
    LANE_KIND_EXPRESS_BACKGROUND: _ClassVar[LaneKind]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_VCPU: _ClassVar[Priority]
    PRIORITY_VMM: _ClassVar[Priority]
    PRIORITY_NEIGHBOUR: _ClassVar[Priority]
    PRIORITY_HINT: _ClassVar[Priority]
    PRIORITY_BACKGROUND: _ClassVar[Priority]

class ExtentKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTENT_KIND_DATA: _ClassVar[ExtentKind]
    EXTENT_KIND_ZERO: _ClassVar[ExtentKind]
    EXTENT_KIND_OUT_OF_RANGE: _ClassVar[ExtentKind]
    EXTENT_KIND_NOT_FROZEN: _ClassVar[ExtentKind]
    EXTENT_KIND_IO_ERROR: _ClassVar[ExtentKind]
    EXTENT_KIND_REJECTED: _ClassVar[ExtentKind]
LEASE_KIND_UNSPECIFIED: LeaseKind
LEASE_KIND_MIGRATION: LeaseKind
LEASE_KIND_CLONE: LeaseKind
VM_STATE_UNSPECIFIED: VmState
VM_STATE_RUNNING: VmState
VM_STATE_FROZEN: VmState
VM_STATE_HANDED_OVER: VmState
VM_STATE_COMPLETED: VmState
LANE_KIND_UNSPECIFIED: LaneKind
LANE_KIND_BACKGROUND: LaneKind
LANE_KIND_EXPRESS: LaneKind
LANE_KIND_EXPRESS_BACKGROUND: LaneKind
PRIORITY_UNSPECIFIED: Priority
PRIORITY_VCPU: Priority
PRIORITY_VMM: Priority
PRIORITY_NEIGHBOUR: Priority
PRIORITY_HINT: Priority
PRIORITY_BACKGROUND: Priority
EXTENT_KIND_DATA: ExtentKind
EXTENT_KIND_ZERO: ExtentKind
EXTENT_KIND_OUT_OF_RANGE: ExtentKind
EXTENT_KIND_NOT_FROZEN: ExtentKind
EXTENT_KIND_IO_ERROR: ExtentKind
EXTENT_KIND_REJECTED: ExtentKind

class OpenRequest(_message.Message):
    __slots__ = ("protocol_version", "kind", "client_name", "features", "resume_lease_id", "resume_token", "expected_generation")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    RESUME_LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    kind: LeaseKind
    client_name: str
    features: _containers.RepeatedScalarFieldContainer[str]
    resume_lease_id: str
    resume_token: str
    expected_generation: int
    def __init__(self, protocol_version: _Optional[int] = ..., kind: _Optional[_Union[LeaseKind, str]] = ..., client_name: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., resume_lease_id: _Optional[str] = ..., resume_token: _Optional[str] = ..., expected_generation: _Optional[int] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("id", "name", "gpa", "size_bytes", "page_size_bytes", "offset_bytes", "backing")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    GPA_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKING_FIELD_NUMBER: _ClassVar[int]
    id: int
    name: str
    gpa: int
    size_bytes: int
    page_size_bytes: int
    offset_bytes: int
    backing: str
    def __init__(self, id: _Optional[int] = ..., name: _Optional[str] = ..., gpa: _Optional[int] = ..., size_bytes: _Optional[int] = ..., page_size_bytes: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., backing: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_request_pages", "max_batch_bytes", "max_requests_in_flight", "max_digest_pages")
    MAX_REQUEST_PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_DIGEST_PAGES_FIELD_NUMBER: _ClassVar[int]
    max_request_pages: int
    max_batch_bytes: int
    max_requests_in_flight: int
    max_digest_pages: int
    def __init__(self, max_request_pages: _Optional[int] = ..., max_batch_bytes: _Optional[int] = ..., max_requests_in_flight: _Optional[int] = ..., max_digest_pages: _Optional[int] = ...) -> None: ...

class LaneAddress(_message.Message):
    __slots__ = ("kind", "port")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    kind: LaneKind
    port: int
    def __init__(self, kind: _Optional[_Union[LaneKind, str]] = ..., port: _Optional[int] = ...) -> None: ...

class LaneHello(_message.Message):
    __slots__ = ("protocol_version", "lease_id", "token")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    lease_id: str
    token: str
    def __init__(self, protocol_version: _Optional[int] = ..., lease_id: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class LaneWelcome(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("protocol_version", "lease_id", "token", "generation", "regions", "limits", "features", "vm_state", "server_version", "lanes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    VM_STATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    lease_id: str
    token: str
    generation: int
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    limits: Limits
    features: _containers.RepeatedScalarFieldContainer[str]
    vm_state: VmState
    server_version: str
    lanes: _containers.RepeatedCompositeFieldContainer[LaneAddress]
    def __init__(self, protocol_version: _Optional[int] = ..., lease_id: _Optional[str] = ..., token: _Optional[str] = ..., generation: _Optional[int] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., features: _Optional[_Iterable[str]] = ..., vm_state: _Optional[_Union[VmState, str]] = ..., server_version: _Optional[str] = ..., lanes: _Optional[_Iterable[_Union[LaneAddress, _Mapping]]] = ...) -> None: ...

class PageRange(_message.Message):
    __slots__ = ("region", "first_page", "page_count")
    REGION_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    region: int
    first_page: int
    page_count: int
    def __init__(self, region: _Optional[int] = ..., first_page: _Optional[int] = ..., page_count: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("request_id", "priority", "ranges")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    priority: Priority
    ranges: _containers.RepeatedCompositeFieldContainer[PageRange]
    def __init__(self, request_id: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., ranges: _Optional[_Iterable[_Union[PageRange, _Mapping]]] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("region", "first_page", "page_count", "kind")
    REGION_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    region: int
    first_page: int
    page_count: int
    kind: ExtentKind
    def __init__(self, region: _Optional[int] = ..., first_page: _Optional[int] = ..., page_count: _Optional[int] = ..., kind: _Optional[_Union[ExtentKind, str]] = ...) -> None: ...

class PageBatch(_message.Message):
    __slots__ = ("done_request_ids", "extents", "checksum", "data", "generation", "server_queue_us", "server_read_us")
    DONE_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    SERVER_READ_US_FIELD_NUMBER: _ClassVar[int]
    done_request_ids: _containers.RepeatedScalarFieldContainer[int]
    extents: _containers.RepeatedCompositeFieldContainer[Extent]
    checksum: int
    data: bytes
    generation: int
    server_queue_us: int
    server_read_us: int
    def __init__(self, done_request_ids: _Optional[_Iterable[int]] = ..., extents: _Optional[_Iterable[_Union[Extent, _Mapping]]] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ..., generation: _Optional[int] = ..., server_queue_us: _Optional[int] = ..., server_read_us: _Optional[int] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("generation", "installed_pages", "zero_pages")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    INSTALLED_PAGES_FIELD_NUMBER: _ClassVar[int]
    ZERO_PAGES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    installed_pages: int
    zero_pages: int
    def __init__(self, generation: _Optional[int] = ..., installed_pages: _Optional[int] = ..., zero_pages: _Optional[int] = ...) -> None: ...

class CompleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DigestRequest(_message.Message):
    __slots__ = ("ranges",)
    RANGES_FIELD_NUMBER: _ClassVar[int]
    ranges: _containers.RepeatedCompositeFieldContainer[PageRange]
    def __init__(self, ranges: _Optional[_Iterable[_Union[PageRange, _Mapping]]] = ...) -> None: ...

class DigestResponse(_message.Message):
    __slots__ = ("digests", "generation")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    generation: int
    def __init__(self, digests: _Optional[_Iterable[int]] = ..., generation: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeVmRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeVmResponse(_message.Message):
    __slots__ = ("description",)
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    description: VmDescription
    def __init__(self, description: _Optional[_Union[VmDescription, _Mapping]] = ...) -> None: ...

class VmDescription(_message.Message):
    __slots__ = ("vmm", "machine_type", "vcpus", "status", "memory", "capabilities", "accelerator")
    VMM_FIELD_NUMBER: _ClassVar[int]
    MACHINE_TYPE_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    vmm: str
    machine_type: str
    vcpus: int
    status: str
    memory: _containers.RepeatedCompositeFieldContainer[MemoryBackend]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    accelerator: str
    def __init__(self, vmm: _Optional[str] = ..., machine_type: _Optional[str] = ..., vcpus: _Optional[int] = ..., status: _Optional[str] = ..., memory: _Optional[_Iterable[_Union[MemoryBackend, _Mapping]]] = ..., capabilities: _Optional[_Iterable[str]] = ..., accelerator: _Optional[str] = ...) -> None: ...

class MemoryBackend(_message.Message):
    __slots__ = ("id", "size_bytes", "shared")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    id: str
    size_bytes: int
    shared: bool
    def __init__(self, id: _Optional[str] = ..., size_bytes: _Optional[int] = ..., shared: _Optional[bool] = ...) -> None: ...

class SuspendRequest(_message.Message):
    __slots__ = ("resume_after_ms",)
    RESUME_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    resume_after_ms: int
    def __init__(self, resume_after_ms: _Optional[int] = ...) -> None: ...

class DeviceStateChunk(_message.Message):
    __slots__ = ("data", "last", "checksum", "generation", "stopped_unix_us", "stopped_for_us")
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STOPPED_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FOR_US_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    last: bool
    checksum: int
    generation: int
    stopped_unix_us: int
    stopped_for_us: int
    def __init__(self, data: _Optional[bytes] = ..., last: _Optional[bool] = ..., checksum: _Optional[int] = ..., generation: _Optional[int] = ..., stopped_unix_us: _Optional[int] = ..., stopped_for_us: _Optional[int] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("resume_after_ms",)
    RESUME_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    resume_after_ms: int
    def __init__(self, resume_after_ms: _Optional[int] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HandOverRequest(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class HandOverResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
