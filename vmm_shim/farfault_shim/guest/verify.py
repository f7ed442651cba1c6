"""Check the RAM of a stopped VM from outside: every data page must hold what its vCPU says it left there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from farfault_cli.errors import VerificationError

from farfault_shim.guest.addresses import PAGE_BYTES
from farfault_shim.guest.mailbox import Mailbox, WorkerState, read_class_steps
from farfault_shim.guest.parameters import GuestParameters, first_word, second_word_offset

PROBLEMS_MAX = 16
"""Problems described in a `RamCheck`; all are counted."""

CHUNK_BYTES = 1 << 20
_MASK_64 = (1 << 64) - 1


@dataclass(slots=True)
class RamCheck:
    """What `verify_ram` found.

    Attributes:
        pages: data pages looked at.
        wrong: pages that hold something else than they must, vCPUs that report errors or nonsense or have
            not started.
        problems: the first of them in words.
    """

    pages: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.wrong

    def add(self, problem: str) -> None:
        """Counts a problem, and keeps it if it is among the first."""
        self.wrong += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

    def raise_if_wrong(self) -> None:
        """Raises VerificationError naming the first problem."""
        if self.wrong:
            raise VerificationError(
                f"guest RAM is wrong in {self.wrong} places of {self.pages} pages; first: {self.problems[0]}",
                "do not use this VM; keep the RAM file and the logs of both sides, and report them",
            )


def verify_ram(fd: int, parameters: GuestParameters, mailboxes: Sequence[Mailbox], offset: int = 0) -> RamCheck:
    """Compares every data page with what the guest's own account says it must hold.

    A vCPU that has completed p passes and done d pages of its round has left ``first_word + p + 1`` in the
    first d pages of the round's order and ``first_word + p`` in the others; in the page that it stopped at,
    either, or the first word new and the second old. With a skew it is ``first_word`` plus the page's visits, and
    the vCPU stopped at one of the pages that its classes visit next. A vCPU that still fills has left
    ``first_word`` or nothing. Takes about 1.2 s a million pages.

    Args:
        fd: the RAM file of a VM that is stopped, complete: holes read as zeros, which are wrong.
        parameters: that the guest runs with.
        mailboxes: read while it was stopped.
        offset: of guest physical address 0 in the file.

    Raises:
        ValueError: there are not as many mailboxes as vCPUs.
        OSError: the file cannot be read.
    """
    if len(mailboxes) != parameters.vcpus:
        raise ValueError(f"{len(mailboxes)} mailboxes for {parameters.vcpus} vCPUs")
    check = RamCheck()
    for vcpu, mailbox in enumerate(mailboxes):
        if mailbox.errors:
            check.add(
                f"vCPU {vcpu} reports {mailbox.errors} errors, first at {mailbox.error_gpa:#x}: "
                f"{mailbox.error_seen:#x} instead of {mailbox.error_expected:#x}"
            )
        if mailbox.state is WorkerState.BOOT:
            check.add(f"vCPU {vcpu} has not started")
            continue
        account = _account(check, fd, parameters, vcpu, mailbox, offset)
        if account is not None:
            _check_words(check, parameters, vcpu, account, _slice_words(fd, parameters, vcpu, offset))
    return check


@dataclass(frozen=True, slots=True)
class _Account:
    """What a vCPU says of its slice.

    Attributes:
        visits: of each page, the fill not counted; -1: not filled.
        next: pages of which one may have been visited once more, in full or in part.
        stale: a page that is not filled may hold anything.
    """

    visits: list[int]
    next: set[int]
    stale: bool


def _account(
    check: RamCheck, fd: int, parameters: GuestParameters, vcpu: int, mailbox: Mailbox, offset: int
) -> _Account | None:
    """None, and a problem, where it is nonsense."""
    pages = parameters.slice_of(vcpu)
    filling = mailbox.state is WorkerState.FILL
    skew = parameters.skew
    if skew is not None and not filling:
        steps = read_class_steps(fd, vcpu, offset)
        return _Account(skew.visits(steps), {pages[page] for page in skew.upcoming(steps)}, stale=False)
    done = mailbox.filled if filling else mailbox.touched - mailbox.passes * len(pages)
    if not 0 <= done <= len(pages):
        check.add(f"vCPU {vcpu} says that it has done {done} of its {len(pages)} pages in this round")
        return None
    order = parameters.round_order(vcpu, 0 if filling else mailbox.passes + 1)
    before = -1 if filling else mailbox.passes
    visits = [before] * len(pages)
    for page in islice(order, done):
        visits[page - pages.start] = before + 1
    return _Account(visits, set(islice(order, 1)), stale=filling and mailbox.boots > 1)  # a reset leaves RAM as it was


def _check_words(
    check: RamCheck,
    parameters: GuestParameters,
    vcpu: int,
    account: _Account,
    words: Iterable[tuple[int, int, int]],
) -> None:
    start = parameters.slice_of(vcpu).start
    may_be_ahead = True
    for page, first, second in words:
        check.pages += 1
        visits = account.visits[page - start]
        expected = _word(page, visits)
        if first == second == expected or (account.stale and visits < 0):
            continue
        after = _word(page, visits + 1)
        if may_be_ahead and page in account.next and first == after and second in (expected, after):
            may_be_ahead = False
            continue
        check.add(
            f"data page {page} at {parameters.address_of(page):#x} of vCPU {vcpu} holds {first:#x} "
            f"and {second:#x} instead of {expected:#x}"
        )


def _word(page: int, visits: int) -> int:
    return (first_word(page) + visits) & _MASK_64 if visits >= 0 else 0


def _slice_words(fd: int, parameters: GuestParameters, vcpu: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and second word of each page of a vCPU's slice, read in chunks where pages lie close."""
    second_offset = second_word_offset(vcpu)
    pages = parameters.slice_of(vcpu)
    step_bytes = parameters.step_bytes
    chunk_pages = max(1, CHUNK_BYTES // step_bytes)
    page = pages.start
    while page < pages.stop:
        border = parameters.low_pages if page < parameters.low_pages else pages.stop
        count = min(chunk_pages, border - page, pages.stop - page)
        size_bytes = (count - 1) * step_bytes + PAGE_BYTES
        data = os.pread(fd, size_bytes, offset + parameters.file_offset_of(page))
        data += bytes(size_bytes - len(data))  # past the end of the file there is nothing: zeros, which are wrong
        words = memoryview(data).cast("Q")
        stride = step_bytes // 8
        yield from zip(
            range(page, page + count),
            words[::stride].tolist(),
            words[second_offset // 8 :: stride].tolist(),
            strict=True,
        )
        page += count
