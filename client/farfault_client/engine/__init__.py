"""The fault engine: which page to fetch next, and what an arrived page means. No I/O, no clock."""

from farfault_client.engine.engine import (
    EngineConfig,
    Extent,
    ExtentResult,
    FaultAnswer,
    FaultEngine,
    Fetch,
    Install,
    Waiter,
)
from farfault_client.engine.states import PageInput, PageState, Priority

__all__ = [
    "EngineConfig",
    "Extent",
    "ExtentResult",
    "FaultAnswer",
    "FaultEngine",
    "Fetch",
    "Install",
    "PageInput",
    "PageState",
    "Priority",
    "Waiter",
]
