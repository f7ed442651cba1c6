"""Serves metrics on the event loop that they belong to: no lock, no thread that competes with faults for the GIL."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from farfault_cli.errors import UsageError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

logger = logging.getLogger(__name__)

REQUEST_BYTES_MAX: Final = 8192
REQUEST_TIMEOUT_S: Final = 5.0
CONNECTIONS_MAX: Final = 16


async def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> tuple[int, Callable[[], Awaitable[None]]]:
    """Answers ``GET /metrics``, and ``GET /healthz`` with ``ok``. One request a connection.

    Args:
        host, port: where to listen; port 0: any.
        registry: what to show. Its collectors are called on this event loop.

    Returns:
        The port, and how to end it.

    Raises:
        UsageError: the address cannot be listened on.
    """
    endpoint = _Endpoint(registry)
    try:
        server = await asyncio.start_server(endpoint.handle, host, port, limit=REQUEST_BYTES_MAX)
    except OSError as error:
        raise UsageError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}", "name a free port with --metrics"
        ) from error

    async def end() -> None:
        server.close()
        await server.wait_closed()

    bound_port: int = server.sockets[0].getsockname()[1]
    logger.info("metrics at http://%s:%d/metrics", host, bound_port)
    return bound_port, end


class _Endpoint:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._open = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > CONNECTIONS_MAX:
                return
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a client that does not speak HTTP, or has gone
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        line, *headers = request.decode("latin-1").split("\r\n")
        method, _, rest = line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method != "GET":
            return _response("405 Method Not Allowed", b"only GET\n")
        if path == "/healthz":
            return _response("200 OK", b"ok\n")
        if path != "/metrics":
            return _response("404 Not Found", b"see /metrics\n")
        accepted = next((value for name, value in map(_split, headers) if name == "accept"), "")
        encoder, content_type = choose_encoder(accepted)
        return _response("200 OK", encoder(self._registry), content_type)


def _split(header: str) -> tuple[str, str]:
    name, _, value = header.partition(":")
    return name.strip().lower(), value.strip()


def _response(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
