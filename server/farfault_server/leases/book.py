"""The record of leases and of the VM behind them. No I/O and no clock: each method returns the next record.

A caller saves the returned record before it acts on it::

    next_book, granted = book.open(...)
    store.save(next_book)
    book = next_book            # only now answer the client
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from farfault.v1 import pages_pb2 as pb

from farfault_server.leases.phases import GONE, STOPPED, TRANSITIONS, UNCONTROLLED_TRANSITIONS, Phase, Step
from farfault_server.leases.refusals import Code, RefusedError
from farfault_server.leases.tokens import matches, new_generation, new_lease_id, new_token, token_hash

PROTOCOL_VERSION: Final = 1
CLIENT_NAME_BYTES_MAX: Final = 128
RELEASED_MAX: Final = 64
"""Leases that were given back and are remembered, so that a repeated Release succeeds."""
MIGRATION_IDLE_S: Final = 60.0
CLONE_IDLE_S: Final = 60.0

MIGRATION: Final = int(pb.LEASE_KIND_MIGRATION)
CLONE: Final = int(pb.LEASE_KIND_CLONE)


class Lease(NamedTuple):
    """One lease; `token_hash` is the SHA-256 of its token."""

    lease_id: str
    kind: int
    token_hash: str
    client_name: str


class OpenTerms(NamedTuple):
    """What a client asks of Open; the fields of OpenRequest that the book looks at."""

    protocol_version: int
    kind: int
    client_name: str = ""
    resume_lease_id: str = ""
    resume_token: str = ""
    expected_generation: int = 0


class Granted(NamedTuple):
    """What Open grants; `token` is shown to the client and kept nowhere."""

    lease: Lease
    token: str


@dataclass(frozen=True, slots=True)
class LeaseBook:
    """An immutable record.

    Attributes:
        is_controlled: the server controls the VMM; otherwise the memory is frozen from the start.
        phase: of the VM.
        generation: of the memory.
        leases: by lease id, oldest first.
        released: token hashes by lease id, oldest first, at most `RELEASED_MAX`.
        memory_identity: of the regions when the memory was frozen; None: not frozen.
    """

    is_controlled: bool
    phase: Phase
    generation: int
    leases: Mapping[str, Lease] = field(default_factory=dict)
    released: Mapping[str, str] = field(default_factory=dict)
    memory_identity: list[list[int]] | None = None

    @classmethod
    def fresh(cls, *, is_controlled: bool, memory_identity: list[list[int]] | None) -> LeaseBook:
        """The record of a server that starts for the first time."""
        phase = Phase.RUNNING if is_controlled else Phase.FROZEN
        return cls(is_controlled, phase, new_generation(), memory_identity=memory_identity)

    # ---- leases ----------------------------------------------------------------------------------

    def open(self, terms: OpenTerms, *, leases_max: int, idle_s: Callable[[str], float]) -> tuple[LeaseBook, Granted]:
        """Takes a lease, or takes one up again.

        Args:
            terms: what the client asks.
            leases_max: leases of both kinds.
            idle_s: since when the client of a lease has not been seen.

        Raises:
            RefusedError: with the status codes that pages.proto names.
        """
        if terms.protocol_version != PROTOCOL_VERSION:
            raise RefusedError(
                Code.FAILED_PRECONDITION,
                f"the client speaks protocol version {terms.protocol_version}, the server {PROTOCOL_VERSION}",
                "run the same farfault version on both hosts",
            )
        if len(terms.client_name.encode()) > CLIENT_NAME_BYTES_MAX:
            raise RefusedError(Code.INVALID_ARGUMENT, f"client_name is longer than {CLIENT_NAME_BYTES_MAX} bytes")
        if terms.resume_lease_id:
            lease = self.authorize(terms.resume_lease_id, terms.resume_token)
            self._check_generation(terms.expected_generation)
            return self, Granted(lease, terms.resume_token)
        if terms.kind not in (MIGRATION, CLONE):
            raise RefusedError(Code.INVALID_ARGUMENT, "kind must be LEASE_KIND_MIGRATION or LEASE_KIND_CLONE")
        self._check_generation(terms.expected_generation)
        book = self._admit_migration(idle_s) if terms.kind == MIGRATION else self
        book = book._make_room(leases_max, idle_s)
        token = new_token()
        lease = Lease(new_lease_id(), terms.kind, token_hash(token), terms.client_name)
        return replace(book, leases={**book.leases, lease.lease_id: lease}), Granted(lease, token)

    def authorize(self, lease_id: str | None, token: str | None) -> Lease:
        """The lease that a call belongs to.

        Raises:
            RefusedError: UNAUTHENTICATED without credentials, PERMISSION_DENIED with wrong ones.
        """
        if not lease_id or not token:
            raise RefusedError(
                Code.UNAUTHENTICATED,
                "the call carries no lease",
                "send the metadata farfault-lease and authorization: Bearer TOKEN that Open returned",
            )
        lease = self.leases.get(lease_id)
        if lease is not None and matches(token, lease.token_hash):
            return lease
        if lease is None and lease_id in self.released and matches(token, self.released[lease_id]):
            raise RefusedError(Code.FAILED_PRECONDITION, "the lease was given back", "open a new lease")
        raise RefusedError(
            Code.PERMISSION_DENIED,
            "the lease is unknown or its token is wrong",
            "a server without --state forgets its leases when it restarts; open a new lease",
        )

    def release(self, lease_id: str | None, token: str | None) -> tuple[LeaseBook, Lease | None]:
        """Gives a lease back. The VM of a migration lease must run, or be resumed first.

        Returns:
            The next record, and the lease; None: it was given back before.
        """
        if lease_id and token and lease_id in self.released and matches(token, self.released[lease_id]):
            return self, None
        lease = self.authorize(lease_id, token)
        if lease.kind == MIGRATION and self.phase is Phase.HANDED_OVER:
            raise RefusedError(
                Code.FAILED_PRECONDITION,
                "the VM was handed over: its lease cannot be given back",
                "the destination owns the VM; it ends the lease with Complete",
            )
        return self._without(lease), lease

    def _without(self, lease: Lease) -> LeaseBook:
        leases = {lease_id: other for lease_id, other in self.leases.items() if lease_id != lease.lease_id}
        released = dict([*self.released.items(), (lease.lease_id, lease.token_hash)][-RELEASED_MAX:])
        return replace(self, leases=leases, released=released)

    def _check_generation(self, expected: int) -> None:
        if expected not in (0, self.generation):
            raise RefusedError(
                Code.FAILED_PRECONDITION,
                f"the memory is of generation {self.generation}, not {expected}: the source VM may have run",
                "pages of the two must not be mixed; start the move again",
            )

    def _admit_migration(self, idle_s: Callable[[str], float]) -> LeaseBook:
        if self.phase in GONE:
            raise RefusedError(
                Code.FAILED_PRECONDITION if self.migration_lease is None else Code.ALREADY_EXISTS,
                f"the VM was {self.phase.value} to a destination",
                "if this is another VM, or that one has come back, end the server, remove its --state folder and start "
                "it again; a copy for reading can be had with a clone lease",
            )
        holder = self.migration_lease
        if holder is None:
            return self
        if self.is_controlled and self.phase is Phase.RUNNING and idle_s(holder.lease_id) >= MIGRATION_IDLE_S:
            return self._without(holder)
        raise RefusedError(
            Code.ALREADY_EXISTS,
            f"another destination holds the migration lease: {holder.client_name or 'unnamed'}",
            "end that move first (farfault abort there), or wait until its client is gone for "
            f"{MIGRATION_IDLE_S:g} s; a VM that it suspended stays its own until the server restarts with --abandon",
        )

    def _make_room(self, leases_max: int, idle_s: Callable[[str], float]) -> LeaseBook:
        if len(self.leases) < leases_max:
            return self
        for lease in self.leases.values():
            if lease.kind == CLONE and idle_s(lease.lease_id) >= CLONE_IDLE_S:
                return self._without(lease)
        raise RefusedError(
            Code.RESOURCE_EXHAUSTED,
            f"all {leases_max} leases are taken",
            "release one, or start the server with a larger --leases-max",
        )

    @property
    def migration_lease(self) -> Lease | None:
        return next((lease for lease in self.leases.values() if lease.kind == MIGRATION), None)

    # ---- the VM ----------------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        """The memory does not change."""
        return self.phase in STOPPED

    def step(self, step: Step, memory_identity: list[list[int]] | None = None) -> LeaseBook:
        """What happened, or is about to happen, to the VM. Each start and stop makes a new generation.

        Args:
            step: what happens.
            memory_identity: with STATE_SENT: of the frozen regions.

        Raises:
            RefusedError: FAILED_PRECONDITION, it cannot happen in this phase.
        """
        table = TRANSITIONS if self.is_controlled else UNCONTROLLED_TRANSITIONS
        phase = table.get((self.phase, step))
        if phase is None:
            raise RefusedError(
                Code.FAILED_PRECONDITION, f"cannot {step.value}: it is {self.phase.value}", _remedy(self.phase, step)
            )
        book = self
        if step is Step.FOUND_RUNNING or (step in (Step.SUSPEND, Step.RESUME) and phase is not self.phase):
            book = replace(book, generation=new_generation(), memory_identity=None)
        if step is Step.STATE_SENT:
            book = replace(book, memory_identity=memory_identity)
        return book if phase is book.phase else replace(book, phase=phase)

    def check_owner(self, lease: Lease) -> None:
        """Only a migration lease may do anything to the VM."""
        if lease.kind != MIGRATION:
            raise RefusedError(
                Code.PERMISSION_DENIED, "a clone lease only reads", "open a lease of kind LEASE_KIND_MIGRATION"
            )

    def check_hand_over(self, generation: int) -> None:
        """The destination must hold the device state of this very memory."""
        if generation != self.generation:
            raise RefusedError(
                Code.FAILED_PRECONDITION,
                f"hand-over of generation {generation}, but the memory is of generation {self.generation}",
                "the device state is stale; suspend again",
            )

    def with_memory(self, memory_identity: list[list[int]]) -> LeaseBook:
        """After a restart: the same memory keeps its generation, other memory gets a new one."""
        if not self.is_stopped or memory_identity == self.memory_identity:
            return self
        return replace(self, generation=new_generation(), memory_identity=memory_identity)


def _remedy(phase: Phase, step: Step) -> str:
    if phase in GONE:
        return "the destination owns the VM"
    if step is Step.SUSPEND and phase is Phase.FROZEN:
        return "its device state was sent already; Resume first, then Suspend again"
    if step in (Step.HAND_OVER, Step.COMPLETE):
        return "the order is Suspend, HandOver, Complete"
    return "another call changes the VM now; try again"
