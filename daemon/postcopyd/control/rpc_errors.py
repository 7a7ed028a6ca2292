"""PostcopyError over gRPC: a status for any client, and the stable code in trailing metadata for ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, TypeAlias

import grpc

from postcopyd.errors import CATALOGUE, Code, ConfigError, PostcopyError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    Context: TypeAlias = grpc.aio.ServicerContext[Message, Message]

CODE_KEY = "postcopyd-code"
# HTTP/2 header lists are bounded by the peer, 8 KiB by default in gRPC.
MAX_MESSAGE_CHARS = 1024

_CODES: dict[str, Code] = {str(code): code for code in Code}
_BY_CODE = {
    Code.MIGRATION_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Code.MIGRATION_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Code.MEMORY_SHORT: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_BY_AREA = {
    "config": grpc.StatusCode.INVALID_ARGUMENT,
    "argument": grpc.StatusCode.INVALID_ARGUMENT,
    "handoff": grpc.StatusCode.FAILED_PRECONDITION,
    "migration": grpc.StatusCode.FAILED_PRECONDITION,
    "source": grpc.StatusCode.UNAVAILABLE,
    "image": grpc.StatusCode.UNAVAILABLE,
    "vmm": grpc.StatusCode.ABORTED,
    "control": grpc.StatusCode.UNAVAILABLE,
}


def status_of(code: Code) -> grpc.StatusCode:
    """Return the gRPC status for a code: by itself, by its area, else INTERNAL."""
    return _BY_CODE.get(code) or _BY_AREA.get(code.split(".")[0], grpc.StatusCode.INTERNAL)


async def abort(context: Context, error: PostcopyError) -> NoReturn:
    """End the call with `error`."""
    await context.abort(
        status_of(error.code), error.message[:MAX_MESSAGE_CHARS], ((CODE_KEY, str(error.code)),)
    )


def error_of(error: grpc.aio.AioRpcError, path: str) -> PostcopyError:
    """Return what the daemon at `path` reported, or CONTROL_UNREACHABLE if the call never got to it."""
    details = error.details() or error.code().name
    carried = dict(error.trailing_metadata() or ()).get(CODE_KEY)
    if isinstance(carried, str):
        return rebuilt(carried, details)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return ConfigError(Code.CONTROL_UNREACHABLE, f"no postcopyd answers at {path}: {details}")
    return ConfigError(Code.CONTROL_UNREACHABLE, f"what answers at {path} refused the call: {details}")


def rebuilt(code: str, message: str) -> PostcopyError:
    """Return the error that a daemon names by its code; an unknown code is a newer daemon's."""
    known = _CODES.get(code)
    if known is None:
        return ConfigError(Code.CONTROL_UNREACHABLE, f"{message} (the daemon says {code}, unknown here)")
    # Some classes are made from what went wrong, which did not travel: only code and sentence did.
    kind = CATALOGUE[known].error
    error = kind.__new__(kind)
    PostcopyError.__init__(error, known, message)
    return error
