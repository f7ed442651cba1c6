from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from farfault_cli.errors import UsageError
from farfault_client.metrics import http as metrics_http
from farfault_client.metrics.collector import ReceiverCollector
from farfault_client.metrics.http import serve_metrics
from prometheus_client import CollectorRegistry
from receiver_stub import make_receiver


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    registry = CollectorRegistry()
    registry.register(ReceiverCollector(make_receiver(tmp_path)))
    bound_port, end = await serve_metrics("127.0.0.1", 0, registry)
    yield bound_port
    await end()


async def ask(port: int, request: str) -> tuple[str, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return head, body


async def test_text_for_whoever_asks(port: int) -> None:
    head, body = await ask(port, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

    assert head.startswith("HTTP/1.1 200 OK")
    assert "text/plain" in head
    assert f"Content-Length: {len(body.encode())}" in head
    assert "farfault_progress_ratio 0.0" in body


async def test_openmetrics_where_it_is_accepted(port: int) -> None:
    request = "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n"

    head, body = await ask(port, request)

    assert "application/openmetrics-text" in head
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /healthz HTTP/1.1", "200"), ("GET / HTTP/1.1", "404"), ("POST /metrics HTTP/1.1", "405")],
)
async def test_other_requests(port: int, request_line: str, status: str) -> None:
    head, _ = await ask(port, f"{request_line}\r\n\r\n")

    assert head.startswith(f"HTTP/1.1 {status} ")


async def test_nonsense_ends_its_own_connection_only(port: int) -> None:
    assert await ask(port, "x" * (2 * metrics_http.REQUEST_BYTES_MAX)) == ("", "")
    assert (await ask(port, "GET /healthz HTTP/1.1\r\n\r\n"))[1] == "ok\n"


async def test_a_silent_client_is_dropped(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "REQUEST_TIMEOUT_S", 0.01)

    assert await ask(port, "GET /metrics") == ("", "")


async def test_a_taken_port_is_a_usage_error(port: int) -> None:
    with pytest.raises(UsageError, match="cannot serve metrics"):
        await serve_metrics("127.0.0.1", port, CollectorRegistry())
