"""The bulk process between two answers of a burst."""

from __future__ import annotations

import asyncio
import socket

from farfault.codec import DecodedBatch
from farfault.v1 import pages_pb2 as pb
from farfault_client.bulk.messages import REQUEST_HEAD, MessageType
from farfault_client.bulk.process import BulkProcess
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.bulk.stream import StreamAnswer
from farfault_client.session.answers import Answer
from farfault_client.session.lease import Lease
from farfault_shim.layout import Layout


class Stream:
    """Remembers the requests that went out."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.sent.append(message)


def test_requests_go_out_between_the_answers_of_a_burst() -> None:
    async def play() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setblocking(False)
        shared = SharedPages(16)
        process = BulkProcess(theirs, shared, 1 << 16)
        process._lease = Lease("lease", "token", 3, Layout([(16 * 4096, 4096)]))
        stream = process._stream = Stream()  # type: ignore[assignment]
        came = StreamAnswer(DecodedBatch(pb.PageBatch(), b"", 0, 0), Answer([], b"", 0, (1,), (), 0, 0), 10)
        for number in (2, 3):
            ours.send(bytes([MessageType.REQUEST]) + REQUEST_HEAD.pack(3) + bytes([number]))
            process._stream_answered(came)
            assert stream.sent[-1] == bytes([number]), "it does not wait for the event loop to come round"
            assert ours.recv(1 << 16)[0] == MessageType.PLACED
        ours.close()
        process._stream_answered(came)
        assert process._gone.is_set()
        theirs.close()
        shared.close()

    asyncio.run(play())
