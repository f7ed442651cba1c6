"""The fault engine: which page to fetch next, and what an arrived page means. No I/O, no clock."""

from farfault_client.engine.engine import EngineConfig, FaultEngine
from farfault_client.engine.orders import EngineStats, Extent, ExtentResult, FaultAnswer, Fetch, Install
from farfault_client.engine.states import PageInput, PageState, Priority
from farfault_client.engine.waiters import Waiter

__all__ = [
    "EngineConfig",
    "EngineStats",
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
