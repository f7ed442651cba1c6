"""The NOWAIT interfaces that patch series give KVM. No I/O.

No mainline kernel has one, and most of their numbers are not allocated: they are configuration. What differs
between the series is how the exit looks and what has to be turned on:

=====================  ==============================  =====================================================
series                 turned on by                    exit
=====================  ==============================  =====================================================
ABSENT_MAPPING_FAULT   memslot flag, and               annotated; bare until KVM_CAP_MEMORY_FAULT_INFO is
(v3, April 2023)       KVM_ENABLE_CAP of the info      enabled
NOWAIT_ON_FAULT        memslot flag                    annotated
(v4, June 2023)
EXIT_ON_MISSING        memslot flag                    annotated
(v6, v7, 2023-2024)
KVM Userfault          memslot flag and a bitmap, bit  annotated, with KVM_MEMORY_EXIT_FLAG_USERFAULT
(v1-v3, 2024-2025)     per page of the slot
=====================  ==============================  =====================================================

In all of them KVM_ENABLE_CAP of the series' own capability fails with EINVAL by design.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from farfault_shim.kvm import abi


class NowaitSeries(Enum):
    """A patch series."""

    ABSENT_MAPPING_FAULT = "absent-mapping-fault"
    NOWAIT_ON_FAULT = "nowait-on-fault"
    EXIT_ON_MISSING = "exit-on-missing"
    USERFAULT = "userfault"


class NowaitInterface(NamedTuple):
    """A series with the numbers that some kernel gave it.

    Attributes:
        series: which one.
        capability: number for KVM_CHECK_EXTENSION.
        memslot_flag: the flag's value, one bit.
    """

    series: NowaitSeries
    capability: int
    memslot_flag: int

    @property
    def needs_info_enabled(self) -> bool:
        """Exits are annotated only after KVM_ENABLE_CAP of KVM_CAP_MEMORY_FAULT_INFO."""
        return self.series is NowaitSeries.ABSENT_MAPPING_FAULT

    @property
    def has_bitmap(self) -> bool:
        """A bitmap says which pages exit."""
        return self.series is NowaitSeries.USERFAULT


EXIT_ON_MISSING = NowaitInterface(NowaitSeries.EXIT_ON_MISSING, abi.CAP_EXIT_ON_MISSING, abi.MEM_EXIT_ON_MISSING)
"""With the numbers of the patches v6 and v7."""
