"""Claiming and releasing the path of a UNIX socket: a stale one is replaced, a live one never."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from postcopyd.arguments import check_socket_path
from postcopyd.errors import Code, ConfigError

DIRECTORY_MODE = 0o750
PROBE_TIMEOUT_S = 1.0


def claim(path: str) -> None:
    """Make `path` free to bind: its directory exists and is ours or root's, and no dead socket lies there.

    Raises:
        ConfigError: a process listens there, the path is no socket, or the directory is someone else's.
    """
    check_socket_path(path)
    directory = Path(path).parent
    try:
        directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        _check_directory(directory)
        if not os.path.lexists(path):
            return
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(
                Code.CONFIG_INVALID, f"{path} exists and is no socket; remove it or choose another path"
            )
        if _answers(path):
            raise ConfigError(
                Code.CONFIG_INVALID, f"a process already listens at {path}; stop it or choose another path"
            )
        os.unlink(path)
    except OSError as error:
        raise ConfigError(
            Code.CONFIG_INVALID, f"no socket can be made at {path}: {error.strerror}"
        ) from error


def release(path: str) -> None:
    """Remove the socket of a server that has stopped; nothing if it is gone."""
    Path(path).unlink(missing_ok=True)


def _check_directory(directory: Path) -> None:
    """Another user who owns the directory could put a socket of his own in our place (/tmp/postcopyd-UID)."""
    owner = directory.stat().st_uid
    if owner not in (0, os.geteuid()):
        raise ConfigError(
            Code.CONFIG_INVALID, f"{directory} belongs to user {owner}; choose another state_dir"
        )


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except TimeoutError:
            return True  # a full backlog has an owner
    return True
