"""How a simulated KVM misbehaves: probabilities, all 0 by default. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultProfile:
    """Each field is a probability from 0 to 1. With all at 0 there are plain annotated exits only.

    How the exit for an absent page looks; tried in this order:

    Attributes:
        emulated: KVM_EXIT_MMIO with an address in RAM: the access was emulated.
        stale: -EFAULT with the annotation of an earlier fault, which was swallowed.
        bare: -EFAULT, garbage in the union, exit_reason untouched.
        lost_sample: of a bare exit: the tracepoint has no address for it either.

    What else comes, at each memory access of the guest:

    Attributes:
        lost_race: annotated -EFAULT for the accessed page although it is present.
        foreign: annotated -EFAULT that is none of ours: private flag, no slot, size 0, or past its slot.
        poisoned: -EHWPOISON for the accessed page.
        device: KVM_EXIT_MMIO outside of RAM.

    And at each KVM_RUN:

    Attributes:
        interrupted: -EINTR.
        again: -EAGAIN.
        old_slots: the first access after a change of the memslots still sees the old ones.

    Raises:
        ValueError: a field is no probability.
    """

    emulated: float = 0.0
    stale: float = 0.0
    bare: float = 0.0
    lost_sample: float = 0.0
    lost_race: float = 0.0
    foreign: float = 0.0
    poisoned: float = 0.0
    device: float = 0.0
    interrupted: float = 0.0
    again: float = 0.0
    old_slots: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} is no probability")

    @property
    def disturbs_accesses(self) -> bool:
        """Accesses to present pages may exit."""
        return bool(self.lost_race or self.foreign or self.poisoned or self.device)


PLAIN = FaultProfile()
"""Annotated exits for absent pages, nothing else."""

ROUGH = FaultProfile(
    emulated=0.05,
    stale=0.05,
    bare=0.5,
    lost_sample=0.02,
    lost_race=0.001,
    interrupted=0.01,
    again=0.01,
    old_slots=0.5,
)
"""Everything that a correct receiver and VMM must survive together."""

PROFILES = {"plain": PLAIN, "rough": ROUGH}
"""By the names that commands take."""
