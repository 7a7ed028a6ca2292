"""The new process's side: asks the standby to go on in its place.

A guest waits meanwhile, so nothing is imported that takes time: `_socket` is what `socket` is made of, at a tenth of
its price.
"""

from __future__ import annotations

import _socket
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SOCKET_NAME = "standby.sock"
FIRST_PASSED_FD = 3
STDIO = (0, 1, 2)
FDS_PER_MESSAGE = 250
"""net/scm.h, SCM_MAX_FD is 253."""

ANSWER_WITHIN_S = 2.0
"""A standby that still loads is waited for: an ordinary start takes no less."""

VERDICT_WITHIN_S = 10.0
MAX_ANSWER_BYTES = 64

MAIN = b"main"
TAKEN = b"taken"
REFUSED = b"refused"


def standby_path(environ: Mapping[str, str]) -> str:
    """Where the standby listens; empty without a runtime directory. Source: systemd.exec(5), $RUNTIME_DIRECTORY."""
    folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return f"{folder}/{SOCKET_NAME}" if folder else ""


def program_stamp() -> str:
    """Changes when the program does: a standby of the one before must not go on for it."""
    stat = os.stat(__file__)
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_mtime_ns}:{stat.st_size}"


def claim(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Let the standby go on as the main process and exit; return if there is none that can.

    Args:
        argv: the arguments of `run`.
        environ: of the service: NOTIFY_SOCKET, LISTEN_FDS and all that the standby needs.
    """
    path, manager = standby_path(environ), environ.get("NOTIFY_SOCKET", "")
    if not path or not manager or environ.get("LISTEN_PID", str(os.getpid())) != str(os.getpid()):
        return
    try:
        conversation = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        conversation.settimeout(ANSWER_WITHIN_S)
        conversation.connect(path)
        _present(conversation, argv, environ)
        answer = conversation.recv(MAX_ANSWER_BYTES)
        if not answer.isdigit():
            return
        send_to_manager(manager, b"MAINPID=" + answer)
    except (OSError, ValueError):
        # There is none, or it cannot. It has heard nothing that would let it begin.
        return
    try:
        conversation.settimeout(VERDICT_WITHIN_S)
        conversation.send(MAIN)
        verdict = conversation.recv(MAX_ANSWER_BYTES)
    except OSError:
        verdict = b""
    if verdict == REFUSED:
        return
    if verdict != TAKEN:
        # One of us is the main process, and it cannot be known which: with both gone the next start is an ordinary one.
        _kill(int(answer))
        os._exit(1)
    os._exit(0)


def _present(conversation: _socket.socket, argv: Sequence[str], environ: Mapping[str, str]) -> None:
    count = int(environ.get("LISTEN_FDS", "0"))
    fds = [*STDIO, *range(FIRST_PASSED_FD, FIRST_PASSED_FD + count)]
    # In a file, as an environment is not bounded by what one message may hold.
    text = os.memfd_create("claim", os.MFD_CLOEXEC)
    try:
        os.write(text, encode(argv, environ))
        send_fds(conversation, str(len(fds)).encode(), [text])
    finally:
        os.close(text)
    for at in range(0, len(fds), FDS_PER_MESSAGE):
        send_fds(conversation, b"fds", fds[at : at + FDS_PER_MESSAGE])


def encode(argv: Sequence[str], environ: Mapping[str, str]) -> bytes:
    """What `process.decode` reads."""
    fields = [program_stamp(), str(len(argv)), *argv, *(f"{key}={value}" for key, value in environ.items())]
    return os.fsencode("\0".join(fields))


def send_fds(sock: _socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Raises OSError."""
    numbers = b"".join(fd.to_bytes(4, "little") for fd in fds)
    sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])


def send_to_manager(address: str, message: bytes, fds: Sequence[int] = ()) -> None:
    """One message to the service manager at NOTIFY_SOCKET. Raises OSError."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        sock.settimeout(ANSWER_WITHIN_S)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        if fds:
            send_fds(sock, message, fds)
        else:
            sock.send(message)
    finally:
        sock.close()


def _kill(pid: int) -> None:
    import signal

    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
