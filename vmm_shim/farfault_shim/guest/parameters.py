"""What the guest is told: which pages are its data, who works on which, in what order. No I/O.

Data pages are numbered through the low region (below 4 GiB) and then the high region (from 4 GiB), one
every ``step_bytes``. Each vCPU owns a slice of equal length. It fills page n with ``first_word(n)``, and in
each visit afterwards expects what it left, and adds one. The same word lies at offset 0 and at offset
``second_word_offset(vcpu)`` of the page.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from farfault_shim.guest.addresses import DATA_START_MIN, MAPPED_GIB_MAX, PAGE_BYTES, VCPUS_MAX
from farfault_shim.guest.skew import GOLDEN, Skew, skew_classes
from farfault_shim.layout import Gpa

GIB = 1 << 30
FOUR_GIB = 4 * GIB
IMAGE_BYTES = 64 << 10
BLOCK_IN_IMAGE = 0xF000
BLOCK_MAGIC = b"FARFAULT"
BLOCK_VERSION = 2
HEADER = struct.Struct("<8s3Q")
"""Magic, version, offset and length of the worker in the image."""

_FIELDS = struct.Struct("<15Q")
BLOCK_BYTES = HEADER.size + _FIELDS.size

SECOND_WORD_BYTES = 2048
_MASK_64 = (1 << 64) - 1

# A full-period generator modulo 2^k needs multiplier % 4 == 1 and an odd increment. This is Knuth's MMIX one.
_RANDOM_MULTIPLIER = 6364136223846793005
_RANDOM_INCREMENT = 1442695040888963406
_NO_MIXING_SHIFT = 63

IDLE_CLASSES = 5
"""Classes of an idle guest's skew: the 31 pages of each vCPU that it uses."""
IDLE_PAUSE_TICKS = 1 << 22
"""Of the TSC between two visits of an idle guest: 1.6 ms at 2.6 GHz."""


class GuestKind(Enum):
    """What the guest does with its memory, once it has filled it."""

    SEQUENTIAL = "sequential"
    """Rounds through all pages in ascending order."""
    RANDOM = "random"
    """Rounds through all pages, each in another pseudo-random order."""
    ZIPF = "zipf"
    """All pages, by a zipf-like law with exponent 1 over a pseudo-random permutation, see `skew`."""
    IDLE = "idle"
    """A few pages, with pauses in which a vCPU spins: it has no interrupt that could end a halt."""

    @property
    def is_skewed(self) -> bool:
        """Some pages are visited more often than others."""
        return self in (GuestKind.ZIPF, GuestKind.IDLE)


