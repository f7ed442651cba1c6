"""What a VM is, as its VMM tells it, and whether two of them fit together. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from farfault.v1 import pages_pb2 as pb

IGNORE_SHARED = "x-ignore-shared"
"""The migration capability that leaves shared RAM out of the device state (QEMU 4.0, commit fbd162e629aa)."""

SOURCE_STATUSES = frozenset({"running", "paused"})
DESTINATION_STATUS = "inmigrate"

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """One memory backend of a VM.

    Attributes:
        id: its name, which is also that of the RAM block in the device state.
        size_bytes: its size.
        shared: its pages are those of a file that others may map too (QEMU: ``share=on``).
    """

    id: str
    size_bytes: int
    shared: bool

    def __str__(self) -> str:
        return f"{self.id} ({self.size_bytes / MIB:g} MiB)"


@dataclass(frozen=True, slots=True)
class VmDescription:
    """What must be alike on both sides, and what must hold for a move.

    Attributes:
        vmm: name and version, ``qemu 7.2.22``.
        machine_type: the versioned name, never an alias: ``pc-i440fx-7.2``, not ``pc``.
        vcpus: vCPUs that are plugged.
        status: run state as in QMP ``query-status``.
        memory: backends, in any order: RAM is matched by id, and QEMU lists them in the order of a hash table.
        capabilities: migration capabilities that are on.
        accelerator: ``kvm`` or ``tcg``.
    """

    vmm: str
    machine_type: str
    vcpus: int
    status: str
    memory: tuple[MemoryBackend, ...]
    capabilities: tuple[str, ...] = ()
    accelerator: str = ""

    @classmethod
    def from_proto(cls, message: pb.VmDescription) -> VmDescription:
        """From the message of the wire contract."""
        return cls(
            vmm=message.vmm,
            machine_type=message.machine_type,
            vcpus=message.vcpus,
            status=message.status,
            memory=tuple(MemoryBackend(backend.id, backend.size_bytes, backend.shared) for backend in message.memory),
            capabilities=tuple(message.capabilities),
            accelerator=message.accelerator,
        )

    def to_proto(self) -> pb.VmDescription:
        """The message of the wire contract."""
        return pb.VmDescription(
            vmm=self.vmm,
            machine_type=self.machine_type,
            vcpus=self.vcpus,
            status=self.status,
            memory=[
                pb.MemoryBackend(id=backend.id, size_bytes=backend.size_bytes, shared=backend.shared)
                for backend in self.memory
            ],
            capabilities=self.capabilities,
            accelerator=self.accelerator,
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One question of the preflight and its answer.

    Attributes:
        name: what was asked, a few words.
        passed: the move may go on as far as this check is concerned.
        detail: what was found on the two sides; of a check that passed it may be a warning.
        remedy: what to do; empty where it passed.
    """

    name: str
    passed: bool
    detail: str
    remedy: str = ""


def compare(source: VmDescription, destination: VmDescription) -> list[Check]:
    """Whether the VM of `source` can go on in the VMM of `destination`; one check for each thing that matters.

    Describe both after ``prepare_source`` and ``prepare_destination``, which turn the capabilities on.
    """
    return [
        _vmm(source, destination),
        _machine(source, destination),
        _vcpus(source, destination),
        _accelerator(source, destination),
        _memory(source, destination),
        _shared("source memory is shared", source),
        _shared("destination memory is shared", destination),
        _ignore_shared("source leaves shared memory out", source),
        _ignore_shared("destination leaves shared memory out", destination),
        _source_status(source),
        _destination_status(destination),
    ]


def _check(name: str, passed: bool, detail: str, remedy: str) -> Check:
    return Check(name, passed, detail, "" if passed else remedy)


def _vmm(source: VmDescription, destination: VmDescription) -> Check:
    source_name, source_family = _family(source.vmm)
    name, family = _family(destination.vmm)
    detail = f"source {source.vmm}, destination {destination.vmm}"
    fits = name == source_name and family >= source_family
    if fits and destination.vmm != source.vmm:
        detail += " (warning: the versions differ)"
    # A versioned machine type of QEMU is promised to move to a later version, not to an earlier one.
    return _check("same VMM", fits, detail, f"start the destination with {source.vmm}, or a later version of it")


