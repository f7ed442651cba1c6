"""What a worker waits for before it measures."""

from __future__ import annotations

from typing import Final

SETTLE_S: Final = 0.5
"""From the moment when everything is ready: helper processes that have just started still import on the processors
that are about to be measured. Half of a short case went into that."""
