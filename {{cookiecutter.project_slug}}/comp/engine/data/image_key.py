"""The text that names one image in data/samples.parquet: its files under raw, and the values of its row for
load_image.

    train/7.png                      one file
    red/7.png//green/7.png           two files that are channels of one image
    train/7.png///{"x":"3","w":"9"}  the values of competition.image_columns in this row

The separators are unambiguous because a path has no empty part, while a + or a brace may be in a file's name.
The text is the key in the image cache, so two rows with crops of one file have separate entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

CHANNELS, ROW = "//", "///"

Row = Mapping[str, str | None]  # column -> the cell as it is in the file; None for an empty one


def joined(files: Sequence[str]) -> str:
    return CHANNELS.join(files)


def with_row(paths: str, row: Row) -> str:
    return f"{paths}{ROW}{json.dumps(row, ensure_ascii=False, separators=(',', ':'))}"


def paths(key: str) -> str:
    """The key without the values of the row."""
    return key.partition(ROW)[0]


def files(key: str) -> list[str]:
    return paths(key).split(CHANNELS)


def row(key: str) -> dict[str, str | None]:
    values = key.partition(ROW)[2]
    return json.loads(values) if values else {}


def shown(key: str) -> str:
    """The key in the form for messages: `train/7.png (x=3, w=9)`."""
    values = ", ".join(f"{column}={value}" for column, value in row(key).items())
    return " + ".join(files(key)) + (f" ({values})" if values else "")
