"""Orders of the engine, carried out on a kernel that has its own mind."""

from __future__ import annotations

import pytest
from farfault_client.engine import FaultEngine, Install, Priority, Waiter
from farfault_client.engine.orders import Extent, ExtentResult
from farfault_client.receive import installing as installing_module
from farfault_client.receive.installing import Installing
from farfault_shim.install.installer import DrainEvents, InstallError, InstallResult
from farfault_shim.layout import Layout, PageIndex, PageRun

PAGE = 4096
LAYOUT = Layout([(16 * PAGE, PAGE)])
BASE = 100
"""Bytes before the pages, in what came."""


def run(first: int, count: int) -> PageRun:
    return PageRun(PageIndex(first), count)


class Scene:
    """An engine with an answer for pages 0 to 7 on its way into memory; thread N waits for page N, of even numbers.

    Attributes:
        answers: of the installer, one after the other; then all goes well.
        removes: the pages that the next events remove.
        installed: what the installer was told to install; the bytes of each page begin with its number.
    """

    def __init__(self) -> None:
        self.engine = FaultEngine(LAYOUT)
        self.answers: list[InstallResult | InstallError] = []
        self.removes: list[PageRun] = []
        self.installed: list[int] = []
        self.zeros: list[int] = []
        self.woken: list[object] = []
        self.summed: dict[int, int] = {}
        self.left_out: list[PageRun] = []
        self.data = bytes(BASE) + b"".join(bytes([page]) * PAGE for page in range(8))
        self.installing = Installing(LAYOUT, self.engine, self, self, self._read_events, self._wake)  # type: ignore[arg-type]
        self.engine.fault("all", [PageIndex(page) for page in range(8)], Priority.VCPU, 0.0)
        for page in range(0, 8, 2):
            self.engine.fault(page, [PageIndex(page)], Priority.VCPU, 0.0)
        request = self.engine.next_demand()
        assert request is not None
        (self.order,) = self.engine.arrived([Extent(run(0, 8), ExtentResult.DATA)], [request.request_id], 0.0)

    def go(self) -> None:
        self.installing.install(self.order, self.data, BASE)

    def _read_events(self) -> None:
        for removed in self.removes:
            self.engine.removed(removed)
        self.removes = []

    def _wake(self, waiters: list[Waiter]) -> None:
        self.woken += [waiter.key for waiter in waiters]

    # ---- an installer ----------------------------------------------------------------------------

    def install(self, wanted: PageRun, data: bytes, data_offset: int) -> InstallResult:
        answer = self.answers.pop(0) if self.answers else InstallResult([wanted])
        result = answer.partial if isinstance(answer, InstallError) else answer
        for part in result.installed:
            for page in range(part.first, part.end):
                assert data[data_offset + (page - wanted.first) * PAGE] == page
                self.installed.append(page)
        if isinstance(answer, InstallError):
            raise answer
        return result

    def install_zero(self, wanted: PageRun) -> InstallResult:
        if self.answers:
            answer = self.answers.pop(0)
            assert isinstance(answer, InstallError)
            raise answer
        self.zeros += range(wanted.first, wanted.end)
        return InstallResult([wanted])

    # ---- a digest --------------------------------------------------------------------------------

    def digest(self, part: PageRun, data: bytes) -> None:
        for index in range(part.count):
            self.summed[part.first + index] = data[index * PAGE]

    def leave_out(self, part: PageRun) -> None:
        self.left_out.append(part)


class Digest:
    """Passes on to the scene."""

    def __init__(self, scene: Scene) -> None:
        self.installed = scene.digest
        self.leave_out = scene.leave_out


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.installing._digest = Digest(scene)  # type: ignore[assignment]
    return scene


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing_module, "DRAIN_PAUSE_S", 0)


def test_a_run_is_installed_summed_and_its_threads_go_on(scene: Scene) -> None:
    scene.go()
    assert scene.installed == list(range(8))
    assert scene.summed == {page: page for page in range(8)}
    assert sorted(map(str, scene.woken)) == ["0", "2", "4", "6", "all"]


def test_what_events_remove_is_left_out_of_the_rest(scene: Scene) -> None:
    scene.answers = [DrainEvents("events", InstallResult([run(0, 2)]))]
    scene.removes = [run(1, 4)]
    scene.go()
    assert scene.installed == [0, 1, 5, 6, 7], "1 was there before the event said otherwise"
    assert not scene.engine.pages.is_present(1)
    assert 0 in scene.woken
    assert 2 not in scene.woken, "it waits for a page of zeros, which is another order"


def test_pages_that_exist_are_no_error_and_not_in_the_sum(scene: Scene) -> None:
    scene.answers = [InstallResult([run(0, 3), run(5, 3)], [run(3, 2)])]
    scene.go()
    assert scene.left_out == [run(3, 2)]
    assert sorted(scene.summed) == [0, 1, 2, 5, 6, 7]
    assert scene.engine.stats.existed_pages == 2
    assert 4 in scene.woken


def test_what_could_not_be_installed_is_asked_for_again(scene: Scene) -> None:
    scene.answers = [InstallError("no memory", InstallResult([run(0, 3)]))]
    with pytest.raises(InstallError, match="no memory"):
        scene.go()
    assert sorted(map(str, scene.woken)) == ["0", "2"]
    again = scene.engine.next_demand()
    assert again is not None
    assert [page for part in again.runs for page in range(part.first, part.end)] == [3, 4, 5, 6, 7]


def test_a_page_of_zeros_waits_for_events_as_well(scene: Scene) -> None:
    scene.engine.removed(run(2, 1))
    scene.answers = [DrainEvents("events", InstallResult())]
    scene.installing.install_zero(PageIndex(2))
    assert scene.zeros == [2]
    assert 2 in scene.woken


def test_a_kernel_that_always_has_events_is_not_asked_for_ever(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing_module, "DRAIN_ATTEMPTS_MAX", 5)
    scene.answers = [DrainEvents("events", InstallResult()) for _ in range(20)]
    with pytest.raises(RuntimeError, match="page 0: userfaultfd asked to drain events 5 times"):
        scene.go()
    with pytest.raises(RuntimeError, match="page 3"):
        scene.installing.install_zero(PageIndex(3))


def test_an_order_of_zeros_has_no_bytes(scene: Scene) -> None:
    scene.installing.install(Install(run(4, 1), -1), b"")
    assert scene.zeros == [4]
    assert scene.summed == {}
