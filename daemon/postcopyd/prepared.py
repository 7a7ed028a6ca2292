"""Prepared migrations on disk, so that a daemon that comes back listens for the same VMMs again.

Nothing of a guest is here: what must not be lost (descriptors, ledger) is in the descriptor store, or with a VMM that
was given its state memory. Of a VMM that handed over, the file says which state memory it must present.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import structlog

from .errors import Code, ConfigError
from .status import MigrationSpec
from .transport import ImageInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


log = structlog.get_logger(__name__)


class PreparedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """mark, vmm_pid: of the state memory that a VMM was given; 0: none handed over yet.

    present: a bitmap of the 4 KiB pages that the VMM has already; of no use once it handed over.
    """

    spec: MigrationSpec
    image: ImageInfo
    socket_path: str
    mark: int = 0
    vmm_pid: int = 0
    present: bytes = b""


class PreparedStore:
    """One file a migration in `folder`, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"

    def save(self, record: PreparedRecord) -> None:
        """Raises ConfigError: the folder cannot be written."""
        path = self._path(record.spec.id)
        staged = path.with_suffix(".new")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            staged.write_bytes(msgspec.json.encode(record))
            staged.replace(path)
        except OSError as error:
            raise ConfigError(
                Code.CONFIG_UNREADABLE, f"{path} cannot be written: {os.strerror(error.errno or 0)}"
            ) from error

    def remove(self, id: str) -> None:
        """Forget it; nothing if it was not there. A file that stays is harmless: its socket gets no VMM."""
        try:
            self._path(id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("prepared.not_removed", migration=id, error=str(error))

    def load(self) -> Iterator[PreparedRecord]:
        """Yield what is there; unreadable files are reported and left alone."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=PreparedRecord)
            except (OSError, msgspec.DecodeError) as error:
                log.error("prepared.unreadable", path=str(path), error=str(error))
