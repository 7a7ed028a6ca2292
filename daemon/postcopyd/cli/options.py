"""Arguments and options that several commands share. A bad value is a ConfigError like any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from postcopyd.arguments import check_id, check_socket_path, parse_endpoint
from postcopyd.config import default_control
from postcopyd.errors import Code, ConfigError
from postcopyd.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BITMAP_BYTES = 32 << 20
"""A guest of 1 TiB."""

Command = TypeVar("Command", bound="Callable[..., None]")


def id_argument(command: Command) -> Command:
    return click.argument("id", metavar="ID", callback=lambda ctx, param, value: check_id(value))(command)


def control_option(command: Command) -> Command:
    return click.option(
        "--control",
        metavar="PATH",
        callback=lambda ctx, param, value: check_socket_path(value or default_control()),
        help="Control socket of the daemon. Default: $POSTCOPYD_CONTROL, or the daemon's own default.",
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def present_option(command: Command) -> Command:
    return click.option(
        "--present",
        metavar="FILE",
        callback=lambda ctx, param, value: _bitmap(value) if value else b"",
        help="Bitmap of the 4 KiB pages that the VMM has already, copied beforehand: they are not fetched.",
    )(command)


def _bitmap(path: str) -> bytes:
    try:
        size = os.stat(path).st_size
        if size > MAX_BITMAP_BYTES:
            raise ConfigError(
                Code.ARGUMENT_INVALID,
                f"--present {path} has {size} bytes; a bitmap has {MAX_BITMAP_BYTES} at most",
            )
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            Code.ARGUMENT_INVALID, f"--present {path} cannot be read: {error.strerror}"
        ) from error


def endpoints(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """A click callback: every value is HOST:PORT."""
    for text in value:
        parse_endpoint(text)
    return value


def socket_path(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """A click callback: a path for a socket, or nothing."""
    return check_socket_path(value) if value else ""


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A click callback: bytes from 100M, or nothing."""
    return None if value is None else parse_size(value)


def epoch(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A click callback: a 64-bit number, decimal or 0x…, or nothing."""
    if value is None:
        return None
    try:
        number = int(value, 0)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 64:
        raise ConfigError(Code.ARGUMENT_INVALID, f"--epoch {value!r} is no number of 64 bits")
    return number
