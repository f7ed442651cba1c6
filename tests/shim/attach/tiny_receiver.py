"""A receiver of a page: installs pages from a file at once, on a thread with its own event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from farfault_shim.attach.listener import AttachListener
from farfault_shim.attach.vmm import AttachedVmm, VcpuChannel
from farfault_shim.attach.wire import Report, ReportKind, Verdict, VerdictKind
from farfault_shim.exits.classifier import (
    Complete,
    Escalate,
    ExitClassifier,
    Fetch,
    PassOn,
    Retry,
    SlotTable,
    Then,
)
from farfault_shim.exits.page_tables import PageTableWalk
from farfault_shim.install.installer import FileInstaller, Installer, UffdInstaller
from farfault_shim.install.resident import resident_runs
from farfault_shim.layout import Gpa, Layout, PageIndex, PageRun
from farfault_shim.uffd.userfaultfd import Fault

PAGE_BYTES = 4096
START_TIMEOUT_S = 10.0


class Pages:
    """Which pages are there, as the classifier asks."""

    def __init__(self) -> None:
        self.present: set[int] = set()

    def is_present(self, page: int) -> bool:
        return page in self.present


class TinyReceiver:
    """Use as a context manager.

    Attributes:
        gpas: page addresses of the vCPUs' faults, in their order, an address once a fault.
        reports: all reports.
        passed, escalated: exits that went back to the VMM.
        holding: while set, reports are kept and not answered.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.gpas: list[int] = []
        self.reports: list[Report] = []
        self.passed: list[PassOn] = []
        self.escalated: list[Escalate] = []
        self.sleepers = 0
        self.holding = threading.Event()
        self.attached = threading.Event()
        self.pages = Pages()
        self._source = os.open(source, os.O_RDONLY)
        self._held: list[Callable[[], None]] = []
        self._vmm: AttachedVmm | None = None
        self._installer: Installer | None = None
        self._classifier: ExitClassifier | None = None
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="receiver")

    def __enter__(self) -> TinyReceiver:
        self._thread.start()
        assert self._started.wait(START_TIMEOUT_S)
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        os.close(self._source)

    @property
    def is_holding(self) -> bool:
        """Something waits for `let_go`."""
        return bool(self._held)

    def let_go(self) -> None:
        """Answers what was held, and all that comes."""
        self.holding.clear()
        self._call(self._answer_held)

    def release(self) -> None:
        """Installs what is missing, and releases the VMM."""
        self._call(self._release)

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        assert self._loop is not None
        self._loop.call_soon_threadsafe(run)
        assert done.wait(START_TIMEOUT_S)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        listener = await AttachListener.start(self.path, self._on_attached, self._on_detached)
        self._started.set()
        await self._stop.wait()
        await listener.close()

    def _on_attached(self, vmm: AttachedVmm) -> None:
        self._vmm = vmm
        if vmm.uffd is None:
            self._installer = FileInstaller(vmm.layout, vmm.ram_fds)
        else:
            self._installer = UffdInstaller(vmm.layout, vmm.handover, vmm.uffd, vmm.alias_uffd)
            asyncio.get_running_loop().add_reader(vmm.uffd.fileno(), self._read_events)
        for descriptor, region in zip(vmm.ram_fds, vmm.layout.regions, strict=True):
            for run in resident_runs(descriptor, region):
                self.pages.present |= set(range(run.first, run.end))
        self._classifier = ExitClassifier(vmm.layout, lambda: SlotTable(vmm.slots()), self.pages)
        vmm.start(self._on_report)
        self.attached.set()

    def _on_detached(self, vmm: AttachedVmm) -> None:
        if vmm.uffd is not None and vmm.uffd.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(vmm.uffd.fileno())
        self._vmm = None
        self.attached.clear()

    def _on_report(self, channel: VcpuChannel, report: Report) -> None:
        self.reports.append(report)
        if self.holding.is_set():
            self._held.append(lambda: self._answer(channel, report))
        else:
            self._answer(channel, report)

    def _answer_held(self) -> None:
        held, self._held = self._held, []
        for answer in held:
            answer()

    def _answer(self, channel: VcpuChannel, report: Report) -> None:
        verdict = self._prepare(report) if report.kind is ReportKind.START else self._decide(report)
        channel.send_verdict(verdict)

    def _decide(self, report: Report) -> Verdict:
        assert self._classifier is not None
        decision = self._classifier.classify(report)
        match decision:
            case Fetch(pages, then):
                self.gpas.append(report.gpa & -PAGE_BYTES)
                self._install(pages)
                complete = then is Then.COMPLETE_MMIO
                return Verdict(report.seq, VerdictKind.COMPLETE if complete else VerdictKind.RETRY)
            case Retry(gpa, size_bytes):
                return Verdict(report.seq, VerdictKind.RETRY, int(size_bytes > 0), gpa, size_bytes)
            case Complete():
                return Verdict(report.seq, VerdictKind.COMPLETE)
            case PassOn():
                self.passed.append(decision)
            case Escalate():
                self.escalated.append(decision)
        return Verdict(report.seq, VerdictKind.PASS)

    def _prepare(self, report: Report) -> Verdict:
        self._install_gpas(Gpa(msr & -PAGE_BYTES) for msr in report.msrs if msr & 1)
        walk = PageTableWalk.of_registers(report.cr0, report.cr3, report.cr4, report.efer)
        while tables := walk.next_level():
            self._install_gpas(tables)
            walk.feed({gpa: os.pread(self._source, PAGE_BYTES, gpa) for gpa in tables})
        return Verdict(report.seq, VerdictKind.RETRY)

    def _install_gpas(self, gpas: Iterable[Gpa]) -> None:
        assert self._vmm is not None
        slots = SlotTable(self._vmm.slots())
        offsets = [offset for gpa in gpas if (offset := slots.offset_of(gpa)) is not None]
        self._install([PageRun(self._layout.page_at(offset), 1) for offset in offsets])

    def _install(self, runs: Iterable[PageRun]) -> None:
        assert self._installer is not None
        for run in runs:
            data = os.pread(self._source, run.count * PAGE_BYTES, run.first * PAGE_BYTES)
            self._installer.install(run, data, 0)
            self._installer.wake(run)
            self.pages.present |= set(range(run.first, run.end))

    def _read_events(self) -> None:
        assert self._vmm is not None
        assert self._vmm.uffd is not None
        assert self._installer is not None
        for event in self._vmm.uffd.read_events():
            if isinstance(event, Fault):
                self.sleepers += event.thread_id in self._vmm.vcpu_tids()
                page = self._installer.page_of_fault(event.address)
                assert page is not None
                run = PageRun(page, 1)
                if self.holding.is_set():
                    self._held.append(lambda run=run: self._install([run]))  # type: ignore[misc]
                else:
                    self._install([run])

    def _release(self) -> None:
        assert self._vmm is not None
        assert self._installer is not None
        absent = sorted(set(range(self._layout.page_count)) - self.pages.present)
        self._install(PageRun(PageIndex(page), 1) for page in absent)
        if self._vmm.uffd is not None:
            asyncio.get_running_loop().remove_reader(self._vmm.uffd.fileno())
        self._installer.unregister()
        self._vmm.release()

    @property
    def _layout(self) -> Layout:
        assert self._vmm is not None
        return self._vmm.layout
