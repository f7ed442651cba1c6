"""What was found out about a host: everything that the choice of a fault source depends on. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from farfault_shim.annotate.annotator import AddressKind
from farfault_shim.annotate.discover import Discovery
from farfault_shim.kvm.nowait import NowaitInterface


class Finding(NamedTuple):
    """One thing that was looked for.

    Attributes:
        ok: it is there and can be used.
        detail: what was seen.
        remedy: what makes it usable; empty where it is, or where nothing helps.
    """

    ok: bool
    detail: str
    remedy: str = ""


class KvmAccess(Enum):
    """Whether this process can use KVM."""

    USABLE = "usable"
    FORBIDDEN = "forbidden"
    ABSENT = "absent"


class Paging(Enum):
    """How the host translates guest physical addresses."""

    TWO_DIMENSIONAL = "EPT/NPT"
    SHADOW = "shadow paging"
    UNKNOWN = "unknown"

    @property
    def address_kind(self) -> AddressKind:
        """Of the tracepoint that names the faulting address on such a host."""
        return AddressKind.GPA if self is Paging.TWO_DIMENSIONAL else AddressKind.GVA


class KernelTrial(NamedTuple):
    """What became of a configured kernel interface on a scratch VM."""

    interface: NowaitInterface
    result: Finding


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A host, as far as fault sources are concerned.

    Attributes:
        kvm: access to it.
        kvm_finding: the same in words.
        paging: of the guests.
        userfaultfd: may be made, and has the features that blocking needs.
        sigbus: UFFD_FEATURE_SIGBUS, which stock NOWAIT needs.
        annotators: by the kind of address.
        stock_exit: whether a scratch VM's access to an absent page under a SIGBUS userfaultfd ended KVM_RUN
            with -EFAULT and the annotator named the right page; None: not tried.
        kernel_trials: of the configured interfaces, in the order of preference.
    """

    kvm: KvmAccess
    kvm_finding: Finding
    paging: Paging
    userfaultfd: Finding
    sigbus: Finding
    annotators: dict[AddressKind, Discovery]
    stock_exit: Finding | None = None
    kernel_trials: tuple[KernelTrial, ...] = ()

    @property
    def annotator(self) -> Discovery:
        """Of the tracepoint that fits this host's paging."""
        return self.annotators[self.paging.address_kind]
