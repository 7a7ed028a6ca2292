"""Whether somebody waits for what the event loop has not looked at yet, so that work in the background can give way.

The loop learns of a fault, or of a wanted page that came, only between callbacks; one callback that installs what the
push brought may take longer than the whole rest of a fault's way. Whoever does such work asks here between its pieces.
"""

from __future__ import annotations

import asyncio
import os
import select
from typing import ClassVar
from weakref import WeakKeyDictionary


class Urgency:
    """Descriptors that mean, while they are readable, that somebody waits: fault sources, connections of wanted pages.

    Asking is one system call, however many there are (daemon/native/urgency.c). Each is watched by a duplicate, so that
    a number which was closed and given to another file is never taken for it.

    Attributes:
        fd: an epoll instance that is readable while somebody waits; -1 while nobody is watched.
    """

    _of_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Urgency]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched = 0
        self.fd = -1

    @classmethod
    def of_running_loop(cls) -> Urgency:
        """The one that everything on this loop shares."""
        loop = asyncio.get_running_loop()
        urgency = cls._of_loop.get(loop)
        if urgency is None:
            urgency = cls._of_loop[loop] = cls()
        return urgency

    def watch(self, fd: int) -> int:
        """Return what `forget` takes. `fd` stays the caller's."""
        duplicate = os.dup(fd)
        self._epoll.register(duplicate, select.EPOLLIN)
        self._watched += 1
        self.fd = self._epoll.fileno()
        return duplicate

    def forget(self, watched: int) -> None:
        # First, as the VMM has the same userfaultfd open: closing the duplicate alone would leave it watched.
        self._epoll.unregister(watched)
        os.close(watched)
        self._watched -= 1
        if not self._watched:
            self.fd = -1
