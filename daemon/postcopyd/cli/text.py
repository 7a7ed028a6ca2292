"""Text for terminals."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` on one line without control characters: parts of it may come from a page source or a VMM."""
    return "".join(char if char.isprintable() else "?" for char in text.replace("\n", " "))
