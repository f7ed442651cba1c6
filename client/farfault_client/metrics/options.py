"""The options of a receiver that say who may look at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from farfault_client.metrics.slow_faults import LIMIT_DEFAULT_S

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class ObserveOptions:
    """What `observe_options` gave.

    Attributes:
        metrics: ``ADDR:PORT`` of the Prometheus endpoint; None: there is none.
        slow_fault_s: a fault that takes longer is reported.
        record: file for `farfault report`; None: nothing is recorded.
    """

    metrics: str | None = None
    slow_fault_s: float = LIMIT_DEFAULT_S
    record: Path | None = None


def observe_options(function: F) -> F:
    """``--metrics``, ``--slow-fault`` and ``--record``."""
    for option in reversed(
        (
            click.option("--metrics", metavar="ADDR:PORT", help="Serve Prometheus metrics at /metrics there."),
            click.option(
                "--slow-fault",
                type=click.FloatRange(min=0.001),
                default=LIMIT_DEFAULT_S,
                show_default=True,
                metavar="SECONDS",
                help="Report a fault that takes longer, in log, metrics and `top`.",
            ),
            click.option(
                "--record", type=click.Path(path_type=Path), metavar="FILE", help="Keep a record for `farfault report`."
            ),
        )
    ):
        function = option(function)
    return function
