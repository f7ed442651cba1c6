"""Far memory of the reference VMM: which fault source, and what each vCPU thread needs for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from farfault_shim.annotate import AddressKind, Annotator, TracepointSampler
from farfault_shim.attach.client import AttachClient, RamBlock
from farfault_shim.attach.wire import FaultSource
from farfault_shim.kvm.interface import Vcpu
from farfault_shim.kvm.simulated import SimulatedSampler, SimulatedVcpu
from farfault_shim.refvmm.far_faults import FarFaultReporter, Sampler
from farfault_shim.refvmm.memory import GuestMemory


class Attachment:
    """Watches a VM's memory and connects it to a receiver.

    Args:
        path: of the receiver's socket.
        memory: of the guest; gets its alias mapping here, before any memslot is set.
        fault_source: STOCK_NOWAIT, BLOCKING or SIMULATED.
        annotator: of bare exits, for STOCK_NOWAIT; None: they have no address.
        on_released: see `AttachClient`.

    Raises:
        UserfaultfdUnavailableError: this process may not make a userfaultfd.
    """

    def __init__(
        self,
        path: Path,
        memory: GuestMemory,
        fault_source: FaultSource,
        annotator: Annotator | None = None,
        on_released: Callable[[], None] = lambda: None,
    ) -> None:
        self.fault_source = fault_source
        self._memory = memory
        self._annotator = annotator
        alias_hva = memory.add_alias().hva if fault_source is FaultSource.STOCK_NOWAIT else 0
        block = RamBlock(memory.descriptor, memory.size_bytes, memory.base.hva, alias_hva, memory.page_size_bytes)
        self.client = AttachClient(path, [block], fault_source, memory.slots(), on_released)
        self.client.start()

    def watch(self, vcpu: Vcpu) -> FarFaultReporter | None:
        """For `VcpuThread`: called on the vCPU's thread. With BLOCKING, KVM_RUN itself waits for pages."""
        if self.fault_source is FaultSource.BLOCKING:
            self.client.vcpu(vcpu.number)  # the receiver tells vCPUs from other threads by their thread id
            return None
        return FarFaultReporter(vcpu, self.client, self._memory, *self._sampler(vcpu))

    def _sampler(self, vcpu: Vcpu) -> tuple[Sampler | None, AddressKind]:
        if isinstance(vcpu, SimulatedVcpu):
            return SimulatedSampler(vcpu), AddressKind.GVA
        if self._annotator is None:
            return None, AddressKind.GVA
        return TracepointSampler(self._annotator), self._annotator.kind

    def may_save(self) -> str:
        """Why the VM cannot move on: memory is still on its way. Empty: it can."""
        if self.client.released.is_set():
            return ""
        return "memory is still arriving from the source: wait until the receiver has released this VM"
