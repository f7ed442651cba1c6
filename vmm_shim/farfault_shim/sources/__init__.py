"""Fault sources: how a VM's vCPUs miss pages, which of these ways a host has, and which one is used."""

from farfault_shim.sources.choose import AUTO, REAL_SOURCES, Choice, FaultSourceUnavailableError, Verdict, choose
from farfault_shim.sources.facts import Finding, HostFacts, KernelTrial, KvmAccess, Paging
from farfault_shim.sources.kernel_interface import parse_interface

__all__ = [
    "AUTO",
    "REAL_SOURCES",
    "Choice",
    "FaultSourceUnavailableError",
    "Finding",
    "HostFacts",
    "KernelTrial",
    "KvmAccess",
    "Paging",
    "Verdict",
    "choose",
    "parse_interface",
]
