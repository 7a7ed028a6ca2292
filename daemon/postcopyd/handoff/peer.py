"""The process at the other end of a UNIX socket."""

from __future__ import annotations

import errno
import os
import socket
import struct

import msgspec
import structlog

from .descriptors import OwnedFd

log = structlog.get_logger(__name__)

SO_PEERPIDFD = 77
"""Source: include/uapi/asm-generic/socket.h, Linux 6.5; Python 3.11 has no name for it."""

_UCRED = struct.Struct("=iII")


class Peer(msgspec.Struct, frozen=True):
    """Who connected, as the kernel says. pid is 0 when the process is not visible in this PID name space."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials at the time of connect(2). Source: unix(7), SO_PEERCRED."""
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def open_pidfd(sock: socket.socket, peer: Peer) -> OwnedFd | None:
    """Return a pidfd of the peer, or None: it ended already, or the kernel cannot say which process it is.

    SO_PEERPIDFD names the very process that connected. Before Linux 6.5 there is only its number, which
    may belong to another process by now; a VMM that just handed its memory over is rarely gone, so
    that is taken.
    """
    try:
        return OwnedFd(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            log.info("peer.no_pidfd", pid=peer.pid, errno=errno.errorcode.get(error.errno or 0))
            return None
    try:
        return OwnedFd(os.pidfd_open(peer.pid))
    except OSError as error:
        log.info("peer.no_pidfd", pid=peer.pid, errno=errno.errorcode.get(error.errno or 0))
        return None
