"""The migrations of one daemon, by id: made by `prepare`, met by their VMM on a socket, forgotten when long over."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from .adoption import examine
from .attachment import STATE, UFFD, Phase
from .errors import (
    Code,
    ConfigError,
    HandoffError,
    InvariantError,
    MigrationError,
    PostcopyError,
    SourceError,
)
from .fetcher import TOTAL_WINDOW_BYTES
from .handoff.message import EXIT_NOTIFY, EXIT_RING, IMAGE
from .handoff.message import STATE as PRESENTED_STATE
from .handoff.socket import HandoffListener
from .pacing import Shares
from .prepared import PreparedRecord, PreparedStore
from .session import Session
from .status import Limits, MigrationSpec, MigrationStatus, State
from .store import stored_name
from .units import PAGE_SIZE
from .urgency import Urgency

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .config import DaemonConfig
    from .handoff.descriptors import OwnedFd
    from .handoff.offer import Handoff
    from .store import DescriptorStore
    from .transport import ImageInfo, TransportFactory

log = structlog.get_logger(__name__)

SERVED = frozenset({UFFD, EXIT_RING, EXIT_NOTIFY, IMAGE, PRESENTED_STATE})
"""Descriptors of a framed hand-off that a session uses."""

FINISHED_KEPT = 64
"""So many ended migrations can still be looked at; the oldest are forgotten."""


ADOPT_WAIT_S = 2.0
"""Readiness waits so long for the sources of adopted sessions; a source that is away must not keep it back."""


@dataclass
class Entry:
    """A session with its socket and those who watch it.

    expected_pid: of the VMM that an earlier daemon without a store served; 0: none.
    """

    session: Session
    socket_path: str
    expected_pid: int = 0
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
        store: DescriptorStore,
        *,
        count_handoff_error: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._config = config
        self._factory = factory
        self._store = store
        # All migrations' and the daemon's to keep, so it is made before the first of them.
        Urgency.of_running_loop()
        self._shares = Shares(max(TOTAL_WINDOW_BYTES, config.push_window), config.push_window)
        self._count_handoff_error = count_handoff_error
        self._prepared = PreparedStore(Path(config.state_dir) / "prepared")
        self._entries: dict[str, Entry] = {}
        self._preparing: set[str] = set()
        self._default_listener: HandoffListener | None = None
        self._default_task: asyncio.Task[None] | None = None
        self._clones = 0
        self._draining = False
        # Descriptors of sessions that cannot be served: held, as closing them would let their guests read zeros.
        self._unadopted: dict[str, dict[str, OwnedFd]] = {}

    # -- control.api.MigrationManager

    async def prepare(self, spec: MigrationSpec, present: bytes = b"") -> MigrationStatus:
        """Describe the image at its source, then listen for the VMM.

        Args:
            present: a bit for each 4 KiB page of the image that the VMM has already.

        Raises:
            MigrationError: MIGRATION_EXISTS. SourceError: no source describes the image as asked.
            ConfigError: the socket cannot be made, or `present` is not of this image.
        """
        self._check_room(spec.id)
        self._preparing.add(spec.id)
        try:
            image = await self._describe(spec)
            _check_present(present, image)
            path = spec.socket_path or str(Path(self._config.state_dir) / "vmm" / f"{spec.id}.sock")
            entry = self._enter(spec, image, path, present=present)
            try:
                self._listen(entry)
                record = PreparedRecord(spec=spec, image=image, socket_path=path, present=present)
                self._prepared.save(record)
            except PostcopyError:
                del self._entries[spec.id]
                await self._close_listener(entry)
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
            self._prepared.remove(id)
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

    async def adopt(self, stored: dict[str, dict[str, OwnedFd]]) -> None:
        """Go on with the sessions that the store kept. What cannot be served is reported, kept open, never closed."""
        for id, fds in stored.items():
            self._store.note_held(stored_name(kind, id) for kind in fds)
            try:
                await self._adopt_one(id, fds)
            except PostcopyError as error:
                log.error(
                    "session.not_adopted",
                    code=Code.STORE_INCOMPLETE,
                    migration=id,
                    kinds=sorted(fds),
                    error=error.message,
                )
                self._unadopted[id] = fds

    def prepare_again(self) -> None:
        """Listen for the VMMs that an earlier process was asked to wait for."""
        for record in self._prepared.load():
            self._prepare_again(record)

    async def _adopt_one(self, id: str, fds: dict[str, OwnedFd]) -> None:
        kept = examine(id, fds)
        record = kept.record
        if not kept.can_be_served:
            log.warning(
                "session.let_go", migration=id, phase=record.phase, vmm_pid=record.vmm_pid, kinds=sorted(fds)
            )
            if record.phase is Phase.ENDED:
                self._prepared.remove(id)
            await self._store.remove(id, [*(kind for kind in fds if kind != STATE), STATE])
            kept.close()
            return
        entry = self._enter(record.spec, record.image, record.socket_path)
        try:
            entry.session.adopt(kept.attachment(), kept.state)
        except BaseException:
            del self._entries[id]
            raise
        entry.serving = asyncio.ensure_future(self._serve(entry))
        # A VMM that lost its connection presents itself again.
        self._listen_again(entry)

    def _prepare_again(self, record: PreparedRecord) -> None:
        id = record.spec.id
        if id in self._entries:
            return
        if id in self._unadopted:
            log.error("prepared.not_again", migration=id, detail="the store holds a session of this id")
            return
        # A daemon without a store served it: only its VMM knows how far that got.
        mark = record.mark or None
        entry = self._enter(record.spec, record.image, record.socket_path, mark=mark, present=record.present)
        entry.expected_pid = record.vmm_pid
        self._listen_again(entry)
        log.info(
            "migration.prepared_again", migration=id, socket=record.socket_path, attached=bool(record.mark)
        )

    def _listen_again(self, entry: Entry) -> None:
        if entry.socket_path == self._config.default_socket:
            return
        try:
            self._listen(entry)
        except PostcopyError as error:
            log.error("handoff.not_listening", path=entry.socket_path, code=error.code, error=error.message)
            if entry.session.is_vacant:
                entry.session.fail(error)

    async def wait_running(self) -> None:
        """Return when every adopted session has its source again, or knows that it has not, or after a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADOPT_WAIT_S):
                for entry in [e for e in self._entries.values() if e.serving is not None]:
                    async with self.changes(entry.session.spec.id) as changed:
                        while entry.session.state is State.CONNECTED:
                            await changed.wait()
                            changed.clear()

    def listen_by_default(self, path: str) -> None:
        """Take VMMs at a socket that no `prepare` gave out. Raises ConfigError, MigrationError."""
        listener = self._new_listener(path)
        listener.open()
        self._serve_by_default(listener)

    def take_default_socket(self, passed: OwnedFd) -> None:
        """The same with a socket that the service manager holds: a VMM that connects while we restart waits."""
        sock = socket.socket(fileno=passed.take())
        listener = self._new_listener(sock.getsockname())
        listener.take(sock)
        self._serve_by_default(listener)

    def _new_listener(self, path: str) -> HandoffListener:
        return HandoffListener(
            path,
            mode=int(self._config.vmm_socket_mode, 8),
            timeout_s=self._config.handoff_timeout_s,
            served=SERVED,
        )

    def _serve_by_default(self, listener: HandoffListener) -> None:
        self._default_listener = listener
        self._default_task = asyncio.ensure_future(
            listener.serve(self._on_default_handoff, self._on_handoff_failure)
        )

    def unfinished(self) -> int:
        """How many guests still need this daemon."""
        return sum(_is_attached(entry.session.state) for entry in self._entries.values())

    async def drain(self) -> None:
        """Take no new migration, lift the limits of those there are, and return when no guest needs this daemon."""
        self._draining = True
        for entry in self._entries.values():
            entry.session.set_limits(Limits(push_rate=0, weight=entry.status().limits.weight))
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
        is_taken = known is not None and (not known.session.state.is_final or known.session.holds_memory)
        if id in self._preparing or id in self._unadopted or is_taken:
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

    def _enter(
        self,
        spec: MigrationSpec,
        image: ImageInfo,
        path: str,
        *,
        mark: int | None = None,
        present: bytes = b"",
    ) -> Entry:
        session = Session(
            spec,
            image,
            self._factory,
            changed=lambda: entry.changed(),  # noqa: PLW0108 - the entry is made behind it
            silent_after_s=self._config.silent_after_s,
            store=self._store,
            shares=self._shares,
            ended=lambda: self._prepared.remove(spec.id),
            mark=mark,
            present=present,
        )
        entry = Entry(session, path)
        self._entries.pop(spec.id, None)
        self._entries[spec.id] = entry
        return entry

    def _listen(self, entry: Entry) -> None:
        listener = self._new_listener(entry.socket_path)
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
            if not entry.session.is_vacant:
                await entry.session.take_again(handoff)
                return
            await entry.session.take(handoff, entry.socket_path)
        except PostcopyError as error:
            self._count_handoff_error(error.code)
            raise
        except OSError as error:
            self._count_handoff_error(Code.MEMORY_SHORT)
            raise HandoffError(
                Code.MEMORY_SHORT, f"no memory or descriptor for the ledger of a hand-off: {error.strerror}"
            ) from error
        self._remember(entry)
        entry.serving = asyncio.ensure_future(self._serve(entry))

    def _remember(self, entry: Entry) -> None:
        """Before the VMM is answered: which state memory it must present to a daemon that finds no store."""
        session = entry.session
        try:
            self._prepared.save(
                PreparedRecord(
                    spec=session.spec,
                    image=session.image,
                    socket_path=entry.socket_path,
                    mark=session.mark,
                    vmm_pid=session.vmm_pid,
                )
            )
        except ConfigError as error:
            log.error("prepared.not_saved", migration=session.spec.id, code=error.code, error=error.message)

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
        known = self._known(handoff)
        waiting = [e for e in self._entries.values() if e.session.is_vacant and not e.expected_pid]
        if known is not None:
            await self._take(known, handoff)
        elif len(waiting) == 1:
            await self._take(waiting[0], handoff)
        elif self._config.default_source and not waiting:
            entry = await self._make_default()
            try:
                await self._take(entry, handoff)
            except BaseException:
                # Nobody prepared it, so nobody would cancel it, and the next VMM would get it for its own.
                del self._entries[entry.session.spec.id]
                raise
        else:
            self._count_handoff_error(Code.HANDOFF_NO_MIGRATION)
            raise HandoffError(
                Code.HANDOFF_NO_MIGRATION,
                f"a VMM connected to the default socket and {len(waiting)} migrations are prepared; prepare exactly "
                "one, or set default_source and default_image, or use the socket that `prepare` printed",
            )

    def _known(self, handoff: Handoff) -> Entry | None:
        """The migration of a VMM that presents its memory again."""
        for entry in self._entries.values():
            if entry.session.is_of(handoff) or (
                entry.session.is_vacant
                and entry.expected_pid == handoff.vmm_pid != 0
                and PRESENTED_STATE in handoff.extras
            ):
                return entry
        return None

    async def _make_default(self) -> Entry:
        """A migration that only the configuration announced: many VMMs may start from the same image."""
        while True:
            self._clones += 1
            id = f"{self._config.default_image}-{self._clones}"
            # An earlier process counted too.
            if id not in self._entries and id not in self._unadopted:
                break
        spec = MigrationSpec(
            id=id,
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
        final = [
            id
            for id, entry in self._entries.items()
            if entry.session.state.is_final and not entry.session.holds_memory
        ]
        for id in final[: max(0, len(final) - FINISHED_KEPT)]:
            del self._entries[id]


def _is_attached(state: State) -> bool:
    return not state.is_final and state is not State.PREPARED


def _check_present(bitmap: bytes, image: ImageInfo) -> None:
    """Raises ConfigError: the bitmap has pages that the image does not have, so it is another guest's."""
    pages = image.size_bytes // PAGE_SIZE
    beyond = int.from_bytes(bitmap[pages // 8 : pages // 8 + 1], "little") >> pages % 8
    if beyond or bitmap[pages // 8 + 1 :].strip(b"\0"):
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"the pages given as present reach beyond the {pages} pages of image {image.image_id!r}",
        )