def _family(vmm: str) -> tuple[str, tuple[int, ...]]:
    """Name, and the numbers of major.minor: ``qemu 7.2.22`` → ``("qemu", (7, 2))``."""
    name, _, version = vmm.partition(" ")
    return name, tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())


def _machine(source: VmDescription, destination: VmDescription) -> Check:
    return _check(
        "same machine type",
        source.machine_type == destination.machine_type,
        f"source {source.machine_type}, destination {destination.machine_type}",
        f"start the destination with -machine {source.machine_type}",
    )


def _vcpus(source: VmDescription, destination: VmDescription) -> Check:
    return _check(
        "same number of vCPUs",
        source.vcpus == destination.vcpus,
        f"source {source.vcpus}, destination {destination.vcpus}",
        f"start the destination with -smp {source.vcpus}",
    )


def _accelerator(source: VmDescription, destination: VmDescription) -> Check:
    return _check(
        "same accelerator",
        source.accelerator == destination.accelerator,
        f"source {source.accelerator}, destination {destination.accelerator}",
        f"start the destination with -accel {source.accelerator}",
    )


def _memory(source: VmDescription, destination: VmDescription) -> Check:
    problem = next(_memory_problems(source.memory, destination.memory), "")
    backends = ", ".join(map(str, source.memory)) or "none"
    options = " ".join(
        f"-object memory-backend-file,id={backend.id},size={backend.size_bytes},share=on,..."
        for backend in source.memory
    )
    return _check(
        "same memory backends",
        not problem,
        problem or f"both sides: {backends}",
        f"start the destination with {options}"
        if source.memory
        else "start both VMMs with -object memory-backend-file,id=ram,share=on,... and -machine ...,memory-backend=ram",
    )


def _memory_problems(source: tuple[MemoryBackend, ...], destination: tuple[MemoryBackend, ...]) -> Iterator[str]:
    if not source:
        yield "the source has no memory backend, so its RAM is in no file"
    sizes = {backend.id: backend.size_bytes for backend in source}
    their_sizes = {backend.id: backend.size_bytes for backend in destination}
    if sizes.keys() != their_sizes.keys():
        yield f"source has {', '.join(sorted(sizes))}; destination has {', '.join(sorted(their_sizes)) or 'none'}"
    for name in sorted(sizes.keys() & their_sizes.keys()):
        if sizes[name] != their_sizes[name]:
            yield f"{name} has {sizes[name]} bytes at the source, {their_sizes[name]} at the destination"


def _shared(name: str, side: VmDescription) -> Check:
    private = ", ".join(backend.id for backend in side.memory if not backend.shared)
    return _check(
        name,
        not private,
        f"private: {private}" if private else "every backend is shared",
        f"start that VMM with share=on in -object memory-backend-file,... or memory-backend-memfd,... of {private}",
    )


def _ignore_shared(name: str, side: VmDescription) -> Check:
    on = IGNORE_SHARED in side.capabilities
    return _check(
        name,
        on,
        f"{IGNORE_SHARED} is {'on' if on else 'off'}",
        f"turn on the migration capability {IGNORE_SHARED} (QEMU 4.0 or later; in the monitor: "
        f"migrate_set_capability {IGNORE_SHARED} on)",
    )


def _source_status(source: VmDescription) -> Check:
    return _check(
        "source can be stopped",
        source.status in SOURCE_STATUSES,
        f"status {source.status}",
        "the VM must be running or paused: start it (QMP: cont) and look at its log if it stops again",
    )


def _destination_status(destination: VmDescription) -> Check:
    return _check(
        "destination waits for a VM",
        destination.status == DESTINATION_STATUS,
        f"status {destination.status}",
        "start the destination VMM anew with -incoming defer; one that was started without it has its own RAM content",
    )
