"""A result as CSV: one row for each interval of each measurement."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from farfault_cli.errors import UsageError

from farfault_client.load.measurement import Measurement


def write_csv(path: Path, steps: Sequence[Measurement]) -> None:
    """Writes the file. Columns: ``step`` (number of the measurement), ``step_rate_per_s`` (empty: closed loop or a
    trace), ``step_holds``, and those of `Measurement.points`.

    Raises:
        UsageError: it cannot be written.
    """
    rows = [
        {"step": number, "step_rate_per_s": step.rate_per_s, "step_holds": not step.broken, **point}
        for number, step in enumerate(steps, 1)
        for point in step.points()
    ]
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
