"""é is one character (NFC, as most tables have it) or an e and an accent (NFD, as macOS writes file names): the same text, other
bytes. Names are compared as NFC, and written as whoever wrote them first."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from functools import cache
from pathlib import Path


def nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def on_disk(raw: Path, name: str) -> str:
    """The path under raw as the disk spells it; as it is where there is none, or beyond an archive."""
    if name.isascii() or os.path.exists(raw / name):
        return name
    found: list[str] = []
    parts = name.split("/")
    for number, part in enumerate(parts):
        folder = raw.joinpath(*found)
        if not folder.is_dir():
            return "/".join([*found, *parts[number:]])
        there = (folder / part).exists()
        found.append(
            part if there else _spelled(str(folder), os.stat(folder).st_mtime_ns).get(nfc(part), part)
        )
    return "/".join(found)


@cache
def _spelled(folder: str, mtime: int) -> dict[str, str]:
    """NFC -> the name there."""
    return {nfc(name): name for name in os.listdir(folder) if not name.isascii()}


def zip_name(info: zipfile.ZipInfo) -> str:
    """macOS writes UTF-8 without the flag that says so, and zipfile reads it as the DOS characters of 1981."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