class Machine(Enum):
    """How a machine type of QEMU splits RAM around the PCI hole; FLAT has no hole.

    QEMU 7.2: hw/i386/pc_piix.c ``pc_init1``, hw/i386/pc_q35.c ``pc_q35_init``.
    """

    PC = "pc"
    Q35 = "q35"
    FLAT = "flat"

    def low_ram_bytes(self, ram_bytes: int) -> int:
        """RAM below 4 GiB; what is beyond lies from 4 GiB on."""
        if self is Machine.PC:
            return ram_bytes if ram_bytes < 0xE000_0000 else 0xC000_0000
        if self is Machine.Q35:
            return ram_bytes if ram_bytes < 0xB000_0000 else 0x8000_0000
        return ram_bytes

    @classmethod
    def of_name(cls, name: str) -> Machine:
        """From a QEMU machine name: ``pc``, ``q35``, ``pc-i440fx-7.2``, ``pc-q35-7.2`` ... or ``flat``.

        Raises:
            ValueError: another machine, whose RAM layout is not known here.
        """
        if name == "q35" or name.startswith("pc-q35-"):
            return cls.Q35
        if name == "pc" or name.startswith("pc-i440fx-"):
            return cls.PC
        if name == "flat":
            return cls.FLAT
        raise ValueError(f"machine {name!r} is none of pc, q35, flat")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestParameters:
    """What the guest works on.

    Attributes:
        vcpus: that work, 1 to 64; others halt.
        low_bytes: length of the data region below 4 GiB.
        high_bytes: length of the data region from 4 GiB on.
        data_start: address of the low data region, at least 2 MiB.
        low_ram_bytes: RAM below 4 GiB, which tells where in the RAM file the high region lies; 0: right
            after the low data region.
        step_bytes: distance between data pages, a multiple of 4 KiB. 2 MiB touches each huge page once.
        kind: which pages are visited when.
        kvmclock: turn kvmclock on (where the CPU identification offers it) and read it.
        clock_interval_pages: data pages between two readings of kvmclock.

    Raises:
        ValueError: a value out of range, no page for some vCPU, or a region that leaves its RAM.
    """

    vcpus: int = 1
    low_bytes: int
    high_bytes: int = 0
    data_start: int = 16 << 20
    low_ram_bytes: int = 0
    step_bytes: int = PAGE_BYTES
    kind: GuestKind = GuestKind.SEQUENTIAL
    kvmclock: bool = True
    clock_interval_pages: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= VCPUS_MAX:
            raise ValueError(f"vcpus={self.vcpus} is outside 1..{VCPUS_MAX}")
        if self.step_bytes < PAGE_BYTES or self.step_bytes % PAGE_BYTES:
            raise ValueError(f"step_bytes={self.step_bytes} is not a positive multiple of {PAGE_BYTES}")
        for name in ("low_bytes", "high_bytes", "data_start", "low_ram_bytes"):
            value = getattr(self, name)
            if value < 0 or value % PAGE_BYTES:
                raise ValueError(f"{name}={value} is not a multiple of {PAGE_BYTES} from 0 on")
        if self.data_start < DATA_START_MIN:
            raise ValueError(f"data_start={self.data_start:#x} is below {DATA_START_MIN:#x}")
        low_end = self.data_start + self.low_bytes
        if self.low_bytes and 0 < self.low_ram_bytes < low_end:
            raise ValueError(f"low data ends at {low_end:#x}, past its RAM of {self.low_ram_bytes:#x} bytes")
        if self.high_bytes and max(low_end, self.low_ram_bytes) > FOUR_GIB:
            raise ValueError(f"a high region needs low RAM to end below 4 GiB, not at {low_end:#x}")
        if self.clock_interval_pages < 1:
            raise ValueError(f"clock_interval_pages={self.clock_interval_pages} is not positive")
        if self.mapped_gib > MAPPED_GIB_MAX:
            raise ValueError(f"data reaches past the {MAPPED_GIB_MAX} GiB that the guest can map")
        if not self.pages_per_vcpu:
            raise ValueError(f"{self.low_pages + self.high_pages} data pages are too few for {self.vcpus} vCPUs")

    @classmethod
    def for_ram(
        cls,
        ram_bytes: int,
        vcpus: int = 1,
        machine: Machine | str = Machine.PC,
        *,
        pages_max: int | None = None,
        data_start: int = 16 << 20,
        step_bytes: int = PAGE_BYTES,
        kind: GuestKind = GuestKind.SEQUENTIAL,
        kvmclock: bool = True,
        clock_interval_pages: int = 64,
    ) -> GuestParameters:
        """All RAM from `data_start` on as data, on both sides of the hole.

        Args:
            ram_bytes: of the VM, QEMU's ``-m``.
            vcpus: of the VM.
            kind: which pages are visited when.
            machine: how RAM is split, a `Machine` or a QEMU machine name.
            pages_max: at most so many data pages, half of them from 4 GiB on where there is RAM; None: all.

        Raises:
            ValueError: an unknown machine, or RAM too small for the vCPUs.
        """
        split = machine if isinstance(machine, Machine) else Machine.of_name(machine)
        low_ram_bytes = split.low_ram_bytes(ram_bytes)
        low_pages = max(0, low_ram_bytes - data_start) // step_bytes
        high_pages = (ram_bytes - low_ram_bytes) // step_bytes
        if pages_max is not None:
            high_pages = min(high_pages, max(pages_max // 2, pages_max - low_pages))
            low_pages = min(low_pages, pages_max - high_pages)
        return cls(
            vcpus=vcpus,
            low_bytes=low_pages * step_bytes,
            high_bytes=high_pages * step_bytes,
            data_start=data_start,
            low_ram_bytes=low_ram_bytes,
            step_bytes=step_bytes,
            kind=kind,
            kvmclock=kvmclock,
            clock_interval_pages=clock_interval_pages,
        )

    @property
    def low_pages(self) -> int:
        return self.low_bytes // self.step_bytes

    @property
    def high_pages(self) -> int:
        return self.high_bytes // self.step_bytes

    @property
    def pages_per_vcpu(self) -> int:
        """Data pages of each vCPU's slice; what does not divide evenly stays untouched at the end."""
        return (self.low_pages + self.high_pages) // self.vcpus

    @property
    def data_pages(self) -> int:
        """Data pages that some vCPU works on."""
        return self.pages_per_vcpu * self.vcpus

    @property
    def skew(self) -> Skew | None:
        """How often a vCPU visits which page of its slice; None: all alike, in rounds."""
        if not self.kind.is_skewed:
            return None
        classes = skew_classes(self.pages_per_vcpu)
        if self.kind is GuestKind.IDLE:
            classes = min(classes, IDLE_CLASSES)
        return Skew(self.pages_per_vcpu, classes, *self._order)

    @property
    def visits_per_pass(self) -> int:
        """Visits of a vCPU that count as one pass: its pages, or those of them that an idle guest uses."""
        return skew.used_pages if (skew := self.skew) is not None else self.pages_per_vcpu

    @property
    def mapped_gib(self) -> int:
        """GiB from address 0 that an identity map has to cover."""
        end = FOUR_GIB + self.high_bytes if self.high_bytes else self.data_start + self.low_bytes
        return -(-end // GIB)

    def slice_of(self, vcpu: int) -> range:
        """The data pages that a vCPU works on."""
        if not 0 <= vcpu < self.vcpus:
            raise IndexError(f"vCPU {vcpu} is outside 0..{self.vcpus - 1}")
        return range(vcpu * self.pages_per_vcpu, (vcpu + 1) * self.pages_per_vcpu)

    def address_of(self, page: int) -> Gpa:
        """Guest physical address of a data page."""
        if not 0 <= page < self.low_pages + self.high_pages:
            raise IndexError(f"data page {page} is outside 0..{self.low_pages + self.high_pages - 1}")
        if page < self.low_pages:
            return Gpa(self.data_start + page * self.step_bytes)
        return Gpa(FOUR_GIB + (page - self.low_pages) * self.step_bytes)

    def file_offset_of(self, page: int) -> int:
        """Where a data page lies in the VM's RAM file: RAM from 4 GiB on follows the RAM below it."""
        address = self.address_of(page)
        if page < self.low_pages:
            return address
        return (self.low_ram_bytes or self.data_start + self.low_bytes) + address - FOUR_GIB

    def round_order(self, vcpu: int, round_number: int) -> Iterator[int]:
        """The data pages in the order in which the vCPU visits them in a round; round 0 fills, others have no skew."""
        pages = self.slice_of(vcpu)
        multiplier, increment, mask, shift = self._order
        increment = (1 + round_number * increment) & _MASK_64
        state = mask
        for _ in range(mask + 1):
            state = (state * multiplier + increment) & mask
            index = state ^ (state >> shift)
            if index < len(pages):
                yield pages[index]

    def pack(self, *, worker_offset: int = 0, worker_bytes: int = 0) -> bytes:
        """The parameter block, `BLOCK_BYTES`, as the worker reads it at `addresses.PARAMETERS`."""
        skew = self.skew
        return HEADER.pack(BLOCK_MAGIC, BLOCK_VERSION, worker_offset, worker_bytes) + _FIELDS.pack(
            self.vcpus,
            self.data_start,
            self.low_pages,
            FOUR_GIB,
            self.pages_per_vcpu,
            self.step_bytes,
            *self._order,
            self.clock_interval_pages if self.kvmclock else 0,
            self.mapped_gib,
            skew.classes if skew is not None else 0,
            self.visits_per_pass,
            IDLE_PAUSE_TICKS if self.kind is GuestKind.IDLE else 0,
        )

    def apply(self, image: bytes) -> bytes:
        """The firmware image with these parameters in it.

        Raises:
            ValueError: the image is not the guest's, or of another version.
        """
        worker_offset, worker_bytes = worker_place(image)
        block = self.pack(worker_offset=worker_offset, worker_bytes=worker_bytes)
        return image[:BLOCK_IN_IMAGE] + block + image[BLOCK_IN_IMAGE + len(block) :]

    def with_vcpus(self, vcpus: int) -> GuestParameters:
        """The same data shared by another number of vCPUs."""
        return replace(self, vcpus=vcpus)

    @property
    def _order(self) -> tuple[int, int, int, int]:
        bits = (self.pages_per_vcpu - 1).bit_length()
        mask = (1 << bits) - 1
        if self.kind is GuestKind.SEQUENTIAL:
            return 1, 0, mask, _NO_MIXING_SHIFT
        return _RANDOM_MULTIPLIER, _RANDOM_INCREMENT, mask, max(1, bits // 2)


def first_word(page: int) -> int:
    """What a data page holds after the fill; never 0."""
    return (page + 1) * GOLDEN & _MASK_64


def second_word_offset(vcpu: int) -> int:
    """Where in its pages a vCPU keeps the word a second time."""
    return SECOND_WORD_BYTES + 8 * vcpu


def worker_place(image: bytes) -> tuple[int, int]:
    """Offset and length of the worker in the image.

    Raises:
        ValueError: the image is not the guest's, or of another version.
    """
    if len(image) != IMAGE_BYTES:
        raise ValueError(f"a guest image has {IMAGE_BYTES} bytes, not {len(image)}")
    magic, version, offset, size_bytes = HEADER.unpack_from(image, BLOCK_IN_IMAGE)
    if magic != BLOCK_MAGIC:
        raise ValueError(f"no parameter block at {BLOCK_IN_IMAGE:#x} of the image")
    if version != BLOCK_VERSION:
        raise ValueError(f"parameter block version {version}, this program knows {BLOCK_VERSION}")
    if not 0 < size_bytes <= PAGE_BYTES or offset + size_bytes > BLOCK_IN_IMAGE:
        raise ValueError(f"the worker at {offset:#x}, {size_bytes} bytes, does not fit its page")
    return offset, size_bytes
