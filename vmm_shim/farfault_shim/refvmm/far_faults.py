"""One vCPU's exits that may be far faults: reported raw, and the receiver's verdict obeyed.

The same as ``vmm_shim/preload/vcpu.c`` does for an unmodified VMM. Nothing is decided here.
"""

from __future__ import annotations

import contextlib
import errno
import time
from typing import Protocol

from farfault_shim.annotate import AddressKind
from farfault_shim.attach.client import AttachClient
from farfault_shim.attach.wire import (
    PARAVIRTUAL_MSRS,
    VERDICT_POPULATE,
    AddressSource,
    Report,
    ReportKind,
    Verdict,
    VerdictKind,
)
from farfault_shim.kvm.abi import EXIT_MEMORY_FAULT, EXIT_MMIO
from farfault_shim.kvm.interface import RunResult, Vcpu
from farfault_shim.kvm.registers import control_registers
from farfault_shim.kvm.run_area import MMIO_BYTES_MAX
from farfault_shim.refvmm.memory import GuestMemory
from farfault_shim.refvmm.vcpu_thread import Next


class Sampler(Protocol):
    """Where the address of a bare -EFAULT comes from (`TracepointSampler`, `SimulatedSampler`)."""

    def newest(self) -> int | None:
        """The newest address since the last call."""


class FarFaultReporter:
    """Made on the vCPU's own thread and used there only.

    Args:
        vcpu: whose exits these are.
        client: the attachment.
        memory: of the guest.
        sampler: of this thread; None: bare exits have no address.
        sampled_kind: what its addresses are.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        client: AttachClient,
        memory: GuestMemory,
        sampler: Sampler | None,
        sampled_kind: AddressKind = AddressKind.GVA,
    ) -> None:
        self._vcpu = vcpu
        self._link = client.vcpu(vcpu.number)
        self._memory = memory
        self._sampler = sampler
        self._sampled_kind = sampled_kind
        self._started = False
        self._last_gpa = -1

    def prepare(self) -> Next:
        """Once, before the first KVM_RUN: the pages that KVM itself touches are installed first."""
        if self._started:
            return Next.RUN
        control = control_registers(self._vcpu.get_special())
        msrs = self._vcpu.get_msrs(PARAVIRTUAL_MSRS)
        report = Report(
            ReportKind.START,
            self._vcpu.number,
            seq=0,
            ret=-1,
            exit_ns=time.monotonic_ns(),
            cr0=control.cr0,
            cr3=control.cr3,
            cr4=control.cr4,
            efer=control.efer,
            msrs=tuple(msrs.get(index, 0) for index in PARAVIRTUAL_MSRS),
        )
        self._started = self._ask(report) is not None
        return Next.RUN if self._started else Next.KICKED

    def settle(self, result: RunResult) -> Next:
        """After KVM_RUN returned `result`."""
        report = self._report_of(result)
        if report is None:
            return Next.PASS
        verdict = self._ask(report)
        if verdict is None:
            return Next.KICKED
        match verdict.verdict:
            case VerdictKind.RETRY:
                self._populate(verdict)
                return Next.RUN
            case VerdictKind.COMPLETE if self._complete_mmio():
                return Next.RUN
        self._link.count_passed()
        return Next.PASS

    def _ask(self, report: Report) -> Verdict | None:
        return self._link.ask(report, lambda: self._vcpu.area.immediate_exit)

    def _report_of(self, result: RunResult) -> Report | None:
        """The raw exit; None where it cannot be a far fault."""
        area = self._vcpu.area
        report = Report(
            ReportKind.EXIT,
            self._vcpu.number,
            seq=0,
            ret=result.ret,
            err=result.err,
            exit_reason=area.exit_reason,
            exit_ns=time.monotonic_ns(),
        )
        if result == (-1, errno.EFAULT):
            report = self._locate(report)
        elif result.ret == 0 and report.exit_reason == EXIT_MMIO and self._memory.offset_of(area.mmio.gpa) is not None:
            report = report._replace(
                address_source=AddressSource.MMIO,
                gpa=area.mmio.gpa,
                mmio_len=area.mmio.size_bytes,
                mmio_is_write=area.mmio.is_write,
            )
        else:
            return None
        self._link.count_exit(report)
        return report

    def _locate(self, report: Report) -> Report:
        """Fills in the address of an -EFAULT, as ``annotate.c`` does."""
        if report.exit_reason == EXIT_MEMORY_FAULT:
            fault = self._vcpu.area.memory_fault
            report = report._replace(
                address_source=AddressSource.KVM_RUN, flags=fault.flags, gpa=fault.gpa, size=fault.size_bytes
            )
        elif self._sampler is not None and (address := self._sampler.newest()) is not None:
            report = self._translated(report, address)
        if report.address_source is AddressSource.NONE or report.gpa == self._last_gpa:
            report = report._replace(rip=self._vcpu.get_registers().rip)  # for the log, if it makes no progress
        self._last_gpa = report.gpa
        return report

    def _translated(self, report: Report, address: int) -> Report:
        if self._sampled_kind is AddressKind.GPA:
            return report._replace(address_source=AddressSource.TRACEPOINT_GPA, gpa=address)
        gpa = self._vcpu.translate(address)
        assert self._sampler is not None
        self._sampler.newest()  # the translation's own page walk
        if gpa is None:
            return report._replace(gva=address, translate_failed=True)
        return report._replace(address_source=AddressSource.TRACEPOINT_GVA, gva=address, gpa=gpa)

    def _populate(self, verdict: Verdict) -> None:
        """Maps what the file has already, so that the restarted access finds it."""
        offset = self._memory.offset_of(verdict.gpa, verdict.size)
        if verdict.flags & VERDICT_POPULATE and offset is not None:
            with contextlib.suppress(OSError):  # then the access faults again, and the receiver counts
                self._memory.for_kvm.populate(offset, verdict.size)

    def _complete_mmio(self) -> bool:
        """Finishes an emulated access in RAM; the receiver has installed its page."""
        access = self._vcpu.area.mmio
        offset = self._memory.offset_of(access.gpa, access.size_bytes)
        if offset is None or access.size_bytes > MMIO_BYTES_MAX:
            return False
        ram = self._memory.base.memory
        if access.is_write:
            ram[offset : offset + access.size_bytes] = access.data
        else:
            self._vcpu.area.answer_mmio(ram[offset : offset + access.size_bytes])
        return True
