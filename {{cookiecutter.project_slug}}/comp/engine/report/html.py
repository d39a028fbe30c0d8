"""A report as one HTML file: lines of text, a table, and images that are embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from comp.engine.store import artifacts

# In brackets, since the braces of a template belong to cookiecutter in this repository.
LAYOUT = """<!doctype html>
<meta charset="utf-8">
<title>[[ title ]]</title>
<style>
  body { font: 14px sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
  td, th { border-top: 1px solid #ddd; padding: .2em .8em; text-align: left }
  img { max-width: 100% }
</style>
<h1>[[ title ]]</h1>
<p>[% for line in lines %][[ line ]]<br>[% endfor %]</p>
<table>
  <tr>[% for name in columns %]<th>[[ name ]]</th>[% endfor %]</tr>
[% for row in rows %]  <tr>[% for cell in row %]<td>[[ cell ]]</td>[% endfor %]</tr>
[% endfor %]</table>
[% for name, bytes in images %]<h2>[[ name ]]</h2>
<img alt="[[ name ]]" src="data:image/png;base64,[[ bytes ]]">
[% endfor %]"""


def write(
    file: Path,
    title: str,
    lines: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    images: Sequence[Path],
) -> Path:
    from jinja2 import Environment, StrictUndefined

    layout = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
    ).from_string(LAYOUT)
    embedded = [(image.stem, base64.b64encode(image.read_bytes()).decode()) for image in images]
    artifacts.write_text(
        file, layout.render(title=title, lines=lines, columns=columns, rows=rows, images=embedded)
    )
    return file
