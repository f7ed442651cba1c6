"""Everything about a move that can be checked before the source VM is stopped."""

from __future__ import annotations

from collections.abc import Sequence

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError
from farfault_shim.attach.vmm import AttachedVmm
from farfault_shim.install.resident import resident_runs
from farfault_vmm.description import VmDescription, compare

from farfault_client.receive.pager import layout_text
from farfault_client.receive.source import SourceVm
from farfault_client.session.session import Session


def check(name: str, passed: bool, detail: str, remedy: str = "") -> rpb.Check:
    """One line of a preflight; the remedy is dropped where it passed."""
    return rpb.Check(name=name, passed=passed, detail=detail, remedy="" if passed else remedy)


def memory_checks(session: Session, vmm: AttachedVmm | None) -> list[rpb.Check]:
    """The attached VMM's memory against the lease's."""
    if vmm is None:
        remedy = "start the destination VMM with `farfault run --attach SOCKET --ram FILE -- COMMAND`"
        return [check("VMM attached", False, "no VMM has handed its memory over", remedy)]
    assert session.lease is not None
    source, ours = session.lease.layout, vmm.layout
    alike = source == ours
    detail = layout_text(ours) if alike else f"{layout_text(ours)} here, {layout_text(source)} at the source"
    remedy = "give both VMMs the same memory size, backends and page size, in the same order"
    return [
        check("VMM attached", True, f"pid {vmm.pid}, fault source {vmm.fault_source.value}"),
        check("same memory", alike, detail, remedy),
        _memory_is_empty(vmm),
    ]


def _memory_is_empty(vmm: AttachedVmm) -> rpb.Check:
    """A page that is there already would never be fetched."""
    if not vmm.ram_fds:
        return check("memory empty", True, "not visible; trusted")
    pages = sum(
        run.count
        for descriptor, region in zip(vmm.ram_fds, vmm.layout.regions, strict=True)
        for run in resident_runs(descriptor, region)
    )
    remedy = "stop the destination VMM, delete its RAM file, and start it with its incoming option"
    return check("memory empty", pages == 0, f"{pages} pages hold data" if pages else "no page holds data", remedy)


async def vm_checks(source: SourceVm, destination: VmDescription) -> list[rpb.Check]:
    """Both VMMs by their own description."""
    try:
        described = await source.describe()
    except FarfaultError as error:
        return [check("source VM", False, error.problem, error.remedy)]
    return [
        check(result.name, result.passed, result.detail, result.remedy) for result in compare(described, destination)
    ]


def failed(checks: Sequence[rpb.Check]) -> list[rpb.Check]:
    """Those that did not pass."""
    return [result for result in checks if not result.passed]
