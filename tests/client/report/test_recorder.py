from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

import pytest
from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import UsageError
from farfault_client.engine import Priority
from farfault_client.receive.fault_times import FaultResult
from farfault_client.receive.journal import Record, Step
from farfault_client.receive.receiver import Receiver
from farfault_client.report import recorder as recorder_module
from farfault_client.report.reading import read_record
from farfault_client.report.recorder import INTERVAL_FIRST_S, SAMPLES_PER_INTERVAL, Recorder, settled_map
from farfault_client.report.recording import start_recording
from farfault_shim.layout import PageIndex, PageRun
from receiver_stub import make_receiver


def observe_fault(receiver: Receiver, seconds: float) -> None:
    assert receiver.pager is not None
    receiver.pager.stats.times.resolved(Priority.VCPU, 0.0, seconds, None, FaultResult.JOINED)


async def test_a_sample_has_only_the_new_latencies(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    recorder = Recorder(receiver, 0.0)
    observe_fault(receiver, 1e-3)
    observe_fault(receiver, 1e-3)

    first, second = recorder.sample(0.05), recorder.sample(0.10)

    assert list(first["latency"].values()) == [2]
    assert second["latency"] == {}


async def test_the_interval_doubles_so_that_a_long_move_stays_small(tmp_path: Path) -> None:
    recorder = Recorder(make_receiver(tmp_path, pages=8), 0.0)
    now, samples = 0.0, 0
    while now < 3600:
        now += recorder.interval_s
        recorder.sample(now)
        samples += 1

    assert samples < 7 * SAMPLES_PER_INTERVAL
    assert recorder.interval_s == 32 * INTERVAL_FIRST_S


async def test_events_are_bounded_and_the_last_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "EVENTS_MAX", 3)
    recorder = Recorder(make_receiver(tmp_path), 0.0)

    lines = [line for number in range(10) for line in recorder.event(float(number), "info", str(number))]

    assert [line["text"] for line in lines] == ["0", "1", "further events are not recorded"]


async def test_the_map_is_full_only_where_everything_is_there(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path, pages=1000)
    assert receiver.pager is not None
    receiver.pager.engine.present(PageRun(PageIndex(0), 199))

    assert settled_map(receiver.pager, 10) == "9800000000"


async def test_a_record_can_be_read_back(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    path = tmp_path / "move.jsonl"
    end = await start_recording(receiver, path)
    receiver.progress.phase = rpb.PHASE_POSTCOPY
    receiver._notify()
    await asyncio.sleep(0)
    observe_fault(receiver, 2e-3)
    logging.getLogger("farfault_client.session").warning("demand lane lost: reset")
    receiver.progress.phase = rpb.PHASE_DONE
    await end()

    record = read_record(path)

    assert [event.text for event in record.events] == [
        "phase: postcopy",
        "demand lane lost: reset",
        "phase: done",
    ]
    assert sum(sum(sample.latency.values()) for sample in record.samples) == 1
    assert record.summary["phase"] == "done"
    assert record.header["guest_pages"] == 1024


@pytest.mark.parametrize(("step", "headers"), [(None, 1), (Step.OPENED, 1), (Step.RUNNING, 2)])
async def test_only_a_move_that_is_taken_up_goes_on_in_its_file(
    tmp_path: Path, step: Step | None, headers: int
) -> None:
    path = tmp_path / "move.jsonl"
    for folder in ("first", "second"):
        receiver = make_receiver(tmp_path / folder)
        if step is not None:
            receiver.journal.write(Record(step, "127.0.0.1:1", "lease-1", "secret", 1))
        end = await start_recording(receiver, path)
        await end()

    assert path.read_text().count('"type":"header"') == headers
    assert read_record(path).receivers == headers


async def test_nothing_is_sampled_before_the_move_begins(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.progress.phase = rpb.PHASE_WAITING
    end = await start_recording(receiver, tmp_path / "move.jsonl")
    for _ in range(3):
        receiver._notify()
        await asyncio.sleep(0)
    await end()

    kinds = [json.loads(line)["type"] for line in (tmp_path / "move.jsonl").read_text().splitlines()]
    assert kinds == ["header", "sample", "footer"]


async def test_a_full_disk_ends_the_record_and_not_the_move(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    receiver = make_receiver(tmp_path)
    end = await start_recording(receiver, Path("/dev/full"))
    for _ in range(20):
        logging.getLogger("farfault_client").warning("x" * 10_000)
    await end()

    assert "the record ends here: No space left on device" in caplog.text


async def test_a_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the record"):
        await start_recording(make_receiver(tmp_path), tmp_path / "none" / "move.jsonl")


async def test_a_sample_takes_its_time_from_the_clock(tmp_path: Path) -> None:
    began_at = time.monotonic()
    recorder = Recorder(make_receiver(tmp_path), began_at)

    assert recorder.sample(began_at + 1.25)["t"] == 1.25
