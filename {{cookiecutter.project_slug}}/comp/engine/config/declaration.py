"""Mistakes in configs/competition.yaml that show only when the tables are read: the error names the line of
the key."""

from __future__ import annotations

from comp.engine.config import yaml_lines
from comp.engine.errors import UserError
from comp.engine.store import paths

FILE = "configs/competition.yaml"


def error(code: str, key: str, what: str, remedy: str = "") -> UserError:
    """`key` as it is nested there: "train.image"."""
    return UserError(code, where=where(key), key=key, what=what, remedy=remedy)


def where(key: str) -> str:
    """The file with the line of `key`, or of the section that it belongs to; the file alone if neither is
    there."""
    file = paths.path(*FILE.split("/"))
    lines = yaml_lines.parse(file.read_bytes())[1] if file.is_file() else {}
    while key:
        if key in lines:
            return f"{FILE}:{lines[key]}"
        key = key.rpartition(".")[0]
    return FILE
