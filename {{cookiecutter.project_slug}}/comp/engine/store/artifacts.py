"""How artifacts are written and read back, so that a process killed at any moment damages nothing.

1. A file is written under a temporary name, flushed to disk and renamed (`atomic`).
2. `add_to_manifest` then records its sha256 in the manifest.json of its folder. An entry means: complete, and
   these bytes.
3. `verified` is called before an artifact is read: it raises if there is no entry or the bytes differ.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from comp.engine import hardware
from comp.engine.errors import UserError
from comp.engine.store import paths, process

MANIFEST = "manifest.json"


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it replaces `file` once all its bytes are on disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{process.own_id()}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(
            "file-unwritable",
            where=paths.relative(file),
            what=f"could not be written ({error.strerror})",
            remedy="the previous file is unchanged",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file-missing", where=paths.relative(file), what="no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            "file-damaged", where=paths.relative(file), what=f"damaged: not valid JSON ({error})"
        ) from None


def add_to_manifest(*files: Path, **facts: Any) -> None:
    """Record in the folder's manifest that these files are complete. Call it after the last write."""
    folder = files[0].parent
    assert all(file.parent == folder for file in files)
    with flock(folder / f".{MANIFEST}.guard"):
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        manifest |= {f.name: {"sha256": sha256(f), "size": f.stat().st_size, **facts} for f in files}
        write_json(folder / MANIFEST, dict(sorted(manifest.items())))


def remove_from_manifest(file: Path) -> None:
    with flock(file.parent / f".{MANIFEST}.guard"):
        manifest = read_json(file.parent / MANIFEST) if (file.parent / MANIFEST).exists() else {}
        if manifest.pop(file.name, None):
            write_json(file.parent / MANIFEST, manifest)


def manifest_entry(file: Path) -> dict[str, Any] | None:
    """The file's entry in the manifest, without reading the file; None if it is unfinished or absent."""
    if not file.exists() or not (file.parent / MANIFEST).exists():
        return None
    entry = read_json(file.parent / MANIFEST).get(file.name)
    return dict(entry) if entry else None


def verified(file: Path, remedy: str = "") -> Path:
    """Returns `file` if its sha256 is the one in the manifest, otherwise raises UserError with `remedy`."""
    stamps = stamp(file), stamp(file.parent / MANIFEST)
    if stamps[0] is not None and _verified.get(file) == stamps:
        return file
    where = paths.relative(file)
    if stamps[0] is None:
        raise UserError("file-missing", where=where, what="no such file", remedy=remedy)
    entry = manifest_entry(file)
    if entry is None:
        raise UserError(
            "file-unfinished",
            where=where,
            what=f"unfinished: {MANIFEST} in its folder does not list it",
            remedy=remedy,
        )
    if entry.get("size") != stamps[0].size or entry.get("sha256") != sha256(file):
        what = f"damaged or changed since it was written (sha256 differs from {MANIFEST})"
        raise UserError("file-damaged", where=where, what=what, remedy=remedy)
    if all(x is not None and x.settled for x in stamps):
        _verified[file] = stamps
    return file


class Stamp(NamedTuple):
    """Detects a changed file without reading it. Not reliable for a file written less than 50 ms ago: one
    that changes twice within a tick of the file system's clock keeps its mtime."""

    inode: int
    size: int
    mtime: int  # ns

    @property
    def settled(self) -> bool:
        return time.time_ns() - self.mtime > 50_000_000


_hashes: dict[Path, tuple[Stamp, str]] = {}
_verified: dict[Path, tuple[Stamp | None, Stamp | None]] = {}


def stamp(file: Path) -> Stamp | None:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def sha256(file: Path) -> str:
    """Hash of a file, cached in this process: with the same inode, size and mtime it is not read again."""
    now = stamp(file)
    if now is not None and file in _hashes and _hashes[file][0] == now:
        return _hashes[file][1]
    settled = now is not None and now.settled
    with file.open("rb") as opened:
        hashed = hashlib.file_digest(opened, "sha256").hexdigest()
    if settled and now is not None:
        _hashes[file] = (now, hashed)
    return hashed


def hash_files(files: Iterable[Path]) -> None:
    """Fill the cache of `sha256` for many files on all cores, before they are read one by one."""
    new = [file for file in files if file not in _hashes]
    with ThreadPoolExecutor(hardware.cores()) as pool:
        list(pool.map(sha256, new))


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_space(size: int, writer: str) -> None:
    """Raises UserError if the disk has no room for `size` bytes and a reserve of 256 MB."""
    free = shutil.disk_usage(paths.root()).free
    if free < size + 2**28:
        raise UserError(
            "disk-full",
            what=f"{writer} will write {format_size(size)}, and only {format_size(free)} are free",
            remedy="`comp clean` lists what can be deleted",
        )


def format_size(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def move_to_trash(folder: Path) -> Path:
    """Moves an old run to runs/.trash. Commands that train delete nothing; `comp clean` empties the trash."""
    trash = paths.path("runs", ".trash")
    trash.mkdir(parents=True, exist_ok=True)
    target = trash / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}"
    os.replace(folder, target)
    return target


@contextmanager
def flock(file: Path) -> Iterator[None]:
    """Exclusive lock between processes, for a check and the write that depends on it. Never fork while it is
    held: children inherit it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
