"""gRPC's status codes, and what they mean when a page source sends them.

A table of our own, so that a daemon on the native transport serves its guests before it has loaded grpc.
Source: grpc.io, "Status codes and their use in gRPC".
"""

from __future__ import annotations

from enum import IntEnum

from ..errors import Code, SourceError


class Status(IntEnum):
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_BY_NUMBER = {status.value: status for status in Status}

_MEANINGS = {
    Status.NOT_FOUND: Code.SOURCE_UNKNOWN_IMAGE,
    Status.FAILED_PRECONDITION: Code.SOURCE_OTHER_EPOCH,
    Status.DEADLINE_EXCEEDED: Code.SOURCE_SILENT,
    Status.UNAVAILABLE: Code.SOURCE_UNREACHABLE,
    Status.CANCELLED: Code.SOURCE_CLOSED,
}


def source_error(target: str, status: int, details: str | None) -> SourceError:
    """The one place where a gRPC status becomes ours. A number that gRPC does not define counts as UNKNOWN."""
    known = _BY_NUMBER.get(status, Status.UNKNOWN)
    meaning = _MEANINGS.get(known, Code.SOURCE_REFUSED)
    return SourceError(meaning, f"page source {target}: {details or known.name}")
