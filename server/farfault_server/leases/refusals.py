"""A refusal as the client sees it: a gRPC status code, the problem, and the remedy."""

from __future__ import annotations

from enum import IntEnum

from farfault_cli.errors import FarfaultError


class Code(IntEnum):
    """The gRPC status codes that are used, by their numbers (the lease core knows no gRPC)."""

    INVALID_ARGUMENT = 3
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class RefusedError(FarfaultError):
    """A call is refused. ``str()`` is the message on the wire: problem, then ``remedy: ...`` on a line of its own."""

    def __init__(self, code: Code, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.code = code
