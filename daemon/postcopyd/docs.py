"""Generated parts of docs/: `python -m postcopyd.docs` writes them, `--check` fails if they are stale.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; the rest of a page is prose.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .config import render_markdown
from .errors import CATALOGUE
from .ledger import PageCommand, PageEvent, PageState, transition
from .status import NEXT_STATES

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).resolve().parents[2] / "docs"
_PART = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end: \1 -->", re.DOTALL)


def ledger_table() -> str:
    """The transitions of daemon/native/ledger.c: rows events, columns states."""
    lines = [
        "| event | " + " | ".join(state.name for state in PageState) + " |",
        "|---|" + "---|" * len(PageState),
    ]
    for event in PageEvent:
        cells = []
        for state in PageState:
            after, command = transition(event, state)
            arrow = "" if after is state else f"→ {after.name} "
            cells.append(f"{arrow}{'' if command is PageCommand.NOTHING else command.name}".strip() or "·")
        lines.append(f"| {event.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ledger_diagram() -> str:
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> MISSING"]
    for state in PageState:
        by_target: dict[PageState, list[str]] = {}
        for event in PageEvent:
            after, _ = transition(event, state)
            if after is not state:
                by_target.setdefault(after, []).append(event.name.lower())
        lines += [
            f"    {state.name} --> {after.name}: {', '.join(names)}" for after, names in by_target.items()
        ]
    return "\n".join([*lines, "```"])


def session_diagram() -> str:
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> PREPARED"]
    for state, following in NEXT_STATES.items():
        lines += [
            f"    {state.name} --> {after.name}" for after in sorted(following, key=list(NEXT_STATES).index)
        ]
        if not following:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join([*lines, "```"])


def error_catalogue() -> str:
    lines = ["| code | exit status | meaning | what to do |", "|---|---|---|---|"]
    lines += [
        f"| `{code}` | {entry.error.exit_status} | {entry.meaning} | {entry.action} |"
        for code, entry in CATALOGUE.items()
    ]
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "ledger-table": ledger_table,
    "ledger-diagram": ledger_diagram,
    "session-diagram": session_diagram,
    "error-catalogue": error_catalogue,
    "configuration": render_markdown,
}


def render(page: str) -> str:
    """Return `page` with its generated parts made anew. Raises KeyError: a part that nobody makes."""

    def part(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- generated: {name} -->\n{PARTS[name]().strip()}\n<!-- end: {name} -->"

    return _PART.sub(part, page)


def stale_pages() -> list[Path]:
    """Pages whose generated parts are not what the code says now."""
    return [path for path in sorted(DOCS.glob("*.md")) if render(path.read_text()) != path.read_text()]


def main() -> int:
    """Write the pages, or with --check only name the stale ones; exit status 1 if there were any."""
    stale = stale_pages()
    for path in stale:
        sys.stdout.write(f"{'stale' if '--check' in sys.argv else 'written'}: {path.name}\n")
        if "--check" not in sys.argv:
            path.write_text(render(path.read_text()))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
