"""File names and labels are compared in Unicode's NFC, and written as they are where they come from. é is one
character in NFC, as most tables have it, and an e with an accent in NFD, as macOS writes file names: the same
text in other bytes.
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
    """The path under raw in the spelling of the disk. What does not exist, and members of archives, stay as
    they are."""
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
    """NFC -> the name on the disk."""
    return {nfc(name): name for name in os.listdir(folder) if not name.isascii()}


def zip_name(info: zipfile.ZipInfo) -> str:
    """macOS writes UTF-8 without setting the flag, so zipfile decodes it as code page 437."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
