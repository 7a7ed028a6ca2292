"""JSON from a VMM, read field by field: an error names the field, and nothing is converted on the quiet."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from ..errors import Code, HandoffError
from .regions import U64_LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DEPTH = 16
_MARKS = re.compile(rb'[\[{\]}"]')
_STRING_MARKS = re.compile(rb'["\\]')
_SHOWN = 40


class ValueEnd:
    """Finds where the JSON array or object at the start of a byte stream ends, looking at each byte once.

    A bare JSON value has no length, and trying to parse it whenever more bytes came would cost the square
    of its size. This follows only brackets and strings; whether what lies between is JSON, the parser says.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._position = 0

    def find(self, data: bytes | bytearray) -> int | None:
        """Return the length of the value including leading blanks, or None if it ends later.

        Args:
            data: everything so far; it must begin with what an earlier call was given.
        Raises:
            HandoffError: nested deeper than any hand-off is.
        """
        while match := (_STRING_MARKS if self._in_string else _MARKS).search(data, self._position):
            mark = match[0]
            if mark == b"\\" and match.end() == len(data):
                # What is escaped has not come yet: look at the backslash again when it has.
                self._position = match.start()
                return None
            self._position = match.end() + (mark == b"\\")
            if mark == b'"':
                self._in_string = not self._in_string
            elif mark in b"[{":
                self._depth += 1
            elif mark in b"]}":
                self._depth -= 1
                if self._depth <= 0:
                    return self._position
            if self._depth > MAX_DEPTH:
                raise HandoffError(
                    Code.HANDOFF_NOT_JSON, f"the hand-off nests deeper than {MAX_DEPTH} levels"
                )
        self._position = len(data)
        return None


def decode(body: bytes) -> object:
    """Return the JSON value in `body`.

    Raises:
        HandoffError: HANDOFF_NOT_JSON.
    """
    try:
        # Decoded here, as json.loads would take bytes for UTF-16 where it finds NULs.
        value: object = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise HandoffError(
            Code.HANDOFF_NOT_JSON, f"the hand-off is not JSON ({error}); it begins with {_show(body)}"
        ) from error
    return value


def as_object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    return value


def as_array(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise wrong(where, "an array", value)
    return value


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(where, "a string", value)
    return value


def unsigned(fields: Mapping[str, object], name: str, where: str, limit: int = U64_LIMIT) -> int:
    """Return the field `name`, a whole number below `limit`.

    Raises:
        HandoffError: HANDOFF_NOT_JSON: absent, negative, too large, a boolean, or with a point or exponent.
    """
    path = f"{where}.{name}"
    if name not in fields:
        raise HandoffError(Code.HANDOFF_NOT_JSON, f"the hand-off lacks {path}")
    value = fields[name]
    # bool is an int in Python, not in JSON.
    if type(value) is not int or not 0 <= value < limit:
        raise wrong(path, f"a whole number from 0 to {limit - 1}", value)
    return value


def wrong(where: str, expected: str, value: object) -> HandoffError:
    return HandoffError(
        Code.HANDOFF_NOT_JSON, f"the hand-off's {where} must be {expected}, not {_show(value)}"
    )


def _show(value: object) -> str:
    """Show a hostile value: short, printable, and never more work than its first few elements."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return "a number of more than 128 bits"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    text = ascii(value[:_SHOWN] if isinstance(value, bytes | str) else value)
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}…"
