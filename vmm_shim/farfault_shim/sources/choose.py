"""Which fault source a VM gets. A pure function of what was found out about the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from farfault_cli.errors import PreflightError

from farfault_shim.annotate.annotator import Annotator
from farfault_shim.attach.wire import FaultSource
from farfault_shim.kvm.nowait import NowaitInterface
from farfault_shim.sources.facts import Finding, HostFacts, KvmAccess, Paging
from farfault_shim.sources.kernel_interface import describe_interface

AUTO: Final = "auto"
ORDER: Final = (FaultSource.KERNEL_NOWAIT, FaultSource.STOCK_NOWAIT, FaultSource.SIMULATED, FaultSource.BLOCKING)
"""Best first. The simulated KVM stands in where there is no /dev/kvm, and is no candidate for a real VMM."""
REAL_SOURCES: Final = (FaultSource.KERNEL_NOWAIT, FaultSource.STOCK_NOWAIT, FaultSource.BLOCKING)


class FaultSourceUnavailableError(PreflightError):
    """The fault source that the user insists on cannot work here, or none can."""


class Verdict(NamedTuple):
    """A candidate and what became of it.

    Attributes:
        source: the candidate.
        works: it could be used.
        reason: why it is chosen, or why not.
        remedy: what would make it usable.
    """

    source: FaultSource
    works: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The fault source that will be used, and why no other.

    Attributes:
        source: the chosen one; None: none works.
        verdicts: of all candidates, best first.
        annotator: for stock NOWAIT; None otherwise.
        kernel_interface: for kernel NOWAIT; None otherwise.
    """

    source: FaultSource | None
    verdicts: tuple[Verdict, ...]
    annotator: Annotator | None = None
    kernel_interface: NowaitInterface | None = None

    def verdict_of(self, source: FaultSource) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.source is source)


def choose(facts: HostFacts, wish: str = AUTO, candidates: tuple[FaultSource, ...] = ORDER) -> Choice:
    """Chooses a fault source.

    Args:
        facts: of the host.
        wish: ``auto``, or the value of a `FaultSource` that the user insists on.
        candidates: that the VMM can be given, best first.

    Returns:
        With ``auto`` the best that works and is safe without being asked for, or none. With an explicit wish,
        that one.

    Raises:
        FaultSourceUnavailableError: the wish cannot be fulfilled; names the reason and the remedy.
    """
    judged = {source: _JUDGES[source](facts) for source in candidates}
    if wish == AUTO:
        chosen = next(
            (source for source in candidates if judged[source].works and not _only_on_wish(source, facts)), None
        )
    else:
        chosen = FaultSource(wish)
        if chosen not in judged:
            raise FaultSourceUnavailableError(f"fault source {wish} is not for a real VMM")
        if not judged[chosen].works:
            raise FaultSourceUnavailableError(
                f"fault source {wish} cannot be used: {judged[chosen].reason}", judged[chosen].remedy
            )
    verdicts = tuple(_explain(judged[source], chosen, facts) for source in candidates)
    return Choice(
        chosen,
        verdicts,
        annotator=facts.annotator.annotator if chosen is FaultSource.STOCK_NOWAIT else None,
        kernel_interface=_working_interface(facts) if chosen is FaultSource.KERNEL_NOWAIT else None,
    )


def _only_on_wish(source: FaultSource, facts: HostFacts) -> bool:
    """Works, but not safe for every guest: an absent page table becomes a #PF inside the guest."""
    return source is FaultSource.STOCK_NOWAIT and facts.paging is not Paging.TWO_DIMENSIONAL


def _explain(verdict: Verdict, chosen: FaultSource | None, facts: HostFacts) -> Verdict:
    if not verdict.works or verdict.source is chosen:
        return verdict
    if _only_on_wish(verdict.source, facts):
        return verdict._replace(
            reason="works, but this host uses shadow paging: a page table that is absent becomes a page fault "
            "inside the guest",
            remedy="--fault-source stock-nowait, only for guests whose page tables are installed before they start",
        )
    return verdict._replace(reason="works; a better one is used" if chosen else verdict.reason)


def _judge_kernel(facts: HostFacts) -> Verdict:
    source = FaultSource.KERNEL_NOWAIT
    if not facts.kernel_trials:
        return Verdict(
            source,
            False,
            "no interface is configured: no released kernel has one",
            "on a patched kernel: --kernel-interface SERIES:flag=N:cap=N",
        )
    working = _working_interface(facts)
    if working is not None:
        blocked = _first_problem(facts.userfaultfd)
        if blocked is not None:
            return Verdict(source, False, blocked.detail, blocked.remedy)
        return Verdict(source, True, f"{describe_interface(working)} works on a scratch VM")
    trial = facts.kernel_trials[0]
    return Verdict(source, False, f"{trial.interface.series.value}: {trial.result.detail}", trial.result.remedy)


def _judge_stock(facts: HostFacts) -> Verdict:
    source = FaultSource.STOCK_NOWAIT
    annotator = facts.annotator
    found = Finding(annotator.annotator is not None, annotator.problem, annotator.remedy)
    problem = _first_problem(facts.kvm_finding, facts.userfaultfd, facts.sigbus, found, facts.stock_exit)
    if problem is not None:
        return Verdict(source, False, problem.detail, problem.remedy)
    tried = "" if facts.stock_exit is None else f"; scratch VM: {facts.stock_exit.detail}"
    return Verdict(source, True, f"SIGBUS userfaultfd, annotated by {annotator.tracepoint}{tried}")


def _judge_blocking(facts: HostFacts) -> Verdict:
    problem = _first_problem(facts.userfaultfd)
    if problem is not None:
        return Verdict(FaultSource.BLOCKING, False, problem.detail, problem.remedy)
    return Verdict(FaultSource.BLOCKING, True, "userfaultfd; a vCPU sleeps in KVM_RUN until its page is there")


def _judge_simulated(facts: HostFacts) -> Verdict:
    if facts.kvm is KvmAccess.ABSENT:
        return Verdict(FaultSource.SIMULATED, True, f"{facts.kvm_finding.detail}; for demonstrations and tests only")
    return Verdict(FaultSource.SIMULATED, False, "not needed: /dev/kvm is there")


def _working_interface(facts: HostFacts) -> NowaitInterface | None:
    return next((trial.interface for trial in facts.kernel_trials if trial.result.ok), None)


def _first_problem(*findings: Finding | None) -> Finding | None:
    return next((finding for finding in findings if finding is not None and not finding.ok), None)


_JUDGES: Final[dict[FaultSource, Callable[[HostFacts], Verdict]]] = {
    FaultSource.KERNEL_NOWAIT: _judge_kernel,
    FaultSource.STOCK_NOWAIT: _judge_stock,
    FaultSource.SIMULATED: _judge_simulated,
    FaultSource.BLOCKING: _judge_blocking,
}
