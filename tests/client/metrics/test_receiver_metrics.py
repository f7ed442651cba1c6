from __future__ import annotations

import math
import time
from pathlib import Path

from farfault_client.engine import Priority, Waiter
from farfault_client.metrics.collector import ReceiverCollector
from farfault_client.receive.fault_times import FaultResult, Trip
from farfault_client.receive.pager import Pager, VcpuKey
from farfault_shim.layout import PageIndex, PageRun
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from receiver_stub import make_receiver


def registry_of(tmp_path: Path) -> tuple[CollectorRegistry, Pager]:
    receiver = make_receiver(tmp_path)
    registry = CollectorRegistry()
    registry.register(ReceiverCollector(receiver))
    assert receiver.pager is not None
    return registry, receiver.pager


def fetched(pager: Pager, seconds: float, page: int = 1) -> Waiter:
    waiter = Waiter(VcpuKey(0), Priority.VCPU, 100.0, (PageIndex(page),))
    trip = Trip(sent_at=100.0, answered_at=100.0 + seconds / 2, server_s=seconds / 4)
    pager.stats.times.resolved(waiter.priority, waiter.since, waiter.since + seconds, trip, FaultResult.FETCHED)
    return waiter


async def test_histogram_counts_every_fault_once_in_each_stage(tmp_path: Path) -> None:
    registry, pager = registry_of(tmp_path)
    for seconds in (15e-6, 15e-6, 100e-6, 20.0):
        fetched(pager, seconds)
    labels = {"class": "vcpu", "result": "fetched"}

    for stage in ("queue", "wire", "server", "install", "total"):
        assert registry.get_sample_value("farfault_fault_seconds_count", {**labels, "stage": stage}) == 4
    total = {**labels, "stage": "total"}
    assert registry.get_sample_value("farfault_fault_seconds_bucket", {**total, "le": "1.6e-05"}) == 2
    assert registry.get_sample_value("farfault_fault_seconds_bucket", {**total, "le": "0.000128"}) == 3
    assert registry.get_sample_value("farfault_fault_seconds_bucket", {**total, "le": "16.7772"}) == 3
    total_s = registry.get_sample_value("farfault_fault_seconds_sum", total)
    assert total_s is not None
    assert math.isclose(total_s, 20.00013, rel_tol=1e-9)


async def test_pages_and_progress_follow_the_engine(tmp_path: Path) -> None:
    registry, pager = registry_of(tmp_path)
    pager.engine.present(PageRun(PageIndex(0), 256))

    assert registry.get_sample_value("farfault_pages", {"state": "installed"}) == 256
    assert registry.get_sample_value("farfault_pages", {"state": "absent"}) == 768
    assert registry.get_sample_value("farfault_progress_ratio") == 0.25
    assert registry.get_sample_value("farfault_guest_memory_bytes") == 1024 * 4096


async def test_who_waits_shows_while_it_waits(tmp_path: Path) -> None:
    registry, pager = registry_of(tmp_path)
    pager.engine.fault(VcpuKey(0), [PageIndex(5)], Priority.VCPU, time.monotonic() - 3.0)
    pager.slow_faults.look(pager.engine.waiting, time.monotonic())

    assert registry.get_sample_value("farfault_waiting_threads") == 1
    longest_s = registry.get_sample_value("farfault_longest_wait_seconds")
    assert longest_s is not None
    assert longest_s >= 3.0
    assert registry.get_sample_value("farfault_slow_faults_total") == 1


async def test_a_slow_fault_is_the_exemplar_of_its_bucket(tmp_path: Path) -> None:
    registry, pager = registry_of(tmp_path)
    waiter = fetched(pager, 1.5)
    pager.slow_faults.ended(waiter, waiter.since + 1.5)

    families = text_string_to_metric_families(generate_latest(registry).decode())

    samples = [sample for family in families for sample in family.samples if sample.exemplar is not None]
    assert [(sample.labels["le"], sample.labels["stage"]) for sample in samples] == [("2.09715", "total")]
    assert samples[0].exemplar is not None
    assert samples[0].exemplar.labels == {"fault_id": "5f5e100-1"}
    assert samples[0].exemplar.value == 1.5


async def test_no_label_names_a_vm_or_a_page(tmp_path: Path) -> None:
    """Cardinality is bounded by lanes, classes, stages, states, and vCPUs."""
    registry, pager = registry_of(tmp_path)
    fetched(pager, 1e-3)

    labels = {label for family in registry.collect() for sample in family.samples for label in sample.labels}

    assert labels <= {
        *("version", "phase", "stage", "class", "result", "le", "source", "vcpu", "kind", "state", "how", "lane")
    }


async def test_names_carry_base_units(tmp_path: Path) -> None:
    registry, _ = registry_of(tmp_path)
    for family in registry.collect():
        assert family.name.startswith("farfault_")
        for unit in ("_ms", "_us", "_kb", "_mb", "_percent"):
            assert unit not in family.name
