"""Finds out what a host can do: by trying, never by versions."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from farfault_shim.annotate.discover import discover
from farfault_shim.kvm import abi
from farfault_shim.kvm.nowait import NowaitInterface
from farfault_shim.sources.facts import Finding, HostFacts, KvmAccess, Paging
from farfault_shim.sources.trial import run_trials
from farfault_shim.sources.userfault import UserfaultfdFacts, find_userfaultfd

PAGING_PARAMETERS: Final = ("kvm_intel/parameters/ept", "kvm_amd/parameters/npt")
"""Below /sys/module: whether KVM uses two-dimensional paging."""


def find_kvm(device: str = abi.DEVICE) -> tuple[KvmAccess, Finding]:
    """Whether this process can use KVM."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return KvmAccess.ABSENT, Finding(
            False, f"{device} is missing", "enable virtualisation in the firmware, then modprobe kvm_intel or kvm_amd"
        )
    except OSError as error:
        remedy = f"run as root, or: usermod -aG kvm USER, and see that {device} belongs to that group"
        return KvmAccess.FORBIDDEN, Finding(False, f"{device}: {error.strerror}", remedy)
    try:
        version = fcntl.ioctl(descriptor, abi.GET_API_VERSION)
    except OSError as error:
        return KvmAccess.ABSENT, Finding(False, f"{device} is not KVM: {error.strerror}")
    finally:
        os.close(descriptor)
    if version != abi.API_VERSION:
        return KvmAccess.ABSENT, Finding(False, f"{device} speaks API version {version}, not {abi.API_VERSION}")
    return KvmAccess.USABLE, Finding(True, f"{device}, API version {version}")


def find_paging(modules: Path = Path("/sys/module")) -> Paging:
    """What the module parameters of KVM say; UNKNOWN where they say nothing."""
    for parameter in PAGING_PARAMETERS:
        try:
            value = (modules / parameter).read_text().strip()
        except OSError:
            continue
        return Paging.TWO_DIMENSIONAL if value in ("Y", "1") else Paging.SHADOW
    return Paging.UNKNOWN


def find_host_facts(
    interfaces: Sequence[NowaitInterface] = (),
    userfaultfd: UserfaultfdFacts | None = None,
    userfaultfd_device_fd: int | None = None,
) -> HostFacts:
    """Everything that the choice of a fault source depends on.

    Args:
        interfaces: kernel NOWAIT interfaces to try on a scratch VM, the preferred one first.
        userfaultfd: what `find_userfaultfd` found; None: it is asked.
        userfaultfd_device_fd: an inherited descriptor of ``/dev/userfaultfd`` that scratch VMs use.
    """
    kvm, kvm_finding = find_kvm()
    facts = userfaultfd or find_userfaultfd(userfaultfd_device_fd)
    annotators = discover()
    paging = find_paging()
    if kvm is not KvmAccess.USABLE:
        return HostFacts(kvm, kvm_finding, paging, facts.usable, facts.sigbus, annotators)
    trials = run_trials(interfaces, annotators, userfaultfd_device_fd)
    if paging is Paging.UNKNOWN:
        paging = trials.paging
    return HostFacts(
        kvm,
        kvm_finding,
        paging,
        facts.usable,
        facts.sigbus,
        annotators,
        trials.stock_exit(paging),
        trials.kernel,
    )
