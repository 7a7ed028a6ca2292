"""The UNIX socket on which VMMs hand their memory over."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Set
from pathlib import Path

import structlog

from ..errors import Code, ConfigError, HandoffError, InvariantError, MigrationError, PostcopyError
from .offer import Handoff
from .peer import peer_of
from .receive import RECEIVE_TIMEOUT_S, SERVED, receive_handoff

log = structlog.get_logger(__name__)

MAX_PATH_BYTES = 107
"""sun_path has 108 bytes, one for the NUL. Source: unix(7)."""

MAX_RECEIVING = 16
"""Hand-offs received at once; further VMMs wait in the backlog."""

_ACCEPT_BACKOFF_S = 0.2
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

OnHandoff = Callable[[Handoff], Awaitable[None]]
OnFailure = Callable[[HandoffError], None]


class HandoffListener:
    """Listens at a path, and turns each connection into a Handoff.

    Args:
        path: at most 107 bytes. Its directory is made, for this user alone, if it does not exist.
        mode: permissions of the socket: whoever can write to it can hand memory over.
        backlog: connections that wait to be accepted.
        timeout_s: for one hand-off, from accept to its last byte.
        served: see receive_handoff.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: int = 0o600,
        backlog: int = 16,
        timeout_s: float = RECEIVE_TIMEOUT_S,
        served: Set[str] = SERVED,
    ) -> None:
        self.path = Path(path)
        self._mode = mode
        self._backlog = backlog
        self._timeout_s = timeout_s
        self._served = served
        self._sock: socket.socket | None = None
        self._inode: tuple[int, int] | None = None

    def open(self) -> None:
        """Bind and listen. A socket file that nobody listens on is left from a crash and is replaced.

        Raises:
            ConfigError: ARGUMENT_INVALID: the path is too long, no socket, or not permitted.
            MigrationError: MIGRATION_EXISTS: somebody listens there.
        """
        _check_path(self.path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Whom the socket lets in must reach it: the directory's group may pass if the socket's may write.
            self.path.parent.mkdir(mode=0o710 if self._mode & 0o060 else 0o700, parents=True, exist_ok=True)
            _remove_stale(self.path)
            sock.bind(str(self.path))
            self._inode = _inode(self.path)
            # Before listen(2) nobody can connect, so no moment has the wrong permissions.
            self.path.chmod(self._mode)
            sock.listen(self._backlog)
        except OSError as error:
            sock.close()
            self._unlink()
            raise ConfigError(
                Code.ARGUMENT_INVALID, f"cannot listen for VMMs at {self.path}: {error.strerror or error}"
            ) from error
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        log.info("handoff.listening", path=str(self.path))

    def take(self, sock: socket.socket) -> None:
        """Use a socket that listens already, as the service manager's; its file stays when this is closed.

        Raises:
            ConfigError: ARGUMENT_INVALID: it is no listening UNIX stream socket.
        """
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
            raise ConfigError(
                Code.ARGUMENT_INVALID, "the socket passed for VMMs does not listen on a UNIX path"
            )
        sock.setblocking(False)
        self._sock = sock
        log.info("handoff.listening", path=str(self.path), passed=True)

    async def serve(self, on_handoff: OnHandoff, on_failure: OnFailure | None = None) -> None:
        """Accept VMMs until cancelled; a slow one delays no other.

        Args:
            on_handoff: gets each Handoff and owns it. It returns when the hand-off is accepted, not when its
                migration ends. When it raises, the hand-off is refused.
            on_failure: told of each hand-off that could not be received.
        Cancellation: hand-offs that are being received are closed; those given to `on_handoff` are not.
        """
        assert self._sock is not None, "open() comes first"
        slots = asyncio.Semaphore(MAX_RECEIVING)
        async with asyncio.TaskGroup() as group:
            while True:
                await slots.acquire()
                sock = await _accept(self._sock)
                group.create_task(self._handle(sock, slots, on_handoff, on_failure))

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still this listener's; idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._unlink()

    async def _handle(
        self,
        sock: socket.socket,
        slots: asyncio.Semaphore,
        on_handoff: OnHandoff,
        on_failure: OnFailure | None,
    ) -> None:
        pid = peer_of(sock).pid
        try:
            handoff = await receive_handoff(sock, timeout_s=self._timeout_s, served=self._served)
        except HandoffError as error:
            log.warning(
                "handoff.failed", code=str(error.code), error=error.message, pid=pid, path=str(self.path)
            )
            if on_failure is not None:
                on_failure(error)
            return
        finally:
            slots.release()
        log.info("handoff.received", format=handoff.format_name, regions=len(handoff.regions), pid=pid)
        await _deliver(handoff, on_handoff)

    def _unlink(self) -> None:
        inode, self._inode = self._inode, None
        if inode is not None and _inode(self.path) == inode:
            self.path.unlink(missing_ok=True)


async def _deliver(handoff: Handoff, on_handoff: OnHandoff) -> None:
    """Pass a hand-off on. On cancellation it stays open: a session may have it already, and lives longer."""
    try:
        await on_handoff(handoff)
    except PostcopyError as error:
        handoff.refuse(error)
    except Exception:
        # One VMM's hand-off met a bug; without this nobody would listen to the next.
        log.exception("handoff.broken", format=handoff.format_name, pid=handoff.vmm_pid)
        handoff.refuse(InvariantError("a bug of postcopyd kept it from taking the hand-off; the log has it"))


async def _accept(listener: socket.socket) -> socket.socket:
    """Accept one connection; without descriptors or memory to spare, say so and try again."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, _ = await loop.sock_accept(listener)
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            log.error("handoff.accept_failed", errno=errno.errorcode[error.errno or 0])
            await asyncio.sleep(_ACCEPT_BACKOFF_S)
        else:
            return sock


def _check_path(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"the socket path {path} has {length} bytes; a UNIX socket's path has at most {MAX_PATH_BYTES}",
        )


def _remove_stale(path: Path) -> None:
    try:
        file_mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(file_mode):
        raise ConfigError(
            Code.ARGUMENT_INVALID, f"{path} exists and is no socket; remove it or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            # Somebody listens, and its backlog is full.
            pass
    raise MigrationError(Code.MIGRATION_EXISTS, f"another process listens at {path}")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
