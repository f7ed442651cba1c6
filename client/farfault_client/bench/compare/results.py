"""From single runs to medians and ratios. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from farfault_client.bench.compare.run import Run
from farfault_client.bench.compare.scenario import Mode, Scenario
from farfault_client.bench.spread import Spread, spread_of


class Metric(NamedTuple):
    """A figure of `Run` as it is shown.

    Attributes:
        name: of the attribute.
        title: of the row, with its unit.
        scale: shown value = figure * scale.
        digits: behind the point.
        ratio: its name among the ratios; empty where the two sides have nothing to compare.
        more_is_better: else less is.
    """

    name: str
    title: str
    scale: float = 1.0
    digits: int = 1
    ratio: str = ""
    more_is_better: bool = False


METRICS: Final = (
    Metric("mean_fault_us", "demand fault, mean (us)", digits=0, ratio="mean_fault"),
    Metric("p50_fault_us", "demand fault, p50 (us)", digits=0),
    Metric("p99_fault_us", "demand fault, p99 (us)", digits=0, ratio="p99_fault"),
    Metric("faults", "demand faults", digits=0),
    Metric("blocked_share", "vCPUs blocked (%)", scale=100, digits=0, ratio="blocked_share"),
    Metric(
        "touched_first_second",
        "pages touched in first second (thousand)",
        scale=1e-3,
        ratio="touched_first_second",
        more_is_better=True,
    ),
    Metric("postcopy_s", "switchover to last page (s)", digits=2, ratio="postcopy_s"),
    Metric("downtime_ms", "downtime (ms)", ratio="downtime"),
    Metric("cpu_s_per_gib", "CPU of both sides (s/GiB)", digits=2, ratio="cpu_s_per_gib"),
    Metric("serve_own_bytes", "serve, memory without guest RAM (MiB)", scale=1 / (1 << 20), digits=0),
    Metric("receive_own_bytes", "receive, memory without guest RAM (MiB)", scale=1 / (1 << 20), digits=0),
    Metric("verification_errors", "verification errors", digits=0),
    Metric("others_cpu_share", "CPU taken by others (%)", scale=100, digits=0),
)


@dataclass(slots=True)
class Results:
    """All runs of a comparison."""

    runs: list[Run] = field(default_factory=list)

    @property
    def scenarios(self) -> list[Scenario]:
        """In the order in which they came."""
        return list(dict.fromkeys(run.scenario for run in self.runs))

    def modes(self, scenario: Scenario) -> list[Mode]:
        """Played in a scenario, in the order of `Mode`."""
        played = {run.mode for run in self.runs if run.scenario == scenario}
        return [mode for mode in Mode if mode in played]

    def values(self, scenario: Scenario, mode: Mode, name: str) -> list[float | None]:
        """A figure of each run."""
        return [getattr(run, name) for run in self.runs if run.scenario == scenario and run.mode is mode]

    def spread(self, scenario: Scenario, mode: Mode, metric: Metric) -> Spread | None:
        """Its median and range; None where no run has it."""
        return spread_of(self.values(scenario, mode, metric.name))

    def ratio(self, scenario: Scenario, mode: Mode, metric: Metric) -> float | None:
        """A farfault mode's median over that of the QEMU mode that is better in this very figure."""
        ours = self.spread(scenario, mode, metric)
        natives = [
            spread.median
            for native in self.modes(scenario)
            if native.is_native and (spread := self.spread(scenario, native, metric)) is not None
        ]
        if ours is None or not natives:
            return None
        best = max(natives) if metric.more_is_better else min(natives)
        return ours.median / best if best else None

    def ratios(self, scenario: Scenario, mode: Mode) -> dict[str, float | None]:
        """All of them, by name."""
        return {metric.ratio: self.ratio(scenario, mode, metric) for metric in METRICS if metric.ratio}

    @property
    def verification_errors(self) -> int:
        return sum(run.verification_errors for run in self.runs)

    def to_json(self, mode: Mode | None = None) -> dict[str, Any]:
        """The object that `--json` prints.

        ``ratios`` are those of the first scenario and of one farfault mode, the same for all figures: the mode that is
        given, else the first one played. ``all_ratios`` has those of every scenario and mode.
        """
        ours = [each for each in Mode if not each.is_native and any(run.mode is each for run in self.runs)]
        chosen = mode or next(iter(ours), None)
        first = self.scenarios[0] if self.runs else None
        return {
            "runs": [run.to_json() for run in self.runs],
            "ratios": self.ratios(first, chosen) if first and chosen else {},
            "ratios_mode": chosen.value if chosen else "",
            "all_ratios": [
                {"scenario": scenario.title, "mode": each.value, **self.ratios(scenario, each)}
                for scenario in self.scenarios
                for each in self.modes(scenario)
                if not each.is_native
            ],
        }


def median_text(spread: Spread | None, metric: Metric) -> str:
    """``median`` as it is shown; a dash for none."""
    return "-" if spread is None else _number(spread.median, metric)


def range_text(spread: Spread | None, metric: Metric) -> str:
    """``low-high`` as it is shown; empty for one run."""
    if spread is None or spread.runs < 2:
        return ""
    return f"{_number(spread.low, metric)}-{_number(spread.high, metric)}"


def ratio_text(ratio: float | None) -> str:
    """A ratio with two digits that matter."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def rows(results: Results, scenario: Scenario) -> list[list[str]]:
    """The table of a scenario: a row a metric; its title, each mode's median and range, each farfault mode's ratio."""
    modes = results.modes(scenario)
    table = []
    for metric in METRICS:
        spreads: Sequence[Spread | None] = [results.spread(scenario, mode, metric) for mode in modes]
        if all(spread is None for spread in spreads):
            continue
        cells = [metric.title]
        for spread in spreads:
            cells.append(f"{median_text(spread, metric)} {range_text(spread, metric)}".strip())
        ours = [mode for mode in modes if not mode.is_native]
        cells += [ratio_text(results.ratio(scenario, mode, metric)) if metric.ratio else "" for mode in ours]
        table.append(cells)
    return table


def headings(results: Results, scenario: Scenario) -> list[str]:
    """The column headings that belong to `rows`."""
    modes = results.modes(scenario)
    ours = [mode.value.removeprefix("farfault-") for mode in modes if not mode.is_native]
    return ["", *(mode.value for mode in modes), *(f"{name} / best QEMU" for name in ours)]


def _number(value: float, metric: Metric) -> str:
    return f"{value * metric.scale:,.{metric.digits}f}"
