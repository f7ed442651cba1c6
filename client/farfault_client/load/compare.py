"""Compares a result with an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farfault_cli.errors import UsageError

LATENCIES = ("p50", "p90", "p99", "p999", "max", "mean")
SETUP_KEYS = ("carrier", "backing", "pattern", "arrivals", "vcpus", "connections", "processes", "refetch")


def read_earlier(path: Path) -> dict[str, Any]:
    """The last JSON object of a file that `farfault load --json` wrote.

    Raises:
        UsageError: there is none.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        earlier = json.loads(lines[-1])
        if earlier["latency_us"].keys() and earlier["rate_pages_s"] is not None:
            return dict(earlier)
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no earlier result: {error}", "save one with `farfault load --json > FILE`"
        ) from None
    raise UsageError(f"{path} is no earlier result", "save one with `farfault load --json > FILE`")


def compare(now: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """``ratios`` of now to earlier by figure, None where the earlier one is 0, and ``differences`` of the set-up."""
    pairs = {"rate_pages_s": (now["rate_pages_s"], earlier["rate_pages_s"])}
    for name in LATENCIES:
        pairs[f"latency_us.{name}"] = (now["latency_us"][name], earlier["latency_us"].get(name, 0))
    highest = [(result.get("slo") or {}).get("rate_pages_s") for result in (now, earlier)]
    if None not in highest:
        pairs["slo.rate_pages_s"] = (highest[0], highest[1])
    before, after = earlier.get("setup", {}), now["setup"]
    return {
        "ratios": {name: round(new / old, 4) if old else None for name, (new, old) in pairs.items()},
        "earlier": {name: old for name, (_, old) in pairs.items()},
        "earlier_percentiles": earlier.get("percentiles", []),
        "differences": {
            key: [before.get(key), after.get(key)] for key in SETUP_KEYS if before.get(key) != after.get(key)
        },
    }
