"""What the control service, the health endpoints and the metrics need of the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractAsyncContextManager

    from postcopyd.status import Limits, MigrationSpec, MigrationStatus


class MigrationManager(Protocol):
    """The migrations of one daemon, by id. A status is a snapshot; making one only reads counters."""

    async def prepare(self, spec: MigrationSpec, present: bytes = b"") -> MigrationStatus:
        """Make a migration and listen for its VMM; `present`: a bitmap of the 4 KiB pages that the VMM has already.

        Raises MigrationError, ConfigError, SourceError.
        """

    def get(self, id: str) -> MigrationStatus:
        """Raises MigrationError(MIGRATION_UNKNOWN)."""

    def list(self) -> list[MigrationStatus]: ...

    async def cancel(self, id: str, *, force: bool) -> MigrationStatus:
        """Raises MigrationError(MIGRATION_UNKNOWN, MIGRATION_UNFINISHED)."""

    async def set_limits(self, id: str, limits: Limits) -> MigrationStatus:
        """Raises MigrationError(MIGRATION_UNKNOWN)."""

    async def drain(self) -> None:
        """Take no new migration, lift limits, and return when every guest has its memory."""

    def changes(self, id: str) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event of the caller's own, set whenever the status may have changed; the caller clears it."""
