"""Short ways to make metric families from numbers that exist already."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    """One value."""
    return GaugeMetricFamily(name, text, value=value)


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    """A value for each value of a label."""
    family = GaugeMetricFamily(name, text, labels=(label,))
    for label_value, value in values.items():
        family.add_metric((label_value,), value)
    return family


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    """One counter; `name` ends in ``_total``."""
    return CounterMetricFamily(name, text, value=value)


def counters(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    """A counter for each value of a label; `name` ends in ``_total``."""
    family = CounterMetricFamily(name, text, labels=(label,))
    for label_value, value in values.items():
        family.add_metric((label_value,), value)
    return family
