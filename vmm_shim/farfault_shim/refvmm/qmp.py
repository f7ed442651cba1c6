"""The server's side of QMP's framing and messages. No I/O.

send(greeting())
reader = RequestReader()
for request in reader.received(data):   # raises nothing: what is no request has its `error` set
    send(reply(request, result))        # or failure(request, description)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from farfault_cli import __version__

BUFFER_BYTES_MAX: Final = 1 << 20
NAME: Final = "farfault-reference"


@dataclass(frozen=True, slots=True)
class Request:
    """A command of the client.

    Attributes:
        command: its name; empty where the message is none, and `error` says why.
        arguments: by name.
        request_id: to repeat in the reply; None: there was none.
    """

    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    request_id: Any = None
    error: str = ""


def version() -> dict[str, Any]:
    """The answer to ``query-version``, also part of the greeting."""
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    return {NAME: {"major": major, "minor": minor, "micro": micro}, "package": ""}


def greeting() -> bytes:
    """What the server says first."""
    return _line({"QMP": {"version": version(), "capabilities": []}})


def reply(request: Request, result: object) -> bytes:
    """Success."""
    return _line({"return": result} | _id(request))


def failure(request: Request, description: str, error_class: str = "GenericError") -> bytes:
    """Failure."""
    return _line({"error": {"class": error_class, "desc": description}} | _id(request))


def event(name: str, data: Mapping[str, Any] | None, now_unix_s: float | None = None) -> bytes:
    """An event; the clock's time where none is given."""
    now_us = int((time.time() if now_unix_s is None else now_unix_s) * 1e6)
    message: dict[str, Any] = {
        "event": name,
        "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000},
    }
    return _line(message | ({"data": data} if data is not None else {}))


class RequestReader:
    """Cuts the client's bytes into requests: JSON objects with any white space between them."""

    def __init__(self) -> None:
        self._buffer = b""

    def received(self, data: bytes) -> list[Request]:
        """The requests that are complete now. A line that is no JSON object becomes a request with an error."""
        self._buffer += data
        requests = []
        while b"\n" in self._buffer or b"}" in self._buffer:
            self._buffer = self._buffer.lstrip()
            end = self._end_of_object()
            if end:
                requests.append(_parse(self._buffer[:end]))
                self._buffer = self._buffer[end:]
                continue
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                break
            if line.strip():
                requests.append(Request("", error="not a JSON object in one line"))
            self._buffer = rest
        if len(self._buffer) > BUFFER_BYTES_MAX:
            self._buffer = b""
            requests.append(Request("", error=f"a message of more than {BUFFER_BYTES_MAX} bytes"))
        return requests

    def _end_of_object(self) -> int:
        """Length of the object at the front of the buffer; 0: it is not whole."""
        depth, in_string, escaped = 0, False, False
        for index, byte in enumerate(self._buffer):
            if in_string:
                in_string, escaped = escaped or byte != 0x22, byte == 0x5C and not escaped
            elif byte == 0x22:
                in_string = True
            elif byte in b"{":
                depth += 1
            elif byte in b"}":
                depth -= 1
            if depth <= 0 and not in_string:
                return index + 1 if byte in b"}" else 0
        return 0


def _parse(data: bytes) -> Request:
    try:
        message = json.loads(data)
        command, arguments = message["execute"], message.get("arguments", {})
    except (ValueError, KeyError) as error:
        return Request("", error=f"not a QMP command: {error!r}")
    request_id = message.get("id")
    if not isinstance(command, str) or not isinstance(arguments, dict):
        return Request("", request_id=request_id, error="execute is a string, arguments an object")
    return Request(command, arguments, request_id)


def _id(request: Request) -> dict[str, Any]:
    return {} if request.request_id is None else {"id": request.request_id}


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
