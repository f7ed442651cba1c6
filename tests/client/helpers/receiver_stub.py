"""A receiver without a page server: its pager and counters are real, nothing is connected."""

from __future__ import annotations

from pathlib import Path

from farfault_client.receive.pager import Pager
from farfault_client.receive.receiver import Receiver, ReceiverConfig
from farfault_client.session.connect import session_config
from farfault_client.session.lease import Lease
from farfault_shim.layout import Layout

PAGE_BYTES = 4096


def make_receiver(folder: Path, pages: int = 1024) -> Receiver:
    """Call it on an event loop."""
    config = ReceiverConfig(session_config("127.0.0.1:1"), folder / "attach", None, folder / "state")
    receiver = Receiver(config)
    receiver.session.lease = Lease("lease-1", "secret", 1, Layout([(pages * PAGE_BYTES, PAGE_BYTES)]))
    receiver.pager = Pager(receiver.session)
    return receiver
