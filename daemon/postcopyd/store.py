"""Where a session's descriptors lie while no process of ours lives: the service manager's descriptor store.

The last close of a userfaultfd makes absent pages read as zero, so a second holder is what makes a crash harmless.
systemd keeps what FDSTORE=1 gives it and passes it to the next start; `postcopyd supervise` speaks the same protocol.
Source: sd_notify(3), systemd.service(5) FileDescriptorStoreMax=.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from .crash import crash_point
from .errors import Code, HandoffError
from .handoff.descriptors import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .sdnotify import Notifier

log = structlog.get_logger(__name__)

_SEPARATOR = "@"


def stored_name(kind: str, id: str) -> str:
    """FDNAME of a descriptor: `uffd@vm1`."""
    return f"{kind}{_SEPARATOR}{id}"


class DescriptorStore:
    """The store of this process's service manager; without one nothing is kept and `is_durable` is False.

    Args:
        capacity: FileDescriptorStoreMax. The manager drops silently what exceeds it, so we count.
    """

    def __init__(self, notifier: Notifier, capacity: int) -> None:
        self._notifier = notifier
        self._capacity = capacity
        self._held: set[str] = set()
        self.is_durable = notifier.enabled and capacity > 0

    @property
    def held(self) -> int:
        return len(self._held)

    def note_held(self, names: Iterable[str]) -> None:
        """What the manager passed at the start, it still holds."""
        self._held.update(names)

    async def put(self, id: str, fds: Mapping[str, int]) -> None:
        """Return when the manager holds `fds` (by kind) for session `id`.

        Raises:
            HandoffError: STORE_FULL: they would not fit. KernelError: the manager does not answer.
        """
        if not self.is_durable:
            return
        fresh = {stored_name(kind, id): fd for kind, fd in fds.items()}
        if len(self._held | fresh.keys()) > self._capacity:
            raise HandoffError(
                Code.STORE_FULL,
                f"the service manager keeps {self._capacity} descriptors and {len(self._held)} are in use; "
                "raise FileDescriptorStoreMax and store_max",
            )
        self._held.update(fresh)
        for name, fd in fresh.items():
            await self._notifier.store(name, [fd])
            crash_point("store.one_sent")
        await self._notifier.barrier()
        crash_point("store.held")

    async def remove(self, id: str, kinds: Iterable[str]) -> None:
        """Have the manager close what it holds for session `id`. Raises KernelError."""
        for kind in kinds:
            name = stored_name(kind, id)
            if name in self._held:
                await self._notifier.remove(name)
                self._held.discard(name)
                crash_point("store.one_removed")


def offered_capacity(environ: Mapping[str, str] = os.environ) -> int:
    """What the manager says it keeps, 0 if it does not say. Source: systemd.exec(5), $FDSTORE, systemd 254."""
    text = environ.get("FDSTORE", "")
    return int(text) if text.isdecimal() else 0


def group(passed: Iterable[tuple[int, str]]) -> tuple[dict[str, dict[str, OwnedFd]], dict[str, OwnedFd]]:
    """Sort what the manager passed: (by session, by kind) and (by name) for what belongs to no session.

    Of two descriptors of one name the first, which is the newest, counts; the other is a leftover and is closed.
    """
    sessions: dict[str, dict[str, OwnedFd]] = {}
    others: dict[str, OwnedFd] = {}
    for fd, name in passed:
        kind, separator, id = name.partition(_SEPARATOR)
        place, key = (sessions.setdefault(id, {}), kind) if separator else (others, name)
        if key in place:
            log.warning("store.duplicate", name=name)
            OwnedFd(fd).close()
        else:
            place[key] = OwnedFd(fd)
    return sessions, others
