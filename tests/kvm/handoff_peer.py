"""The daemon's end of a hand-off, in the test: takes one connection and reads what came."""

from __future__ import annotations

import array
import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class HandoffPeer:
    """Listens at `path` and takes one hand-off in a thread.

    Args:
        answer: sent after the message came; empty closes the connection instead.

    Attributes:
        message: all bytes before the answer.
        fds: descriptors that came with it; closed at exit.
        connection: open until exit, where the answer was not empty.
    """

    def __init__(self, path: Path, answer: bytes = b"\x00") -> None:
        self.message = b""
        self.fds: list[int] = []
        self.connection: socket.socket | None = None
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(30)
        self._thread = threading.Thread(target=self._take, name="handoff-peer")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._listener.close()
        if self.connection is not None:
            self.connection.close()
        for fd in self.fds:
            os.close(fd)

    def wait(self) -> None:
        """Return when the hand-off was taken."""
        self._thread.join()

    def _take(self) -> None:
        connection, _ = self._listener.accept()
        self.message, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(64))
        for _level, _kind, data in ancillary:
            fds = array.array("i")
            fds.frombytes(data)
            self.fds.extend(fds)
        if self._answer:
            # A VMM whose format has no answer may be gone already.
            with suppress(BrokenPipeError):
                connection.sendall(self._answer)
            self.connection = connection
        else:
            connection.close()
