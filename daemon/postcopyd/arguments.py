"""Ids, addresses and paths as people and peers write them, checked."""

from __future__ import annotations

import os
import re

from .errors import Code, ConfigError

MAX_ID_LEN = 128
# sockaddr_un.sun_path holds 108 bytes, the last of them 0 (unix(7)).
MAX_SOCKET_PATH_BYTES = 107
_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_ID_LEN}}}")
_ENDPOINT = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


def check_id(text: str) -> str:
    """Return a migration or image id unchanged.

    Raises:
        ConfigError: empty, longer than 128, or with characters that are unsafe in a file name or a label.
    """
    if _ID.fullmatch(text) is None or text in {".", ".."}:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"{text[:160]!r} is not an id; write 1 to {MAX_ID_LEN} of A-Z a-z 0-9 . _ -",
        )
    return text


def parse_endpoint(text: str, *, port_zero: bool = False) -> tuple[str, int]:
    """Return (host, port) of `HOST:PORT`, `1.2.3.4:PORT` or `[v6]:PORT`.

    Args:
        port_zero: accept port 0, which means any free one to a listener.
    Raises:
        ConfigError: anything else.
    """
    match = _ENDPOINT.fullmatch(text)
    port = int(match[3]) if match else -1
    if match is None or not (0 if port_zero else 1) <= port <= 65535:
        raise ConfigError(
            Code.ARGUMENT_INVALID, f"{text[:300]!r} is not HOST:PORT; write 192.0.2.7:50051 or [::1]:50051"
        )
    return match[1] or match[2], port


def format_endpoint(host: str, port: int) -> str:
    """Return what `parse_endpoint` takes."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_socket_path(text: str) -> str:
    """Return an absolute path that fits a UNIX socket address.

    Raises:
        ConfigError: relative, or too long for the kernel.
    """
    if not text.startswith("/") or "\0" in text:
        raise ConfigError(Code.ARGUMENT_INVALID, f"{text[:160]!r} is not an absolute path")
    if len(os.fsencode(text)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"{text[:160]!r} is longer than the {MAX_SOCKET_PATH_BYTES} bytes a socket's path may have",
        )
    return text
