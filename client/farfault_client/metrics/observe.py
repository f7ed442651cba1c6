"""Everything that looks at a running receiver: the watchdog of faults, the metrics endpoint, the record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from farfault_client.metrics.options import ObserveOptions
from farfault_client.metrics.slow_faults import LOOKS_PER_LIMIT
from farfault_client.options import split_target
from farfault_client.receive.pager import Pager
from farfault_client.receive.receiver import Receiver


async def observe(receiver: Receiver, options: ObserveOptions) -> Callable[[], Awaitable[None]]:
    """Begins to look at a started receiver. Returns how to end that.

    Raises:
        UsageError: an address cannot be listened on, or a file cannot be written.
    """
    assert receiver.pager is not None, "start the receiver first"
    receiver.pager.slow_faults.limit_s = options.slow_fault_s
    async with AsyncExitStack() as stack:
        watchdog = asyncio.get_running_loop().create_task(_watch(receiver.pager), name="slow faults")
        stack.callback(watchdog.cancel)
        if options.metrics is not None:
            stack.push_async_callback(await _serve(receiver, options.metrics))
        if options.record is not None:
            from farfault_client.report.recording import start_recording

            stack.push_async_callback(await start_recording(receiver, options.record))
        return stack.pop_all().aclose
    raise AssertionError("the stack does not swallow errors")


async def _watch(pager: Pager) -> None:
    slow = pager.slow_faults
    while True:
        await asyncio.sleep(slow.limit_s / LOOKS_PER_LIMIT)
        slow.look(pager.engine.waiting, time.monotonic())


async def _serve(receiver: Receiver, address: str) -> Callable[[], Awaitable[None]]:
    from prometheus_client import CollectorRegistry, ProcessCollector

    from farfault_client.metrics.collector import ReceiverCollector
    from farfault_client.metrics.http import serve_metrics

    registry = CollectorRegistry()
    registry.register(ReceiverCollector(receiver))
    ProcessCollector(registry=registry)
    _, end = await serve_metrics(*split_target(address), registry)
    return end
