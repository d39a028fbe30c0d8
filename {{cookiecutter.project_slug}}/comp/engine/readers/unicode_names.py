"""Compares file names and labels by their Unicode NFC form; they are stored and written as they were read.
é is one character in NFC, which most tables use, and an e with a combining accent in NFD, which macOS uses
for file names: the same text in different bytes.
"""

from __future__ import annotations

import os
import unicodedata
import zipfile
from functools import cache
from pathlib import Path


def nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def on_disk(raw: Path, name: str) -> str:
    """The path under raw as it is spelt on disk. Missing files and members of archives are returned
    unchanged."""
    if name.isascii() or os.path.exists(raw / name):
        return name
    spelled: list[str] = []
    parts = name.split("/")
    for number, part in enumerate(parts):
        folder = raw.joinpath(*spelled)
        if not folder.is_dir():
            return "/".join([*spelled, *parts[number:]])
        if not (folder / part).exists():
            part = _by_nfc(str(folder), os.stat(folder).st_mtime_ns).get(nfc(part), part)
        spelled.append(part)
    return "/".join(spelled)


@cache
def _by_nfc(folder: str, mtime: int) -> dict[str, str]:
    """NFC form -> the name on disk."""
    return {nfc(name): name for name in os.listdir(folder) if not name.isascii()}


def zip_name(info: zipfile.ZipInfo) -> str:
    """macOS writes UTF-8 without setting the flag, so zipfile decodes it as code page 437."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
