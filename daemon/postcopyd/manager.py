"""The migrations of one daemon, by id: made by `prepare`, met by their VMM on a socket, forgotten when long over."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from .errors import Code, HandoffError, InvariantError, MigrationError, PostcopyError, SourceError
from .handoff.socket import HandoffListener
from .session import Session
from .status import Limits, MigrationSpec, MigrationStatus, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .config import DaemonConfig
    from .handoff.offer import Handoff
    from .transport import ImageInfo, TransportFactory

log = structlog.get_logger(__name__)

FINISHED_KEPT = 64
"""So many ended migrations can still be looked at; the oldest are forgotten."""


@dataclass
class Entry:
    """A session with its socket and those who watch it."""

    session: Session
    socket_path: str
    listener: HandoffListener | None = None
    listening: asyncio.Task[None] | None = None
    serving: asyncio.Task[None] | None = None
    watchers: set[asyncio.Event] = field(default_factory=set)

    def status(self) -> MigrationStatus:
        return self.session.status(self.socket_path)

    def changed(self) -> None:
        for watcher in self.watchers:
            watcher.set()


class Manager:
    """Implements control.api.MigrationManager.

    Args:
        factory: makes the transport of a source address.
        count_handoff_error: told the code of every hand-off that failed.
    """

    def __init__(
        self,
        config: DaemonConfig,
        factory: TransportFactory,
        *,
        count_handoff_error: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._config = config
        self._factory = factory
        self._count_handoff_error = count_handoff_error
        self._entries: dict[str, Entry] = {}
        self._preparing: set[str] = set()
        self._default_listener: HandoffListener | None = None
        self._default_task: asyncio.Task[None] | None = None
        self._clones = 0
        self._draining = False

    # -- control.api.MigrationManager

    async def prepare(self, spec: MigrationSpec) -> MigrationStatus:
        """Describe the image at its source, then listen for the VMM.

        Raises:
            MigrationError: MIGRATION_EXISTS. SourceError: no source describes the image as asked.
            ConfigError: the socket cannot be made.
        """
        self._check_room(spec.id)
        self._preparing.add(spec.id)
        try:
            image = await self._describe(spec)
            path = spec.socket_path or str(Path(self._config.state_dir) / "vmm" / f"{spec.id}.sock")
            entry = self._enter(spec, image, path)
            try:
                self._listen(entry)
            except PostcopyError:
                del self._entries[spec.id]
                raise
        finally:
            self._preparing.discard(spec.id)
        log.info("migration.prepared", migration=spec.id, socket=path, sources=spec.sources)
        return entry.status()

    def get(self, id: str) -> MigrationStatus:
        return self._entry(id).status()

    def list(self) -> list[MigrationStatus]:
        return [entry.status() for entry in self._entries.values()]

    async def cancel(self, id: str, *, force: bool) -> MigrationStatus:
        entry = self._entry(id)
        entry.session.cancel(force=force)
        if entry.serving is None:
            await self._close_listener(entry)
            self._forget_old()
        else:
            await asyncio.wait({entry.serving})
        return entry.status()

    async def set_limits(self, id: str, limits: Limits) -> MigrationStatus:
        entry = self._entry(id)
        entry.session.set_limits(limits)
        return entry.status()

    @contextlib.asynccontextmanager
    async def changes(self, id: str) -> AsyncIterator[asyncio.Event]:
        entry = self._entry(id)
        event = asyncio.Event()
        entry.watchers.add(event)
        try:
            yield event
        finally:
            entry.watchers.discard(event)

    # -- the daemon's own

    def listen_by_default(self, path: str) -> None:
        """Take VMMs at a socket that no `prepare` gave out. Raises ConfigError, MigrationError."""
        listener = HandoffListener(path, timeout_s=self._config.handoff_timeout_s)
        listener.open()
        self._default_listener = listener
        self._default_task = asyncio.ensure_future(
            listener.serve(self._on_default_handoff, self._on_handoff_failure)
        )

    def unfinished(self) -> int:
        """How many guests still need this daemon."""
        return sum(_is_attached(entry.session.state) for entry in self._entries.values())

    async def drain(self) -> None:
        """Take no new migration, and return when no guest needs this daemon any more."""
        self._draining = True
        while True:
            serving = {e.serving for e in self._entries.values() if e.serving and not e.serving.done()}
            if not serving:
                return
            await asyncio.wait(serving)

    async def close(self) -> None:
        """Close the sockets. Sessions that still serve keep their descriptors to the very end of the process."""
        if self._default_task is not None:
            self._default_task.cancel()
            await asyncio.gather(self._default_task, return_exceptions=True)
        if self._default_listener is not None:
            self._default_listener.close()
        for entry in list(self._entries.values()):
            await self._close_listener(entry)

    # -- inside

    def _entry(self, id: str) -> Entry:
        try:
            return self._entries[id]
        except KeyError:
            raise MigrationError(Code.MIGRATION_UNKNOWN, f"there is no migration {id!r}") from None

    def _check_room(self, id: str) -> None:
        if self._draining:
            raise MigrationError(
                Code.MIGRATION_EXISTS, "this daemon is being stopped and takes no new migration"
            )
        known = self._entries.get(id)
        if id in self._preparing or (known is not None and not known.session.state.is_final):
            raise MigrationError(
                Code.MIGRATION_EXISTS, f"migration {id!r} exists; cancel it or choose another id"
            )
        active = sum(not entry.session.state.is_final for entry in self._entries.values())
        if active + len(self._preparing) >= self._config.max_migrations:
            raise MigrationError(
                Code.MIGRATION_EXISTS,
                f"{active} migrations are under way, no more than max_migrations = {self._config.max_migrations} fit",
            )

    async def _describe(self, spec: MigrationSpec) -> ImageInfo:
        """Ask the sources in order; the first that answers as wanted decides."""
        last: SourceError | None = None
        for target in spec.sources:
            transport = self._factory(target)
            try:
                image = await transport.describe(spec.image_id or spec.id)
                if spec.epoch is not None and image.epoch != spec.epoch:
                    raise SourceError(
                        Code.SOURCE_OTHER_EPOCH,
                        f"page source {target} serves epoch {image.epoch:#x}, not {spec.epoch:#x} as asked for",
                    )
                return image
            except SourceError as error:
                last = error
            finally:
                await transport.close()
        raise last or SourceError(Code.SOURCE_UNREACHABLE, f"migration {spec.id!r} names no page source")

    def _enter(self, spec: MigrationSpec, image: ImageInfo, path: str) -> Entry:
        session = Session(
            spec,
            image,
            self._factory,
            changed=lambda: entry.changed(),  # noqa: PLW0108 - the entry is made behind it
            silent_after_s=self._config.silent_after_s,
        )
        entry = Entry(session, path)
        self._entries.pop(spec.id, None)
        self._entries[spec.id] = entry
        return entry

    def _listen(self, entry: Entry) -> None:
        listener = HandoffListener(entry.socket_path, timeout_s=self._config.handoff_timeout_s)
        listener.open()
        entry.listener = listener

        async def on_handoff(handoff: Handoff) -> None:
            await self._take(entry, handoff)

        entry.listening = asyncio.ensure_future(listener.serve(on_handoff, self._on_handoff_failure))

    async def _close_listener(self, entry: Entry) -> None:
        if entry.listening is not None:
            entry.listening.cancel()
            await asyncio.gather(entry.listening, return_exceptions=True)
            entry.listening = None
        if entry.listener is not None:
            entry.listener.close()
            entry.listener = None

    async def _take(self, entry: Entry, handoff: Handoff) -> None:
        """Give a hand-off to its session; a refusal leaves the session waiting for a better one."""
        try:
            entry.session.take(handoff)
        except PostcopyError as error:
            self._count_handoff_error(error.code)
            raise
        except OSError as error:
            self._count_handoff_error(Code.MEMORY_SHORT)
            raise HandoffError(
                Code.MEMORY_SHORT, f"no memory or descriptor for the ledger of a hand-off: {error.strerror}"
            ) from error
        entry.serving = asyncio.ensure_future(self._serve(entry))
        try:
            await handoff.acknowledge()
        except HandoffError as error:
            # It is taken all the same: a VMM that is gone is found by its pidfd.
            log.warning("handoff.not_acknowledged", migration=entry.session.spec.id, error=str(error))

    async def _serve(self, entry: Entry) -> None:
        try:
            await entry.session.serve()
        except Exception:
            log.exception("session.broken", migration=entry.session.spec.id)
            entry.session.fail(InvariantError("the session broke; its guest waits; the log has the details"))
        finally:
            await self._close_listener(entry)
            entry.changed()
            self._forget_old()

    async def _on_default_handoff(self, handoff: Handoff) -> None:
        waiting = [e for e in self._entries.values() if e.session.state is State.PREPARED]
        if len(waiting) == 1:
            await self._take(waiting[0], handoff)
        elif self._config.default_source and not waiting:
            await self._take(await self._make_default(), handoff)
        else:
            self._count_handoff_error(Code.HANDOFF_NO_MIGRATION)
            raise HandoffError(
                Code.HANDOFF_NO_MIGRATION,
                f"a VMM connected to the default socket and {len(waiting)} migrations are prepared; prepare exactly "
                "one, or set default_source and default_image, or use the socket that `prepare` printed",
            )

    async def _make_default(self) -> Entry:
        """A migration that only the configuration announced: many VMMs may start from the same image."""
        self._clones += 1
        spec = MigrationSpec(
            id=f"{self._config.default_image}-{self._clones}",
            sources=tuple(self._config.default_source),
            image_id=self._config.default_image,
            limits=self._config.default_limits(),
            socket_path=self._config.default_socket,
        )
        self._check_room(spec.id)
        return self._enter(spec, await self._describe(spec), spec.socket_path)

    def _on_handoff_failure(self, error: HandoffError) -> None:
        self._count_handoff_error(error.code)

    def _forget_old(self) -> None:
        final = [id for id, entry in self._entries.items() if entry.session.state.is_final]
        for id in final[: max(0, len(final) - FINISHED_KEPT)]:
            del self._entries[id]


def _is_attached(state: State) -> bool:
    return not state.is_final and state is not State.PREPARED
