"""The lease record: any sequence of calls keeps it in order, and any crash while saving leaves one whole record."""

import gc
import os
from pathlib import Path

import pytest
from farfault_cli.errors import FarfaultError, UsageError
from farfault_server.leases import store as store_module
from farfault_server.leases.book import (
    CLONE,
    CLONE_IDLE_S,
    MIGRATION,
    MIGRATION_IDLE_S,
    RELEASED_MAX,
    LeaseBook,
    OpenTerms,
)
from farfault_server.leases.phases import GONE, STOPPED, TRANSITIONS, Phase, Step
from farfault_server.leases.refusals import Code, RefusedError
from farfault_server.leases.store import FILE_NAME, DirectoryStore, book_from_json, book_to_json
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

LEASES_MAX = 3


@pytest.fixture(scope="module", autouse=True)
def no_leftovers():
    """Garbage of earlier tests goes now: collected while Hypothesis parses source, it breaks CPython's parser."""
    gc.collect()


def open_lease(book: LeaseBook, kind: int = MIGRATION, idle_s: float = 0.0, **fields):
    return book.open(OpenTerms(1, kind, **fields), leases_max=LEASES_MAX, idle_s=lambda lease_id: idle_s)


def fresh(is_controlled: bool = True) -> LeaseBook:
    return LeaseBook.fresh(is_controlled=is_controlled, memory_identity=None)


def check(error: RefusedError, *codes: Code) -> None:
    """A refusal has the right code and says what to do."""
    assert error.code in codes
    assert error.remedy


class Leases(RuleBasedStateMachine):
    """Any calls in any order, against what pages.proto promises."""

    granted = Bundle("granted")

    @initialize(is_controlled=st.booleans())
    def start(self, is_controlled):
        self.book = fresh(is_controlled)
        self.generations = {self.book.generation}
        self.was_gone = False

    def adopt(self, book: LeaseBook) -> None:
        before, self.book = self.book, book
        if book.generation != before.generation:
            assert book.generation not in self.generations, "a generation came back"
            self.generations.add(book.generation)
        if before.phase in STOPPED and book.phase not in STOPPED:
            assert book.generation != before.generation, "the VM may run under the old generation"

    @rule(target=granted, kind=st.sampled_from([MIGRATION, CLONE]), idle_s=st.sampled_from([0.0, 1e6]))
    def open(self, kind, idle_s):
        holder = self.book.migration_lease
        try:
            book, granted = open_lease(self.book, kind, idle_s)
        except RefusedError as error:
            check(error, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED)
            return None
        if kind == MIGRATION and holder is not None:
            assert idle_s >= MIGRATION_IDLE_S
            assert self.book.phase is Phase.RUNNING, "a lease on a stopped VM was taken away"
        self.adopt(book)
        return granted

    @rule(granted=granted)
    def resume_lease(self, granted):
        if granted is None:
            return
        lease_id = granted.lease.lease_id
        try:
            book, again = open_lease(self.book, resume_lease_id=lease_id, resume_token=granted.token)
        except RefusedError as error:
            assert lease_id not in self.book.leases
            check(error, Code.FAILED_PRECONDITION, Code.PERMISSION_DENIED)
        else:
            assert book is self.book
            assert again.lease == self.book.leases[lease_id]
        with pytest.raises(RefusedError):
            self.book.authorize(lease_id, granted.token + "x")

    @rule(granted=consumes(granted))
    def release(self, granted):
        if granted is None:
            return
        lease_id = granted.lease.lease_id
        try:
            book, _ = self.book.release(lease_id, granted.token)
        except RefusedError:
            assert lease_id not in self.book.leases or self.book.phase is Phase.HANDED_OVER
            return
        self.adopt(book)
        again, lease = book.release(lease_id, granted.token)
        assert again is book
        assert lease is None

    @rule(step=st.sampled_from(Step))
    def step(self, step):
        before = self.book.phase
        try:
            book = self.book.step(step, [[1]])
        except RefusedError as error:
            check(error, Code.FAILED_PRECONDITION)
            return
        if before in GONE:
            assert book.phase in GONE, "a VM that was handed over came back"
        self.adopt(book)

    @rule()
    def restart(self):
        assert book_from_json(book_to_json(self.book)) == self.book

    @invariant()
    def bounds(self):
        assert len(self.book.leases) <= LEASES_MAX
        assert len(self.book.released) <= RELEASED_MAX
        assert sum(lease.kind == MIGRATION for lease in self.book.leases.values()) <= 1
        assert self.book.generation > 0


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_every_phase_but_the_last_can_be_left():
    sources = {phase for (phase, _), target in TRANSITIONS.items() if target is not phase}
    assert sources == set(Phase) - {Phase.COMPLETED}


