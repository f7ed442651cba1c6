"""Numbers and structs of ``linux/userfaultfd.h``; a test compares them with the header."""

from __future__ import annotations

import struct
from typing import Final

SYS_USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282}
DEVICE: Final = "/dev/userfaultfd"
USERFAULTFD_IOC_NEW: Final = 0xAA00

UFFD_API: Final = 0xAA
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04

UFFDIO_REGISTER_MODE_MISSING: Final = 1
UFFDIO_COPY_MODE_DONTWAKE: Final = 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1
UFFD_USER_MODE_ONLY: Final = 1

FEATURE_EVENT_FORK: Final = 1 << 1
FEATURE_EVENT_REMAP: Final = 1 << 2
FEATURE_EVENT_REMOVE: Final = 1 << 3
FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
FEATURE_MISSING_SHMEM: Final = 1 << 5
FEATURE_EVENT_UNMAP: Final = 1 << 6
FEATURE_SIGBUS: Final = 1 << 7
FEATURE_THREAD_ID: Final = 1 << 8
FEATURE_MINOR_SHMEM: Final = 1 << 10

EVENT_PAGEFAULT: Final = 0x12
EVENT_FORK: Final = 0x13
EVENT_REMAP: Final = 0x14
EVENT_REMOVE: Final = 0x15
EVENT_UNMAP: Final = 0x16

PAGEFAULT_FLAG_WRITE: Final = 1

API: Final = struct.Struct("<QQQ")
"""uffdio_api: api, features, ioctls."""
REGISTER: Final = struct.Struct("<QQQQ")
"""uffdio_register: start, len, mode, ioctls."""
RANGE: Final = struct.Struct("<QQ")
"""uffdio_range: start, len."""
COPY: Final = struct.Struct("<QQQQq")
"""uffdio_copy: dst, src, len, mode, copy."""
ZEROPAGE: Final = struct.Struct("<QQQq")
"""uffdio_zeropage: start, len, mode, zeropage."""
MESSAGE: Final = struct.Struct("<BxxxxxxxQQI4x")
"""uffd_msg of a page fault: event, flags, address, thread id."""
MESSAGE_RANGE: Final = struct.Struct("<BxxxxxxxQQ8x")
"""uffd_msg of a remove or unmap: event, start, end."""
MESSAGE_BYTES: Final = 32
