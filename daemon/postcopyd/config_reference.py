"""The configuration's documentation, drawn from its declaration."""

from __future__ import annotations

import textwrap

import msgspec

from .config import keys


def render_markdown() -> str:
    """Return all keys as a Markdown table, for docs/operations.md."""
    lines = ["| key | type | default | meaning | variable |", "|---|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {key.type.replace('|', '&#124;')} | `{_toml(key.default)}` "
        f"| {key.description} | `{key.variable}` |"
        for key in keys()
    ]
    return "\n".join(lines) + "\n"


def render_example() -> str:
    """Return a TOML file with every key commented out at its default: deploy/postcopyd.toml."""
    lines = ["# postcopyd's configuration. Every key is shown with its default."]
    table = ""
    for key in keys():
        head, _, name = key.name.rpartition(".")
        if head != table:
            table = head
            lines += ["", f"[{table}]"]
        lines += ["", *textwrap.wrap(key.description, 110, initial_indent="# ", subsequent_indent="# ")]
        lines += [f"# Type: {key.type}. Variable: {key.variable}", f"#{name} = {_toml(key.default)}"]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()  # the same notation for text, numbers and lists
