"""A manager without sessions, for the tests of what stands in front of it.

The real manager behind the same contract is tested in tests/contract; this one only has to be exact about
ids, states and change events.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from postcopyd.errors import Code, MigrationError
from postcopyd.status import Limits, MigrationSpec, MigrationStatus, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class FakeManager:
    """Implements postcopyd.control.api.MigrationManager."""

    def __init__(self) -> None:
        self.specs: list[MigrationSpec] = []
        self.statuses: dict[str, MigrationStatus] = {}
        self.watchers: list[asyncio.Event] = []
        self.watcher_left = asyncio.Event()

    async def prepare(self, spec: MigrationSpec, present: bytes = b"") -> MigrationStatus:
        if spec.id in self.statuses:
            raise MigrationError(Code.MIGRATION_EXISTS, f"migration {spec.id} exists")
        self.specs.append(spec)
        self.statuses[spec.id] = MigrationStatus(
            id=spec.id,
            state=State.PREPARED,
            socket_path=spec.socket_path or f"/run/postcopyd/{spec.id}.sock",
            sources=spec.sources,
            limits=spec.limits,
            epoch=spec.epoch or 0,
        )
        return self.statuses[spec.id]

    def get(self, id: str) -> MigrationStatus:
        if id not in self.statuses:
            raise MigrationError(Code.MIGRATION_UNKNOWN, f"there is no migration {id}")
        return self.statuses[id]

    def list(self) -> list[MigrationStatus]:
        return list(self.statuses.values())

    async def cancel(self, id: str, *, force: bool) -> MigrationStatus:
        if self.get(id).state is State.RUNNING and not force:
            raise MigrationError(Code.MIGRATION_UNFINISHED, f"the guest of {id} still needs pages")
        return self.change(id, state=State.CANCELLED)

    async def set_limits(self, id: str, limits: Limits) -> MigrationStatus:
        self.get(id)
        return self.change(id, limits=limits)

    async def drain(self) -> None:
        for id, status in self.statuses.items():
            if not status.state.is_final:
                self.change(id, state=State.COMPLETE)

    @asynccontextmanager
    async def changes(self, id: str) -> AsyncIterator[asyncio.Event]:
        event = asyncio.Event()
        self.watchers.append(event)
        try:
            yield event
        finally:
            self.watchers.remove(event)
            self.watcher_left.set()

    def change(self, id: str, **fields: object) -> MigrationStatus:
        self.statuses[id] = msgspec.structs.replace(self.statuses[id], **fields)
        for event in self.watchers:
            event.set()
        return self.statuses[id]
