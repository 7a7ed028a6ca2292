"""Where log lines go, whatever becomes of it.

A disk that is full, a reader that went away or does not read: none of it may stop or even delay a daemon whose guests
wait. A line that cannot be written at once is dropped, and the next one that can says how many were.
"""

from __future__ import annotations

import io
import os
import socket
import stat
from typing import TextIO


class LogStream(io.TextIOBase):
    """Writes to a descriptor without blocking and without failing. `fd` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._dropped = 0
        self._sock: socket.socket | None = None
        self._fd = fd
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            self._sock = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode):
            # O_NONBLOCK belongs to the open file, which others share: so one of our own.
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, text: str) -> int:
        note = (
            f'{{"event": "log.dropped", "level": "warning", "lines": {self._dropped}}}\n'
            if self._dropped
            else ""
        )
        data = (note + text).encode(errors="replace")
        try:
            written = (
                os.write(self._fd, data)
                if self._sock is None
                else self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            )
        except OSError:
            # Nobody is left to be told, for now.
            written = 0
        self._dropped = 0 if written == len(data) else self._dropped + 1
        return len(text)

    def writable(self) -> bool:
        return True


def log_stream(stream: TextIO) -> TextIO:
    """`stream` itself if people read it or a test caught it; else one that takes the same lines, come what may."""
    try:
        fd = stream.fileno()
    except OSError:
        return stream
    return stream if stream.isatty() else _as_text(LogStream(fd))


def _as_text(stream: LogStream) -> TextIO:
    # typeshed's TextIO and io.TextIOBase are not related.
    return stream  # type: ignore[return-value]
