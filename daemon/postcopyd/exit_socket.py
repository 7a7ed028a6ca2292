"""vCPU faults that a VMM forwards over its hand-off socket: requests in, replies out, for one session.

What was read and is not answered must outlive this process, as nobody sends it again. So bytes are looked at first, then
noted in the session's record, then taken from the socket, then acted upon; a reply is sent first and then forgotten. A
death in between can have a request answered twice, never not at all.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog

from .errors import Code, HandoffError
from .handoff.exit_frames import FaultReply, Received, RequestReader, frame_reply
from .handoff.firecracker_exits import split_word

if TYPE_CHECKING:
    from collections.abc import Callable

    from .memory import Memory
    from .pager import Pager

log = structlog.get_logger(__name__)

CHUNK_BYTES = 16 << 10
"""Read in one turn of the loop, so that a VMM that never stops sending leaves the others their turns."""

MAX_UNSENT_BYTES = 64 << 10
"""Replies that a VMM may leave unread, beyond what the kernel holds: a thousand vCPUs' worth."""


class ExitJournal(msgspec.Struct, frozen=True):
    """What the next process must know; part of the session's record.

    opened: the VMM has said how it forwards faults, so its bitmap is filled.
    unread: to be read as if it came now, as it is not answered.
    unsent: to be sent before anything else.
    """

    opened: bool = False
    unread: bytes = b""
    unsent: bytes = b""


class ExitHandler(Protocol):
    def dispatch(self, signals: int) -> None: ...

    def on_exits_opened(self) -> None: ...

    def on_exits_broken(self, error: HandoffError) -> None: ...


