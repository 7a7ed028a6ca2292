"""Tells the hand-off formats apart by their first bytes, so that one socket serves them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import Code, HandoffError
from .firecracker import FirecrackerParser
from .framed import LENGTH, FramedParser
from .message import BLANKS, UFFD, HandoffMessage, HandoffParser, Incomplete, Missing

if TYPE_CHECKING:
    from collections.abc import Set

MAX_DESCRIPTORS = 16
"""More than any format has; a bound for as long as the format is not known."""

_MAX_LEADING_BLANKS = 64


class FormatDetector:
    """A HandoffParser that finds out which format it reads, then leaves the work to that format's parser.

    A framed length may begin with any byte, `[` and blanks included. But its fourth byte is NUL for anything
    below 16 MiB, which JSON text never contains: so four bytes decide, and a fifth tells a frame from noise.
    """

    def __init__(self, served: Set[str] = frozenset({UFFD})) -> None:
        self._served = served
        self._start = bytearray()
        self._parser: HandoffParser | None = None

    def feed(self, data: bytes, descriptors: int) -> Incomplete | HandoffMessage:
        """See HandoffParser.

        Raises:
            HandoffError: HANDOFF_UNKNOWN_FORMAT, or what the format's parser raises.
        """
        if descriptors > MAX_DESCRIPTORS:
            raise HandoffError(
                Code.HANDOFF_EXTRA_DESCRIPTORS, f"{descriptors} descriptors came; no hand-off has that many"
            )
        if self._parser is not None:
            return self._parser.feed(data, descriptors)
        self._start += data
        self._parser = self._choose()
        if self._parser is None:
            return Incomplete(Missing.FIRST_BYTES)
        return self._parser.feed(bytes(self._start), descriptors)

    def _choose(self) -> HandoffParser | None:
        start = bytes(self._start)
        if len(start) < LENGTH.size:
            return None
        text = start.lstrip(BLANKS)
        if start[LENGTH.size - 1] != 0 and text.startswith(b"["):
            return FirecrackerParser()
        if start[LENGTH.size : LENGTH.size + 1] == b"{":
            return FramedParser(self._served)
        if len(start) == LENGTH.size or (not text and len(start) <= _MAX_LEADING_BLANKS):
            return None
        raise HandoffError(
            Code.HANDOFF_UNKNOWN_FORMAT,
            f"what connected is no VMM with a known hand-off; it began with {start[:16]!a}",
        )
