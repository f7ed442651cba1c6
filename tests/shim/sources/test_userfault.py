"""Userfaultfd as this process may use it."""

from __future__ import annotations

import os

import pytest
from farfault_shim.sources.userfault import FEATURES, find_userfaultfd
from farfault_shim.uffd import abi

FACTS = find_userfaultfd()


@pytest.mark.skipif(not FACTS.permitted, reason="userfaultfd is not permitted")
def test_features_and_both_ways() -> None:
    assert FACTS.usable.ok
    assert FACTS.sigbus.ok
    assert FACTS.features == frozenset(FEATURES)


@pytest.mark.skipif(not os.access(abi.DEVICE, os.R_OK | os.W_OK), reason=f"{abi.DEVICE} cannot be opened")
def test_inherited_device() -> None:
    device = os.open(abi.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        facts = find_userfaultfd(device)
        assert facts.device.ok
        assert facts.device.detail == f"descriptor {device}"
    finally:
        os.close(device)


def test_a_descriptor_of_something_else_is_no_device() -> None:
    with open(os.devnull) as null:  # noqa: PTH123
        facts = find_userfaultfd(null.fileno())
    assert not facts.device.ok
    assert facts.device.remedy


def test_lacking_features_are_named() -> None:
    facts = FACTS._replace(features=frozenset({"THREAD_ID"}))
    if facts.permitted:
        assert facts.usable.detail == "the kernel's userfaultfd lacks EVENT_REMOVE, MISSING_SHMEM"
    assert not facts.sigbus.ok
