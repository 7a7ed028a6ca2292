"""Receives one hand-off from a connected VMM."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import structlog

from ..errors import Code, HandoffError
from .channel import receive_chunk
from .descriptors import GUEST_MEMFD_KIND, MEMFD_KIND_PREFIX, UFFD_KIND, OwnedFd, kind_of
from .detect import FormatDetector
from .message import BITMAP, GUEST_MEMFD, MEMFD, STATE, UFFD, HandoffMessage, Incomplete, Missing
from .offer import Handoff
from .peer import open_pidfd, peer_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Set

log = structlog.get_logger(__name__)

RECEIVE_TIMEOUT_S = 5.0
SERVED = frozenset({UFFD})


async def receive_handoff(
    sock: socket.socket, *, timeout_s: float = RECEIVE_TIMEOUT_S, served: Set[str] = SERVED
) -> Handoff:
    """Receive, parse and check a VMM's hand-off of any known format.

    Args:
        sock: connected, AF_UNIX, SOCK_STREAM; owned by this from the call on.
        timeout_s: for the whole of it, so that sending slowly gains nothing.
        served: names of descriptors that a framed hand-off may carry; always with `uffd`.
    Returns:
        The hand-off, not acknowledged; the caller owns it.
    Raises:
        HandoffError: with what is wrong. Then, and on cancellation, the socket and every descriptor that
            came are closed.
    """
    descriptors: list[OwnedFd] = []
    try:
        sock.setblocking(False)
        message = await _read_message(sock, descriptors, timeout_s, served)
        return _assemble(message, sock, descriptors)
    except BaseException:
        for descriptor in descriptors:
            descriptor.close()
        sock.close()
        raise


async def _read_message(
    sock: socket.socket, descriptors: list[OwnedFd], timeout_s: float, served: Set[str]
) -> HandoffMessage:
    parser = FormatDetector(served)
    state: Incomplete | HandoffMessage = Incomplete(Missing.FIRST_BYTES)
    try:
        async with asyncio.timeout(timeout_s):
            while isinstance(state, Incomplete):
                chunk = await receive_chunk(sock)
                descriptors += chunk.descriptors
                if not chunk.data:
                    raise _unfinished(
                        state,
                        Code.HANDOFF_TRUNCATED,
                        "the VMM closed its socket before its hand-off was whole",
                    )
                state = parser.feed(chunk.data, len(descriptors))
    except TimeoutError:
        assert isinstance(state, Incomplete)
        raise _unfinished(
            state, Code.HANDOFF_TIMEOUT, f"the VMM connected but did not hand over within {timeout_s:g} s"
        ) from None
    return state


def _unfinished(state: Incomplete, code: Code, message: str) -> HandoffError:
    if state.missing is Missing.DESCRIPTOR:
        return HandoffError(
            Code.HANDOFF_NO_DESCRIPTOR,
            "the VMM's message is whole, but descriptors that belong to it did not come",
        )
    return HandoffError(code, f"{message}: missing are the {state.missing}")


def _assemble(message: HandoffMessage, sock: socket.socket, descriptors: list[OwnedFd]) -> Handoff:
    named = dict(zip(message.descriptor_names, descriptors, strict=True))
    _check_kinds(named)
    for name in message.ignored & named.keys():
        log.info("handoff.descriptor_ignored", name=name, format=message.format_name)
        named.pop(name).close()
    uffd = named.pop(UFFD)
    # A blocking userfaultfd answers poll with POLLERR. Source: userfaultfd(2), ERRORS of poll.
    os.set_blocking(uffd.fileno(), False)
    peer = peer_of(sock)
    return Handoff(message, sock, uffd, named, peer, open_pidfd(sock, peer))


def _check_kinds(named: dict[str, OwnedFd]) -> None:
    kind = kind_of(named[UFFD])
    if kind != UFFD_KIND:
        raise HandoffError(Code.HANDOFF_NOT_UFFD, f"the VMM sent {kind[:80]!a} where its userfaultfd belongs")
    for name in (MEMFD, STATE, BITMAP, GUEST_MEMFD):
        if name not in named:
            continue
        # Writing to any other file could block, or do more than it says.
        kind = kind_of(named[name])
        is_guest_memfd = name == GUEST_MEMFD and kind == GUEST_MEMFD_KIND
        if not (is_guest_memfd or kind.startswith(MEMFD_KIND_PREFIX)):
            raise HandoffError(
                Code.HANDOFF_EXTRA_DESCRIPTORS,
                f"the VMM sent {kind[:80]!a} beside its userfaultfd; only a memfd is known there",
            )
