"""What a page stream's TCP socket is told, for either end."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    import asyncio

log = structlog.get_logger(__name__)

LOOPBACK_CONGESTION = b"reno"


def tune(transport: asyncio.Transport) -> None:
    """Take pacing off a connection that stays on this host: nothing there can be congested.

    A host whose default is BBR paces loopback too, which costs a third of the push's rate and CPU time
    (docs/performance.md). Elsewhere the host's choice stands. Source: tcp(7), TCP_CONGESTION.
    """
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or not ipaddress.ip_address(peer[0]).is_loopback:
        return
    try:
        transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP, socket.TCP_CONGESTION, LOOPBACK_CONGESTION
        )
    except OSError as error:
        log.debug("tcp.congestion_unchanged", errno=errno.errorcode.get(error.errno or 0))
