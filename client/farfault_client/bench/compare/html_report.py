"""The comparison as one HTML page with plots. No I/O."""

from __future__ import annotations

from html import escape

from farfault_client.bench import svg
from farfault_client.bench.compare.results import METRICS, Metric, Results, headings, median_text, rows
from farfault_client.bench.compare.scenario import Scenario


def html_report(results: Results, machine: dict[str, str], command: str) -> str:
    """A page that needs nothing else: a table and a plot for each figure of each scenario."""
    parts = [svg.machine_list(machine, command)]
    for scenario in results.scenarios:
        parts.append(f"<h2>{escape(scenario.title)}</h2>")
        parts += [_plot(results, scenario, metric) for metric in METRICS if metric.ratio]
        parts.append(svg.html_table(headings(results, scenario), rows(results, scenario)))
    return svg.page("Farfault beside QEMU's own post-copy", parts)


def _plot(results: Results, scenario: Scenario, metric: Metric) -> str:
    items = []
    for mode in results.modes(scenario):
        spread = results.spread(scenario, mode, metric)
        values = [value * metric.scale for value in results.values(scenario, mode, metric.name) if value is not None]
        median = spread.median * metric.scale if spread else 0.0
        items.append(svg.Bar(mode.value, values, median, median_text(spread, metric)))
    better = "more" if metric.more_is_better else "less"
    return svg.bars(f"{metric.title}; {better} is better", items)
