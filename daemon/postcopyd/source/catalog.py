"""The images of a page server by id, from their opening to their release."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from postcopyd._native.image import CatalogTable, ImageFileError, NativePageStream, StreamLimits
from postcopyd.errors import Code, ConfigError, SourceError

from .image import Image, ImageSpec, open_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = structlog.get_logger(__name__)


class Catalog:
    """Owns the images' files. An image that was released keeps its entry, so that Complete can be repeated.

    Args:
        specs: what to open.
        keep: Complete does not release.
    Raises:
        ConfigError: a file is unreadable, or an id is named twice.
    """

    def __init__(self, specs: Iterable[ImageSpec], *, keep: bool = False) -> None:
        self._keep = keep
        self._table = CatalogTable()
        self._images: dict[str, Image] = {}
        self.all_released = asyncio.Event()
        for spec in specs:
            if spec.id in self._images:
                raise ConfigError(Code.ARGUMENT_INVALID, f"image {spec.id} is named twice")
            image = open_image(spec)
            if not self._table.add(spec.id, image.file):
                raise ConfigError(Code.ARGUMENT_INVALID, f"image {spec.id!r} has no possible id")
            self._images[spec.id] = image
            log.info(
                "image.opened",
                image=spec.id,
                path=spec.path,
                epoch=f"{image.file.epoch:#018x}",
                size_bytes=image.file.size_bytes,
                in_memory=image.file.in_memory,
            )

    def __iter__(self) -> Iterator[Image]:
        return iter(self._images.values())

    def __len__(self) -> int:
        return len(self._images)

    def get(self, image_id: str) -> Image:
        """Return an image that is served.

        Raises:
            SourceError: SOURCE_UNKNOWN_IMAGE: there is none, or it was released.
        """
        image = self._images.get(image_id)
        if image is None or image.file.is_released:
            raise SourceError(Code.SOURCE_UNKNOWN_IMAGE, "this source has no such image")
        return image

    def get_epoch(self, image_id: str, epoch: int) -> Image:
        """Return an image that is served, if its epoch is this one.

        Raises:
            SourceError: SOURCE_UNKNOWN_IMAGE or SOURCE_OTHER_EPOCH.
        """
        return _with_epoch(self.get(image_id), epoch)

    def open_stream(self, limits: StreamLimits) -> NativePageStream:
        return NativePageStream(self._table, limits)

    def complete(self, image_id: str, epoch: int) -> bool:
        """Let an image go, and return whether it is gone. Idempotent: repeated, it answers the same.

        Raises:
            SourceError: SOURCE_UNKNOWN_IMAGE or SOURCE_OTHER_EPOCH.
        """
        if image_id not in self._images:
            raise SourceError(Code.SOURCE_UNKNOWN_IMAGE, "this source has no such image")
        image = _with_epoch(self._images[image_id], epoch)
        if self._keep:
            return False
        image.file.release()
        if all(other.file.is_released for other in self):
            self.all_released.set()
        return True

    def close(self) -> None:
        """Close all files; idempotent."""
        for image in self:
            image.file.release()


def read_holes(image: Image, cursor: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the next cursor and some holes; ends when the cursor is the size. Walks extents: for a thread.

    Raises:
        SourceError: IMAGE_SHRANK or SOURCE_UNKNOWN_IMAGE.
    """
    try:
        return image.file.holes(cursor)
    except ImageFileError as error:
        code = Code.SOURCE_UNKNOWN_IMAGE if image.file.is_released else Code.IMAGE_SHRANK
        raise SourceError(code, f"the holes of image {image.id} cannot be read: {error.reason}") from error


def _with_epoch(image: Image, epoch: int) -> Image:
    if image.file.epoch != epoch:
        raise SourceError(
            Code.SOURCE_OTHER_EPOCH,
            f"the image's epoch is {image.file.epoch:016x}, not {epoch:016x}: other content",
        )
    return image
