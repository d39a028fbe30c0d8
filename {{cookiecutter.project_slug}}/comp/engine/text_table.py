"""Plain tables for a terminal: text to the left, numbers to the right."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence


def render(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """`right` names the columns that are set flush right."""
    lines = [heading, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    flush = [str.rjust if name in right else str.ljust for name in heading]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(flush, line, widths, strict=True)).rstrip()
        for line in lines
    )


def cut_to_terminal(text: str) -> str:
    """Cuts long lines at the width of a terminal; in a file or a pipe everything stays."""
    if not sys.stdout.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 60)
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in text.splitlines())
