"""Tables for the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence


def render(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """`right`: names of columns that are aligned right, as numbers are."""
    lines = [heading, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    align = [str.rjust if name in right else str.ljust for name in heading]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )


def cut_to_terminal(text: str) -> str:
    """Cuts long lines at the width of a terminal; in a file or a pipe everything stays."""
    if not sys.stdout.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 60)
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in text.splitlines())
