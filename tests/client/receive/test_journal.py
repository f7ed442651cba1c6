"""What a receiver remembers over its own death."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from farfault_cli.errors import UsageError
from farfault_client.receive.journal import Journal, Record, Step

RECORD = Record(Step.OPENED, "source:7000", "lease", "secret", 3)


def test_a_new_journal_is_empty_and_private(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "state")
    assert journal.record is None
    assert (tmp_path / "deep" / "state").stat().st_mode & 0o777 == 0o700


def test_a_record_survives(tmp_path: Path) -> None:
    Journal(tmp_path).write(RECORD)
    again = Journal(tmp_path)
    assert again.record == RECORD
    assert again.path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["receiver.json"]  # noqa: PTH208
    assert RECORD.lease == ("lease", "secret", 3)


@pytest.mark.parametrize("step", Step)
def test_every_step_survives(tmp_path: Path, step: Step) -> None:
    journal = Journal(tmp_path)
    journal.write(RECORD)
    journal.step(step)
    assert Journal(tmp_path).record == replace(RECORD, step=step)
    journal.write_generation(step, 9)
    assert Journal(tmp_path).record == replace(RECORD, step=step, generation=9)


def test_a_move_that_is_over_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(RECORD)
    journal.forget()
    assert journal.record is None
    assert Journal(tmp_path).record is None
    journal.forget()


def test_a_write_that_is_cut_short_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.write(RECORD)

    def crash(*_: Any) -> None:
        raise OSError(5, "the power is gone")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="power"):
        journal.step(Step.RUNNING)
    monkeypatch.undo()
    assert journal.record == RECORD
    assert Journal(tmp_path).record == RECORD


def test_the_record_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_rename, real_fsync = Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), real_fsync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (calls.append("rename"), real_rename(self, to))[1])
    Journal(tmp_path).write(RECORD)
    assert calls == ["fsync", "rename", "fsync"]


GOOD = {"step": "opened", "target": "t", "lease_id": "l", "token": "s", "generation": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps(GOOD | {"step": "dancing"}),
        json.dumps(GOOD | {"generation": "many"}),
        json.dumps(GOOD | {"generation": None}),
        json.dumps({name: value for name, value in GOOD.items() if name != "token"}),
    ],
)
def test_a_journal_that_cannot_be_read_is_an_error_with_a_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "receiver.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be read") as caught:
        Journal(tmp_path)
    assert "delete the file" in str(caught.value.remedy)


def test_a_folder_has_one_receiver_at_a_time(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    first.lock()
    first.write(RECORD)
    with pytest.raises(UsageError, match="another receiver"):
        second.lock()
    first.unlock()
    first.unlock()
    second.lock()
    assert second.record == RECORD, "it was read before the first one wrote it"
    second.unlock()
