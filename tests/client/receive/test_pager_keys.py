"""Keys of threads that wait."""

from __future__ import annotations

from farfault_client.receive.pager import PageKey, VcpuKey
from farfault_shim.layout import PageIndex


def test_a_vcpu_is_not_the_page_of_its_number() -> None:
    """They share one dictionary in the engine."""
    assert VcpuKey(3) != PageKey(PageIndex(3))
    assert len({VcpuKey(3), PageKey(PageIndex(3)), VcpuKey(3)}) == 2
