"""Every bound on what one client may ask for and make the server hold.

A stream holds at most `RANGES_WAITING_MAX` ranges and one message more, one batch, and what flow control lets through
(express: `connection.WRITE_BYTES_HIGH`); a lease has at most `streams.STREAMS_PER_LEASE_MAX` streams. A client that
does not read is not read from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from farfault.v1 import pages_pb2 as pb

from farfault_server.memory import PageRegion

REQUEST_BYTES_MAX: Final = 64 << 10
"""One message from a client; a longer one ends its stream."""
BATCH_BYTES: Final = 1 << 20
"""The most that a client asks for at once on a fast way; larger ones make a fault wait longer behind them."""
EXTENTS_PER_BATCH_MAX: Final = 1024  # of at most 32 bytes each
DONE_PER_BATCH_MAX: Final = 1024  # of at most 10 bytes each
"""With `EXTENTS_PER_BATCH_MAX`: a batch is at most 64 KiB longer than its data, as the protocol says."""
READS_PER_BATCH_MAX: Final = 16
"""Blocks of `BATCH_BYTES` that are read for one batch where most of them turn out to be zero."""
RANGES_WAITING_MAX: Final = 16 << 10
"""Ranges of one stream that wait; with more the server stops reading the stream until some are answered."""


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """What `Open` tells a client.

    Attributes:
        max_request_pages: pages in one request.
        max_batch_bytes: page data in one batch; at least one page of the largest page size.
        max_requests_in_flight: requests of one stream that are not answered in full.
        max_digest_pages: pages in one `Digest` call.
    """

    max_request_pages: int = 4096
    max_batch_bytes: int = BATCH_BYTES
    max_requests_in_flight: int = 256
    max_digest_pages: int = 65536

    @classmethod
    def for_regions(cls, regions: Sequence[PageRegion]) -> LaneLimits:
        """Limits under which a batch holds a page of any of these regions."""
        return cls(max_batch_bytes=max(BATCH_BYTES, *(region.page_size_bytes for region in regions)))

    def to_proto(self) -> pb.Limits:
        return pb.Limits(
            max_request_pages=self.max_request_pages,
            max_batch_bytes=self.max_batch_bytes,
            max_requests_in_flight=self.max_requests_in_flight,
            max_digest_pages=self.max_digest_pages,
        )
