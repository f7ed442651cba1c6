"""What goes wrong in one migration, and when: everything from one seed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from farfault_client.demo.scene import SceneConfig
from farfault_client.demo.vms import QEMU, VmmKind
from farfault_shim.annotate.discover import discover

MIB = 1 << 20
PARTITION_S = 10.0


class Target(Enum):
    """What a fault hits."""

    NETWORK = "network"
    KILL = "kill"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class ChaosFault:
    """One thing that goes wrong.

    Attributes:
        target: what it hits.
        what: a line for the network's proxy, or the names of parts, separated by ``+``.
        step: of the receiver's journal; the fault's moment is counted from when it is seen first.
        after_s: seconds after that.
        for_s: a pause's length, or the time until a killed part is started again.
    """

    target: Target
    what: str
    step: str
    after_s: float
    for_s: float = 0.0

    @property
    def title(self) -> str:
        """For the table: what happens, without numbers, and where."""
        name = self.what.split(" ")[0]
        return f"{name if self.target is Target.NETWORK else f'{self.target.value} {name}'}"

    @property
    def place(self) -> str:
        """For the table: in which part of a move."""
        return "post-copy" if self.step == "running" else "switchover"

    def __str__(self) -> str:
        return f"{self.title} ({self.what}, {self.step} + {self.after_s:.3f} s, {self.for_s:.2f} s)"


@dataclass(frozen=True, slots=True)
class Plan:
    """One migration."""

    seed: int
    config: SceneConfig
    rtt_ms: float
    faults: tuple[ChaosFault, ...]

    def __str__(self) -> str:
        config = self.config
        carrier = "grpc" if "--no-express" in config.receive_flags else "express"
        faults = "; ".join(map(str, self.faults))
        return (
            f"{config.kind.value}, {config.ram_bytes >> 20} MiB, {config.vcpus} vCPUs, {config.fault_source}, "
            f"{carrier}, {self.rtt_ms:.1f} ms: {faults}"
        )


NETWORK_FAULTS: Sequence[str] = ("reset", "half-open", "partition", "corrupt", "truncate", "duplicate", "stall")
KILLS: Sequence[str] = ("serve", "receive", "serve+receive", "migrate", "bulk", "background")
VMM_KILLS: Sequence[str] = ("source", "destination")
PAUSES: Sequence[str] = ("serve", "receive", "bulk", "background")
SWITCHOVER_STEPS: Sequence[str] = ("opened", "suspending", "handing over")


def make_plan(seed: int) -> Plan:
    """The migration of a seed; the same on every machine that has the same VMMs."""
    rng = random.Random(seed)
    config = _config(rng)
    faults = tuple(_fault(rng) for _ in range(rng.choice((1, 1, 2))))
    in_switchover = any(fault.step != "running" for fault in faults)
    rtt_ms = rng.uniform(10, 100) if in_switchover else rng.choice((0.0, rng.uniform(0, 5)))
    return Plan(seed, config, rtt_ms, faults)


def kinds() -> list[VmmKind]:
    """VMMs that this machine has; the simulated KVM where it has none."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return [VmmKind.SIMULATED]
    return [VmmKind.QEMU, VmmKind.REFERENCE] if shutil.which(QEMU) else [VmmKind.REFERENCE]


def _config(rng: random.Random) -> SceneConfig:
    kind = rng.choice(kinds())
    source = rng.choice(("stock-nowait", "blocking"))
    if kind is VmmKind.SIMULATED:
        source = "simulated"
    elif all(found.annotator is None for found in discover().values()):
        source = "blocking"
    ram_bytes = 24 * MIB if kind is VmmKind.SIMULATED else rng.choice((32, 48, 64)) * MIB
    flags = ["--bandwidth", str(rng.randrange(4, 24) * MIB)]
    flags += ["--no-express"] if rng.random() < 0.3 else []
    return SceneConfig(kind, ram_bytes, rng.choice((1, 2)), fault_source=source, receive_flags=flags)


def _fault(rng: random.Random) -> ChaosFault:
    if rng.random() < 0.35:
        step = rng.choice(SWITCHOVER_STEPS)
        after_s = rng.uniform(0, 1.5 if step == "opened" else 0.2)  # `farfault migrate` has to start first
    else:
        step, after_s = "running", rng.uniform(0, 2)
    draw = rng.random()
    if draw < 0.45:
        what = rng.choice(NETWORK_FAULTS)
        what += {"partition": f" {PARTITION_S:g}", "stall": f" {rng.uniform(0.1, 2):.2f}"}.get(what, "")
        return ChaosFault(Target.NETWORK, what, step, after_s)
    if draw < 0.85:
        what = rng.choice(KILLS if step == "running" or rng.random() < 0.6 else VMM_KILLS)
        return ChaosFault(Target.KILL, what, step, after_s, rng.uniform(0, 2))
    return ChaosFault(Target.PAUSE, rng.choice(PAUSES), step, after_s, rng.uniform(0.2, 3))
