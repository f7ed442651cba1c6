"""Trials on scratch VMs, each in a child process with a time limit, and what their reports mean."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from farfault_shim.annotate.annotator import AddressKind
from farfault_shim.annotate.discover import Discovery
from farfault_shim.kvm.nowait import NowaitInterface
from farfault_shim.sources.facts import Finding, KernelTrial, Paging

TRIAL_TIMEOUT_S: Final = 10.0
"""A scratch VM runs for less than 0.2 s; one that takes longer has a vCPU that waits for ever."""

Report = Mapping[str, Any]
"""Of `farfault_shim.sources.scratch_vm.run_request`."""


class Trials(NamedTuple):
    """What scratch VMs showed.

    Attributes:
        stock: report of the trial with a SIGBUS userfaultfd.
        kernel: of the configured interfaces.
    """

    stock: Report
    kernel: tuple[KernelTrial, ...]

    @property
    def paging(self) -> Paging:
        """By which tracepoint gave the right address at every fault; UNKNOWN where neither did."""
        right = self.stock.get("right", {})
        faults = _faults(self.stock)
        if faults and right.get(AddressKind.GPA.value) == faults:
            return Paging.TWO_DIMENSIONAL
        if faults and right.get(AddressKind.GVA.value) == faults:
            return Paging.SHADOW
        return Paging.UNKNOWN

    def stock_exit(self, paging: Paging) -> Finding:
        """Whether stock NOWAIT works with the annotator that fits the paging."""
        report, faults = self.stock, _faults(self.stock)
        if report.get("problem"):
            return Finding(False, f"scratch VM: {report['problem']}", "use --fault-source blocking")
        if not faults:
            return Finding(False, "scratch VM: an absent page did not end KVM_RUN", "use --fault-source blocking")
        if not report.get("finished"):
            return Finding(False, "scratch VM: the guest read wrong data", "use --fault-source blocking")
        form = "bare" if report["bare"] == faults else "annotated" if report["annotated"] == faults else "mixed"
        kind = paging.address_kind.value
        right = report["right"].get(kind)
        if right is None:
            return Finding(True, f"{faults} {form} -EFAULT exits, addresses not checked")
        detail = f"{faults} {form} -EFAULT exits, {right} addresses right"
        return Finding(right == faults, detail, "" if right == faults else "use --fault-source blocking")


def run_trials(
    interfaces: Sequence[NowaitInterface],
    annotators: Mapping[AddressKind, Discovery],
    userfaultfd_device_fd: int | None = None,
    run: Callable[[dict[str, Any]], Report] | None = None,
) -> Trials:
    """Tries stock NOWAIT and each interface.

    Args:
        interfaces: configured ones.
        annotators: those that can be used are compared with the guest's registers.
        userfaultfd_device_fd: an inherited descriptor of ``/dev/userfaultfd``.
        run: runs one request; the default starts a child process.
    """
    run = run or run_in_child
    usable = {kind.value: found.annotator[1:] for kind, found in annotators.items() if found.annotator is not None}
    common = {"userfaultfd_device_fd": userfaultfd_device_fd}
    kernel = []
    for interface in interfaces:
        fields = [interface.series.value, interface.capability, interface.memslot_flag]
        kernel.append(KernelTrial(interface, _kernel_finding(interface, run({"interface": fields} | common))))
    return Trials(run({"annotators": usable} | common), tuple(kernel))


def run_in_child(request: dict[str, Any]) -> Report:
    """One trial in a child process; a report with a ``problem`` where it does not end or breaks."""
    command = [sys.executable, "-m", "farfault_shim.sources.scratch_vm", json.dumps(request)]
    device_fd = request.get("userfaultfd_device_fd")
    pass_fds = () if device_fd is None else (device_fd,)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False, pass_fds=pass_fds
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"the vCPU waited in KVM_RUN for {TRIAL_TIMEOUT_S:g} s instead of leaving it"}
    except OSError as error:
        return {"problem": f"the trial cannot be started: {error.strerror}"}
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or [f"status {result.returncode}"]
        return {"problem": f"the trial broke: {last[0]}"}
    report: Report = json.loads(result.stdout)
    return report


def _kernel_finding(interface: NowaitInterface, report: Report) -> Finding:
    remedy = "compare the numbers with the running kernel's linux/kvm.h"
    notes = "".join(f"; {note}" for note in report.get("notes", ()))
    if report.get("has_capability") is False:
        notes += f"; capability {interface.capability} is not reported"
    if report.get("problem"):
        return Finding(False, f"{report['problem']}{notes}", remedy)
    if not report.get("annotated") or report.get("bare"):
        return Finding(False, f"{report.get('bare', 0)} exits were not annotated{notes}", remedy)
    if report["right"].get("kvm_run") != report["annotated"] or not report.get("finished"):
        return Finding(False, f"wrong addresses or data{notes}", remedy)
    return Finding(True, f"{report['annotated']} annotated -EFAULT exits{notes}")


def _faults(report: Report) -> int:
    return int(report.get("bare", 0)) + int(report.get("annotated", 0))
