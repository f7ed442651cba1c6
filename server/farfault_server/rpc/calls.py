"""What every handler needs: credentials from metadata, and refusals as gRPC statuses."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Final, NoReturn, TypeVar

import grpc
import grpc.aio
from farfault_cli.errors import FarfaultError
from google.protobuf.message import DecodeError, Message

from farfault_server.leases.refusals import Code, RefusedError

logger = logging.getLogger(__name__)

LEASE_METADATA: Final = "farfault-lease"
AUTHORIZATION_METADATA: Final = "authorization"
BEARER: Final = "Bearer "

STATUS_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
Request = TypeVar("Request", bound=Message)


def credentials(context: Context) -> tuple[str | None, str | None]:
    """``(lease id, token)`` of a call; None for what it does not carry."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    authorization = metadata.get(AUTHORIZATION_METADATA, "")
    token = authorization.removeprefix(BEARER) if authorization.startswith(BEARER) else None
    return metadata.get(LEASE_METADATA), token


async def abort(context: Context, error: FarfaultError) -> NoReturn:
    """Ends a call with the status and message of an error."""
    code = STATUS_CODES[error.code] if isinstance(error, RefusedError) else grpc.StatusCode.INTERNAL
    await context.abort(code, str(error))
    raise AssertionError("abort raises")


def parse(request_type: type[Request], message: bytes) -> Request:
    """The request of a unary call. Left to gRPC, nonsense would be UNKNOWN and a traceback in the log.

    Raises:
        RefusedError: INVALID_ARGUMENT, it is no such message.
    """
    try:
        return request_type.FromString(message)
    except DecodeError:
        raise RefusedError(Code.INVALID_ARGUMENT, f"the message is no {request_type.__name__}") from None


def with_refusals(
    handler: Callable[[Any, Any, Context], Awaitable[T]],
) -> Callable[[Any, Any, Context], Awaitable[T]]:
    """A handler method whose FarfaultErrors become statuses."""

    @wraps(handler)
    async def handle(self: Any, request: Any, context: Context) -> T:
        try:
            return await handler(self, request, context)
        except FarfaultError as error:
            logger.info("refused %s to %s: %s", handler.__name__, context.peer(), error.problem)
            await abort(context, error)

    return handle