def test_nothing_leads_back_from_a_hand_over():
    assert all(target in GONE for (phase, _), target in TRANSITIONS.items() if phase in GONE)


def test_the_way_of_a_move():
    book = fresh()
    generations = [book.generation]
    for step in (Step.SUSPEND, Step.STATE_SENT, Step.HAND_OVER, Step.COMPLETE):
        book = book.step(step, [[4]])
        generations.append(book.generation)
    assert book.phase is Phase.COMPLETED
    assert len(set(generations)) == 2  # before and after the stop
    with pytest.raises(RefusedError):
        book.step(Step.RESUME)


def test_other_memory_after_a_restart_is_another_generation():
    book = fresh().step(Step.SUSPEND).step(Step.STATE_SENT, [[1, 2]])
    assert book.with_memory([[1, 2]]) is book
    assert book.with_memory([[1, 3]]).generation != book.generation


def test_a_vm_that_runs_past_the_server_is_another_generation():
    book = fresh().step(Step.SUSPEND).step(Step.STATE_SENT).step(Step.HAND_OVER)
    found = book.step(Step.FOUND_RUNNING)
    assert found.phase is Phase.HANDED_OVER
    assert found.generation != book.generation


def test_an_idle_clone_makes_room():
    book = fresh()
    for _ in range(LEASES_MAX):
        book, first = open_lease(book, CLONE)
    with pytest.raises(RefusedError, match="taken"):
        open_lease(book, CLONE, idle_s=CLONE_IDLE_S - 1)
    book, _ = open_lease(book, CLONE, idle_s=CLONE_IDLE_S)
    assert len(book.leases) == LEASES_MAX
    assert first.lease.lease_id in book.leases  # the oldest went


def test_only_the_owner_of_the_move_touches_the_vm():
    book, granted = open_lease(fresh(), CLONE)
    with pytest.raises(RefusedError) as caught:
        book.check_owner(granted.lease)
    assert caught.value.code is Code.PERMISSION_DENIED


def test_the_record_holds_no_token():
    book, granted = open_lease(fresh())
    assert granted.token not in str(book_to_json(book))


# ---- store ---------------------------------------------------------------------------------------


class PowerCutError(Exception):
    """Nothing after this call happens."""


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("point", range(6))
def test_a_crash_at_any_point_leaves_the_old_record_or_the_new_one(tmp_path, monkeypatch, point, is_done):
    """The calls that change the disk, cut before or after each of them."""
    store = DirectoryStore(tmp_path)
    old, _ = open_lease(fresh())
    store.save(old)
    new = old.step(Step.SUSPEND)
    calls = 0

    def cut(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == point + 1 and not is_done:
                raise PowerCutError
            result = real(*arguments, **options)
            if calls == point + 1:
                raise PowerCutError
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "open", cut(os.open))
        patch.setattr(store_module.os, "fsync", cut(os.fsync))
        patch.setattr(store_module.json, "dump", cut(store_module.json.dump))
        patch.setattr(Path, "replace", cut(Path.replace))
        with pytest.raises(PowerCutError):
            store.save(new)
    assert store.load() in (old, new)
    store.save(new)
    assert store.load() == new
    store.close()


def test_a_new_record_is_durable_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path)
    order = []
    monkeypatch.setattr(store_module.os, "fsync", lambda descriptor: order.append("fsync"))
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("replace"), real(self, target))[1])
    store.save(fresh())
    assert order == ["fsync", "replace", "fsync"]
    store.close()


def test_one_server_a_directory(tmp_path):
    store = DirectoryStore(tmp_path)
    with pytest.raises(UsageError, match="another page server") as caught:
        DirectoryStore(tmp_path)
    assert caught.value.remedy
    store.close()
    DirectoryStore(tmp_path).close()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"format": 2}', "[]"])
def test_a_damaged_record_is_not_guessed_at(tmp_path, text):
    store = DirectoryStore(tmp_path)
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(FarfaultError, match="cannot be read"):
        store.load()
    store.close()
