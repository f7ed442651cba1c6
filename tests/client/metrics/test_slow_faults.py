from __future__ import annotations

import logging

import pytest
from farfault_client.engine import Priority, Waiter
from farfault_client.metrics.slow_faults import SlowFaults, fault_id_of
from farfault_shim.layout import PageIndex


def waiter(key: object, since: float, page: int = 7) -> Waiter:
    return Waiter(key, Priority.VCPU, since, (PageIndex(page),))


def test_a_wait_is_reported_once_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowFaults(limit_s=1.0)
    waits = waiter("vCPU 0", 10.0)

    with caplog.at_level(logging.WARNING):
        for now in (10.5, 11.0, 11.25, 11.5, 12.0):
            slow.look([waits], now)

    assert slow.count == 1
    assert [record.__dict__["fault_id"] for record in caplog.records] == [fault_id_of(waits)]
    assert "vCPU 0 waits 1.250 s for page 0x7" in caplog.text


def test_a_reported_wait_is_not_counted_again_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowFaults(limit_s=1.0)
    waits = waiter("vCPU 0", 10.0)
    slow.look([waits], 11.5)

    slow.ended(waits, 13.0)

    assert slow.count == 1
    assert slow.last[Priority.VCPU] == (fault_id_of(waits), Priority.VCPU, 3.0)
    assert "waited 3.000 s" in caplog.text


def test_a_wait_that_ended_between_two_looks_is_counted() -> None:
    slow = SlowFaults(limit_s=1.0)

    slow.ended(waiter("vCPU 0", 10.0), 11.1)
    slow.look([], 11.2)

    assert slow.count == 1


def test_two_waits_of_one_thread_are_two_faults() -> None:
    slow = SlowFaults(limit_s=1.0)
    for since in (10.0, 20.0):
        slow.look([waiter("vCPU 0", since)], since + 2.0)
    slow.look([waiter("vCPU 0", 30.0)], 30.5)

    assert slow.count == 2


def test_the_id_names_time_and_page() -> None:
    assert fault_id_of(waiter("vCPU 0", 0.000255, page=0x1234)) == "ff-1234"