class ExitSocket:
    """Serves `sock`, which stays the caller's until `settle`.

    Args:
        len_bytes: of the smallest page, for replies once there is no pager.
        note: has a changed journal kept.
    """

    def __init__(
        self,
        sock: socket.socket,
        pager: Pager,
        handler: ExitHandler,
        journal: ExitJournal,
        note: Callable[[ExitJournal], None],
        *,
        len_bytes: int,
    ) -> None:
        self.closed = asyncio.Event()
        self._sock = sock
        self._pager: Pager | None = pager
        self._handler = handler
        self._journal = journal
        self._note = note
        self._len_bytes = len_bytes
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader()
        self._word = b""
        self._pending: dict[tuple[int, int], Received] = {}
        self._out = bytearray(journal.unsent)
        self._watched = -1

    def start(self) -> None:
        """Begin with what an earlier reader left, then watch."""
        self._watched = self._sock.fileno()
        self._loop.add_reader(self._watched, self._on_readable)
        if self._journal.opened:
            self._handler.on_exits_opened()
        self._take(self._journal.unread)

    def stop(self) -> None:
        """Watch no more; idempotent. What is not answered stays noted."""
        if self._watched >= 0:
            self._loop.remove_reader(self._watched)
            self._loop.remove_writer(self._watched)
        self._watched = -1

    def answer(self) -> None:
        """Reply to the vCPUs whose pages came."""
        assert self._pager is not None
        for answer in self._pager.take_answers():
            # Asked twice, answered once: a page may be answered again while its first answer lies here.
            received = self._pending.pop((answer.vcpu, answer.page), None)
            if received is not None:
                self._reply(received, answer.len_bytes, zero=answer.zero)
        self._send()

    def settle(self) -> None:
        """The memory is released: whoever asks, may. The socket is this object's from now on, to the VMM's end.

        A vCPU may have exited before, and its request be on the way: without a reply it would wait for ever.
        """
        self._pager = None
        self._note = lambda journal: None
        for received in self._pending.values():
            self._reply(received, self._len_bytes, zero=False)
        self._pending.clear()
        if self.closed.is_set():
            self._sock.close()
            return
        self._watched = self._sock.fileno()
        self._loop.add_reader(self._watched, self._on_readable)
        self._send()

    @property
    def is_settled(self) -> bool:
        """Whether the socket is this object's."""
        return self._pager is None

    # -- reading

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(CHUNK_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return
        self._take(data, consume=True)

    def _take(self, data: bytes, *, consume: bool = False) -> None:
        try:
            opened, received = self._parse(data)
            self._keep(received, opened=opened or self._journal.opened)
            if consume:
                self._consume(len(data))
            if opened:
                log.info("exit_socket.opened")
                self._handler.on_exits_opened()
            for one in received:
                self._ask(one)
        except HandoffError as error:
            self._break(error)
            return
        self._send()
        if self._pager is not None:
            self._handler.dispatch(self._pager.take_signals())

    def _parse(self, data: bytes) -> tuple[bool, list[Received]]:
        """Return whether the word about exits came with `data`, and the requests behind it. Raises HandoffError."""
        if self._journal.opened:
            return False, self._reader.feed(data)
        self._word += data
        rest = split_word(self._word)
        if rest is None:
            return False, []
        self._word = b""
        return True, self._reader.feed(rest)

    def _consume(self, len_bytes: int) -> None:
        """Take what was looked at. Descriptors that came with it are closed by the kernel, as nobody asks for them."""
        while len_bytes:
            len_bytes -= len(self._sock.recv(len_bytes, socket.MSG_DONTWAIT))

    def _ask(self, received: Received) -> None:
        if self._pager is None:
            self._reply(received, self._len_bytes, zero=False)
            return
        request = received.request
        page = self._pager.external_fault(request.vcpu, gpa=request.gpa, offset=request.offset)
        self._pending[request.vcpu, page] = received

    # -- writing

    def _reply(self, received: Received, len_bytes: int, *, zero: bool) -> None:
        request = received.request
        reply = FaultReply(
            vcpu=request.vcpu,
            offset=request.offset,
            len_bytes=len_bytes,
            flags=request.flags,
            gpa=request.gpa,
            token=request.token,
            zero=zero,
        )
        self._out += frame_reply(reply, received.form)

    def _send(self) -> None:
        if self._watched < 0:
            return
        if self._out:
            try:
                del self._out[: self._sock.send(self._out, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)]
            except BlockingIOError:
                pass  # _on_writable goes on
            except OSError:
                self._hang_up()
                return
        if len(self._out) > MAX_UNSENT_BYTES:
            self._break(
                HandoffError(
                    Code.EXIT_SOCKET_BROKEN,
                    f"the VMM leaves more than {MAX_UNSENT_BYTES} bytes of replies to its faults unread",
                )
            )
        elif self._out:
            self._loop.add_writer(self._watched, self._send)
        else:
            self._loop.remove_writer(self._watched)
        self._keep([], opened=self._journal.opened)

    # -- the rest

    def _keep(self, received: list[Received], *, opened: bool) -> None:
        frames = [one.frame for one in (*self._pending.values(), *received)]
        journal = ExitJournal(
            opened=opened,
            unread=self._word + b"".join(frames) + self._reader.partial,
            unsent=bytes(self._out),
        )
        if journal != self._journal:
            self._journal = journal
            self._note(journal)

    def _break(self, error: HandoffError) -> None:
        self.stop()
        if self._pager is None:
            log.warning("exit_socket.broken", code=error.code, error=error.message)
            self._sock.close()
        else:
            self._handler.on_exits_broken(error)

    def _hang_up(self) -> None:
        """The VMM closed its end: nobody is there to be answered."""
        self.stop()
        self.closed.set()
        if self._pager is None:
            self._sock.close()


def exits_of(memory: Memory, handler: ExitHandler) -> ExitSocket | None:
    """What answers the faults that a VMM forwards over its socket, not started; None: it forwards none."""
    record, sock = memory.record, memory.vmm.sock
    if record.exits is None or sock is None:
        return None

    def note(journal: ExitJournal) -> None:
        memory.note(exits=journal)

    page_size = min(region.page_size for region in record.regions)
    return ExitSocket(sock, memory.pager, handler, record.exits, note, len_bytes=page_size)
