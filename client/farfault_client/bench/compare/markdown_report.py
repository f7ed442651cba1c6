"""The comparison as a section of docs/benchmarks.md. No I/O."""

from __future__ import annotations

from farfault_client.bench.compare.results import Results, headings, rows
from farfault_client.bench.document import machine_text, markdown_table


def markdown_report(results: Results, machine: dict[str, str], command: str) -> str:
    """Machine, command, and a table for each scenario."""
    parts = ["## Whole moves beside QEMU's own post-copy", machine_text(machine, command)]
    for scenario in results.scenarios:
        runs = max(len(results.values(scenario, mode, "faults")) for mode in results.modes(scenario))
        parts.append(f"### {scenario.title}\n\nMedian and range of {runs} runs of each mode, in turn.")
        parts.append(markdown_table(headings(results, scenario), rows(results, scenario)))
    return "\n\n".join(parts)
