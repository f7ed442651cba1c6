"""What parent and child say to each other: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from farfault_server.memory import PageRegion
from farfault_server.memory.file_region import FileRegion
from farfault_server.memory.opening import region_of_descriptor
from farfault_server.memory.synthetic_region import SyntheticRegion

LINE_BYTES_MAX: Final = 4 << 20
"""Far more than a record with the largest number of leases takes."""
REPORT_INTERVAL_S: Final = 0.5
"""How often the child tells its counters."""

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def regions_to_json(regions: Sequence[PageRegion]) -> list[Message]:
    """Regions for a child that inherits their descriptors."""
    return [_region_to_json(region) for region in regions]


def _region_to_json(region: PageRegion) -> Message:
    if isinstance(region, FileRegion):
        return {
            "descriptor": region.descriptor,
            "name": region.name,
            "backing": region.backing,
            "page_size_bytes": region.page_size_bytes,
        }
    assert isinstance(region, SyntheticRegion), f"no way to share {type(region).__name__} with another process"
    return {"seed": region.seed, "index": region.index, "size_bytes": region.size_bytes}


def regions_from_json(described: list[Message]) -> list[PageRegion]:
    """The same regions in the child."""
    return [region_of_descriptor(**item) if "descriptor" in item else SyntheticRegion(**item) for item in described]


def descriptors(regions: Sequence[PageRegion]) -> list[int]:
    """To be inherited by the child."""
    return [region.descriptor for region in regions if isinstance(region, FileRegion)]
