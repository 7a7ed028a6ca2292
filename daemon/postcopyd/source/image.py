"""An image as the operator names it: `ID=PATH[@EPOCH]`, and the open file behind it."""

from __future__ import annotations

import re

import msgspec

from postcopyd._native.image import ImageFile, ImageFileError
from postcopyd.arguments import check_id
from postcopyd.errors import Code, ConfigError

# A path may hold `@` itself, so only what looks like a number in base 10 or 16 is an epoch.
_EPOCH = re.compile(r"(.+)@(0[xX][0-9a-fA-F]+|[0-9]+)")


class ImageSpec(msgspec.Struct, frozen=True):
    """epoch 0: derived from the file's identity and version."""

    id: str
    path: str
    epoch: int = 0


class Image(msgspec.Struct, frozen=True):
    """An image that is open."""

    spec: ImageSpec
    file: ImageFile

    @property
    def id(self) -> str:
        return self.spec.id


def parse_image(text: str) -> ImageSpec:
    """Return what `ID=PATH` or `ID=PATH@EPOCH` means; EPOCH is decimal or 0x… and not 0.

    Raises:
        ConfigError: ARGUMENT_INVALID.
    """
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ConfigError(Code.ARGUMENT_INVALID, f"{text!r} names no image; write ID=PATH or ID=PATH@EPOCH")
    check_id(name)
    match = _EPOCH.fullmatch(path)
    if match is None:
        return ImageSpec(name, path)
    epoch = int(match[2], 0) if match[2][:2] in ("0x", "0X") else int(match[2])
    if not 0 < epoch < 1 << 64:
        raise ConfigError(Code.ARGUMENT_INVALID, f"{text!r}: an epoch is a number from 1 to 2^64 - 1")
    return ImageSpec(name, match[1], epoch)


def open_image(spec: ImageSpec) -> Image:
    """Open the file of `spec`.

    Raises:
        ConfigError: IMAGE_UNREADABLE; the message names the file.
    """
    try:
        return Image(spec, ImageFile(spec.path, spec.epoch))
    except ImageFileError as error:
        raise ConfigError(
            Code.IMAGE_UNREADABLE, f"{spec.path} cannot be served as image {spec.id}: {error.reason}"
        ) from error
