"""What lies in an archive: its files, with names as they stand there and ways to read them. Whatever is no plain file or
folder is refused here; what a name may be is decided here, too."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from comp.engine.errors import Refused
from comp.engine.readers.unicode_names import zip_name
from comp.engine.store import paths

MEMBERS = 5_000_000
TABLES = (
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".txt",
    ".parquet",
)  # x.csv.gz is unpacked; x.nii.gz is a picture and stays
WINDOWS = re.compile(r"^[a-zA-Z]:")
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile)


class DamagedArchive(Exception):
    """The bytes are broken: fetching them again may help. A hostile archive is Refused: it would not."""


@dataclass(frozen=True)
class Member:
    name: str
    size: int
    open: Callable[[], Any]  # -> a context manager that gives a readable file


def kind(file: Path) -> str | None:
    """By name, as hosts mean it: a .npz or .docx is a zip too, and nobody wants it unpacked."""
    name = file.name.lower()
    for suffix, found in (
        (".tar.gz", "tar"),
        (".tgz", "tar"),
        (".tar.bz2", "tar"),
        (".tar.xz", "tar"),
        (".tar", "tar"),
        (".zip", "zip"),
        (".7z", "7z"),
    ):
        if name.endswith(suffix):
            return found
    inner = name.removesuffix(".gz")
    return "gz" if inner != name and inner.endswith(TABLES) else None


def stem(file: Path) -> str:
    """train.zip -> train, train.csv.gz -> train.csv, train.tar.gz -> train"""
    return re.sub(r"(\.tar)?\.(gz|bz2|xz|zip|7z|tgz|tar)$", "", file.name, flags=re.IGNORECASE)


def path_parts(archive: Path, name: str) -> list[str]:
    plain = name.replace("\\", "/")
    found = [part for part in plain.split("/") if part not in ("", ".")]
    wrong = ""
    if plain.startswith("/") or WINDOWS.match(plain):
        wrong = "is an absolute path"
    elif ".." in found:
        wrong = "leads out of its folder"
    elif not found or any(unicodedata.category(c) == "Cc" for c in plain):
        wrong = "has control characters in it" if found else "is no name"
    elif any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in found) or len(plain) > 2000:
        wrong = "is too long"
    elif any("\ud800" <= c <= "\udfff" for c in plain):
        wrong = "is not UTF-8"
    if wrong:
        raise Refused(
            f"{paths.relative(archive)}: the name {name[:80]!r} {wrong}; nothing of this archive was unpacked"
        )
    return found


# --- kinds ---------------------------------------------------------------------------------------------------------------


@contextmanager
def open_archive(archive: Path) -> Iterator[list[Member]]:
    """The files in it, names as they stand there. Refuses what is no file and no folder."""
    try:
        with OPENERS[str(kind(archive))](archive) as members:
            yield members
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        gzip.BadGzipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedArchive(f"{paths.relative(archive)}: is damaged ({reason})") from None
    except NotImplementedError as error:
        raise Refused(
            f"{paths.relative(archive)}: packed in a way that Python cannot read ({error}); unpack it by hand"
        ) from None


@contextmanager
def _zip(archive: Path) -> Iterator[list[Member]]:
    with zipfile.ZipFile(archive) as opened:
        found, end = [], 0
        for info in sorted(opened.infolist(), key=lambda info: info.header_offset):
            mode = info.external_attr >> 16
            if info.flag_bits & 1:
                raise Refused(f"{paths.relative(archive)}: {info.filename!r} is encrypted; unpack it by hand")
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise Refused(
                    f"{paths.relative(archive)}: {info.filename!r} is a link or a device, not a file"
                )
            if info.header_offset < end:  # many names for the same packed bytes: a bomb
                raise Refused(f"{paths.relative(archive)}: members overlap, it is not to be trusted")
            end = info.header_offset + 30 + info.compress_size
            if info.is_dir():
                path_parts(archive, info.filename)
                continue
            found.append(Member(_name(info), info.file_size, partial(opened.open, info)))
        yield found


def _name(info: zipfile.ZipInfo) -> str:
    """As it stands there, also what zipfile cuts off behind a NUL: `parts` refuses that."""
    return zip_name(info) if info.orig_filename == info.filename else info.orig_filename


@contextmanager
def _tar(archive: Path) -> Iterator[list[Member]]:
    with tarfile.open(archive, "r:*") as opened:
        found = []
        for info in opened:
            if info.isdir():
                path_parts(archive, info.name)
                continue
            if not info.isfile() or info.issparse():
                raise Refused(f"{paths.relative(archive)}: {info.name!r} is a link or a device, not a file")
            found.append(Member(info.name, info.size, partial(opened.extractfile, info)))
            if len(found) > MEMBERS:
                break
        yield found


@contextmanager
def _gz(archive: Path) -> Iterator[list[Member]]:
    """One file, named like the archive: the name inside may say anything. Its size is known when it is read."""
    yield [Member(stem(archive), 0, partial(gzip.open, archive))]


@contextmanager
def _7z(archive: Path) -> Iterator[list[Member]]:
    try:
        import py7zr
        from py7zr.exceptions import ArchiveError
    except ImportError:
        raise Refused(
            f"{paths.relative(archive)}: .7z needs a package of its own: pip install py7zr"
        ) from None
    try:
        with py7zr.SevenZipFile(archive) as opened:
            if opened.needs_password():
                raise Refused(f"{paths.relative(archive)}: is encrypted; unpack it by hand")
            found, sizes = [], {}
            for info in opened.list():
                if getattr(info, "is_symlink", False) or not (info.is_directory or info.is_file):
                    raise Refused(
                        f"{paths.relative(archive)}: {info.filename!r} is a link or a device, not a file"
                    )
                path_parts(archive, info.filename)
                if not info.is_directory:
                    if info.filename in sizes:
                        raise Refused(
                            f"{paths.relative(archive)}: holds {info.filename!r} twice; one of them would be lost"
                        )
                    sizes[info.filename] = info.uncompressed
            solid = _Solid(archive, sizes)
            found = [Member(name, size, partial(solid.open, name)) for name, size in sizes.items()]
            try:
                yield found
            finally:
                solid.close()
    except (ArchiveError, OSError, EOFError, lzma.LZMAError) as error:
        raise DamagedArchive(f"{paths.relative(archive)}: is damaged ({error})") from None


class _Solid:
    """Members of a 7z are packed as one stream, so they are unpacked together, into files of ours with names of ours."""

    def __init__(self, archive: Path, sizes: dict[str, int]):
        self.archive, self.sizes = archive, sizes
        self.folder = archive.with_name(f".{archive.name}.members")
        self.names = {name: str(i) for i, name in enumerate(sizes)}
        self.close()

    def open(self, name: str) -> IO[bytes]:
        if not self.folder.exists():
            self._unpack()
        return (self.folder / self.names[name]).open("rb")

    def _unpack(self) -> None:
        import py7zr

        self.folder.mkdir()
        written: list[Any] = []

        def create(name: str) -> Any:
            written.append(_counted(self.archive, self.folder / self.names[name], self.sizes[name]))
            return written[-1]

        for number in self.names.values():
            (self.folder / number).touch()  # empty ones are not announced
        with py7zr.SevenZipFile(self.archive) as packed:
            packed.extractall(factory=type("Files", (), {"create": staticmethod(create)})())
        for each in written:
            each.file.close()

    def close(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _counted(archive: Path, place: Path, promised: int) -> Any:
    from py7zr.io import Py7zIO

    class Counted(Py7zIO):
        def __init__(self) -> None:
            self.file, self.written = place.open("w+b"), 0

        def write(self, data: Any) -> int:
            self.written += len(data)
            if self.written > promised:
                raise Refused(f"{paths.relative(archive)}: holds more than it says; it is not to be trusted")
            return self.file.write(data)

        def read(self, size: int | None = None) -> bytes:
            return self.file.read(-1 if size is None else size)

        def seek(self, offset: int, whence: int = 0) -> int:
            return self.file.seek(offset, whence)

        def flush(self) -> None:
            self.file.flush()

        def size(self) -> int:
            return self.written

    return Counted()


OPENERS: dict[str, Any] = {"zip": _zip, "tar": _tar, "gz": _gz, "7z": _7z}
