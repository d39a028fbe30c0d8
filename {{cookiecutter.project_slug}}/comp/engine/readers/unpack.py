"""Unpacks the host's archives, and writes nothing outside of the given folder.

All names are validated before the first byte is written, and bytes are counted while they are written, since
the sizes that an archive declares may be wrong. Links, devices and encrypted members are errors and not
skipped, as a missing file would be noticed too late. Modes, owners and times are not restored.
"""

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

from tqdm import tqdm

from comp.engine.errors import UserError
from comp.engine.readers.unicode_names import zip_name
from comp.engine.store import artifacts, paths

CHUNK = 2**20  # bytes
MAX_DEPTH = 3  # archives inside archives inside archives
MAX_MEMBERS = 5_000_000
# x.csv.gz is unpacked, x.nii.gz is an image and stays.
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
SUFFIXES = {**dict.fromkeys(TAR, "tar"), ".zip": "zip", ".7z": "7z"}
WINDOWS_DRIVE = re.compile(r"^[a-zA-Z]:")
ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile)


class DamagedArchive(Exception):
    """Raised for damaged bytes, which another download may repair. Malicious and unsupported archives raise
    UserError instead."""

    def __init__(self, archive: Path, what: str):
        super().__init__(f"{paths.relative(archive)}: {what}")


def _error(archive: Path, code: str, what: str, remedy: str = "") -> UserError:
    return UserError(code, where=paths.relative(archive), what=what, remedy=remedy)


def _hostile(archive: Path, what: str) -> UserError:
    return _error(archive, "archive-hostile", what, "do not use this archive")


@dataclass(frozen=True)
class Member:
    name: str
    size: int  # bytes, as the archive declares them
    open: Callable[[], Any]  # -> a context manager of a readable file


def archive_type(file: Path) -> str | None:
    """The type of an archive, by its name: .npz and .docx are zip files too, but must not be unpacked."""
    name = file.name.lower()
    for suffix, found in SUFFIXES.items():
        if name.endswith(suffix):
            return found
    inner = name.removesuffix(".gz")
    return "gz" if inner != name and inner.endswith(TABLES) else None


def stem(file: Path) -> str:
    """train.zip -> train, train.csv.gz -> train.csv, train.tar.gz -> train"""
    return re.sub(r"(\.tar)?\.(gz|bz2|xz|zip|7z|tgz|tar)$", "", file.name, flags=re.IGNORECASE)


# --- unpacking ----------------------------------------------------------------------------------------------


def unpack(
    archive: Path, folder: Path, ceiling: int, ask: Callable[[int], bool], progress: bool = False
) -> int:
    """All files of an archive, and of the archives in it, below `folder`; returns their bytes.

    More than `ceiling` bytes are unpacked only if ask(bytes) returns True.
    """
    budget = _Budget(ceiling, ask)
    folder.mkdir(parents=True, exist_ok=True)
    _unpack_level(archive, folder, budget, progress, depth=1)
    return budget.used


class _Budget:
    """Bytes of all levels together."""

    def __init__(self, ceiling: int, ask: Callable[[int], bool]):
        self.ceiling, self.ask, self.used = ceiling, ask, 0

    def reserve(self, size: int, archive: Path) -> None:
        """Counts the size that an archive declares; `spend` counts the bytes that are written."""
        total = self.used + size
        if total > self.ceiling:
            if not self.ask(total):
                raise _error(
                    archive,
                    "archive-large",
                    f"unpacks to {artifacts.format_size(total)}, more than the ceiling of "
                    f"{artifacts.format_size(self.ceiling)}",
                    f"if that is right: comp download --ceiling {-(-2 * total // 10**9)}",
                )
            self.ceiling = 2 * total  # do not ask again for the archives in it
        artifacts.require_space(size, f"unpacking {paths.relative(archive)}")

    def spend(self, size: int, archive: Path) -> None:
        self.used += size
        if self.used > self.ceiling:
            raise _hostile(archive, "holds more bytes than it declares, and more than the ceiling")


def _unpack_level(archive: Path, folder: Path, budget: _Budget, progress: bool, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _error(
            archive, "archive-nested", f"archives are nested more than {MAX_DEPTH} deep", "unpack it by hand"
        )
    written: list[Path] = []
    with open_archive(archive) as members:
        targets = _targets(archive, members, folder)
        budget.reserve(sum(member.size for member in members), archive)
        with tqdm(
            total=sum(member.size for member in members),
            desc=f"unpacking {archive.name}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if progress else True,
        ) as bar:
            for member, target in zip(members, targets, strict=True):
                _write(archive, member, target, budget, bar.update)
                written.append(target)
    for inner in [file for file in written if archive_type(file)]:
        _unpack_level(inner, _folder_of(inner), budget, progress, depth + 1)
        inner.unlink()


def _folder_of(archive: Path) -> Path:
    """The folder to unpack into: a train.zip with train/1.png in its own folder, one with 1.png in train/."""
    if archive_type(archive) == "gz":
        return archive.parent
    with open_archive(archive) as members:
        tops = {member.name.replace("\\", "/").split("/")[0] for member in members}
    return archive.parent if tops == {stem(archive)} else archive.parent / stem(archive)


def _write(
    archive: Path, member: Member, target: Path, budget: _Budget, on_bytes: Callable[[int], object]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise _error(
            archive,
            "file-exists",
            f"{member.name!r} exists already from another archive",
            "unpack it by hand",
        )
    written = 0
    with member.open() as source, target.open("xb") as file:
        while True:
            try:
                chunk = source.read(CHUNK)
            except (*ERRORS, OSError) as error:
                raise DamagedArchive(archive, f"{member.name!r} is damaged ({error})") from None
            if not chunk:
                break
            written += len(chunk)
            budget.spend(len(chunk), archive)
            try:
                file.write(chunk)
            except OSError as error:
                raise UserError(
                    "not-written",
                    where=paths.relative(target),
                    what=f"could not be written ({error.strerror})",
                    remedy="the same command starts again",
                ) from None
            on_bytes(len(chunk))
    if member.size >= 0 and written != member.size and archive_type(archive) != "gz":
        raise DamagedArchive(archive, f"{member.name!r} has {written} bytes instead of {member.size}")


def _targets(archive: Path, members: list[Member], folder: Path) -> list[Path]:
    """The target of each member. All are validated before the first one is written."""
    if len(members) > MAX_MEMBERS:
        raise _hostile(archive, f"{len(members)} members, more than {MAX_MEMBERS}")
    files: dict[str, str] = {}
    folders: set[str] = set()
    targets = []
    for member in members:
        parts = path_parts(archive, member.name)
        same = unicodedata.normalize("NFC", "/".join(parts))
        if same in files:
            raise _twice(archive, member.name)
        files[same] = member.name
        folders.update(
            "/".join(unicodedata.normalize("NFC", part) for part in parts[:i]) for i in range(1, len(parts))
        )
        targets.append(folder.joinpath(*parts))
    if both := sorted(folders & files.keys()):
        raise _hostile(archive, f"{both[0]!r} is a file and a folder in it")
    root = folder.resolve()
    for member, target in zip(members, targets, strict=True):
        if not target.resolve().is_relative_to(root):  # a link that was there before leads outside
            raise _hostile(archive, f"{member.name!r} is outside of {paths.relative(folder)}")
    return targets


def path_parts(archive: Path, name: str) -> list[str]:
    """The parts of a member's path, validated."""
    plain = name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    fault = ""
    if plain.startswith("/") or WINDOWS_DRIVE.match(plain):
        fault = "is an absolute path"
    elif ".." in parts:
        fault = "leads out of its folder"
    elif not parts or any(unicodedata.category(c) == "Cc" for c in plain):
        fault = "has control characters" if parts else "is empty"
    elif any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts) or len(plain) > 2000:
        fault = "is too long"
    elif any("\ud800" <= c <= "\udfff" for c in plain):
        fault = "is not UTF-8"
    if fault:
        raise _hostile(archive, f"the name {name[:80]!r} {fault}; nothing of this archive was unpacked")
    return parts


def _twice(archive: Path, name: str) -> UserError:
    return _error(archive, "archive-ambiguous", f"{name!r} is in it twice, and one would be lost")


def _special(archive: Path, name: str) -> UserError:
    return _hostile(archive, f"{name!r} is a link or a device, not a file")


# --- types of archive ---------------------------------------------------------------------------------------


@contextmanager
def open_archive(archive: Path) -> Iterator[list[Member]]:
    """The files in an archive, with unchanged names. Raises for members that are neither file nor folder."""
    try:
        with OPENERS[str(archive_type(archive))](archive) as members:
            yield members
    except ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedArchive(archive, f"is damaged ({reason})") from None
    except NotImplementedError as error:
        what = f"uses a compression that Python cannot read ({error})"
        raise _error(archive, "archive-unsupported", what, "unpack it by hand") from None


@contextmanager
def _zip(archive: Path) -> Iterator[list[Member]]:
    with zipfile.ZipFile(archive) as opened:
        members, end = [], 0
        for info in sorted(opened.infolist(), key=lambda info: info.header_offset):
            mode = info.external_attr >> 16
            if info.flag_bits & 1:
                raise _error(
                    archive, "archive-encrypted", f"{info.filename!r} is encrypted", "unpack it by hand"
                )
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _special(archive, info.filename)
            if info.header_offset < end:  # several names for the same packed bytes: a zip bomb
                raise _hostile(archive, "its members overlap")
            end = info.header_offset + 30 + info.compress_size
            if info.is_dir():
                path_parts(archive, info.filename)
                continue
            # zipfile truncates a name at a NUL; the original name is passed on, and path_parts raises for it.
            name = zip_name(info) if info.orig_filename == info.filename else info.orig_filename
            members.append(Member(name, info.file_size, partial(opened.open, info)))
        yield members


@contextmanager
def _tar(archive: Path) -> Iterator[list[Member]]:
    with tarfile.open(archive, "r:*") as opened:
        members = []
        for info in opened:
            if info.isdir():
                path_parts(archive, info.name)
                continue
            if not info.isfile() or info.issparse():
                raise _special(archive, info.name)
            members.append(Member(info.name, info.size, partial(opened.extractfile, info)))
            if len(members) > MAX_MEMBERS:
                break
        yield members


@contextmanager
def _gz(archive: Path) -> Iterator[list[Member]]:
    """The single file of a .gz, named after the archive, since the name inside is arbitrary. Its size is
    unknown until it is read."""
    yield [Member(stem(archive), 0, partial(gzip.open, archive))]


@contextmanager
def _7z(archive: Path) -> Iterator[list[Member]]:
    try:
        import py7zr
        from py7zr.exceptions import ArchiveError
    except ImportError:
        raise _error(archive, "package-missing", ".7z needs py7zr", "pip install py7zr") from None
    try:
        with py7zr.SevenZipFile(archive) as opened:
            if opened.needs_password():
                raise _error(archive, "archive-encrypted", "is encrypted", "unpack it by hand")
            sizes: dict[str, int] = {}
            for info in opened.list():
                if getattr(info, "is_symlink", False) or not (info.is_directory or info.is_file):
                    raise _special(archive, info.filename)
                path_parts(archive, info.filename)
                if not info.is_directory:
                    if info.filename in sizes:
                        raise _twice(archive, info.filename)
                    sizes[info.filename] = info.uncompressed
            solid = _Solid(archive, sizes)
            try:
                yield [Member(name, size, partial(solid.open, name)) for name, size in sizes.items()]
            finally:
                solid.close()
    except (ArchiveError, OSError, EOFError, lzma.LZMAError) as error:
        raise DamagedArchive(archive, f"is damaged ({error})") from None


class _Solid:
    """Unpacks all members of a 7z together, since they are one stream, into numbered temporary files."""

    def __init__(self, archive: Path, sizes: dict[str, int]):
        self.archive, self.sizes = archive, sizes
        self.folder = archive.with_name(f".{archive.name}.members")
        self.numbers = {name: str(i) for i, name in enumerate(sizes)}
        self.close()

    def open(self, name: str) -> IO[bytes]:
        if not self.folder.exists():
            self._unpack()
        return (self.folder / self.numbers[name]).open("rb")

    def _unpack(self) -> None:
        import py7zr

        self.folder.mkdir()
        written: list[Any] = []

        def create(name: str) -> Any:
            written.append(_counting(self.archive, self.folder / self.numbers[name], self.sizes[name]))
            return written[-1]

        for number in self.numbers.values():
            (self.folder / number).touch()  # py7zr does not create empty members
        with py7zr.SevenZipFile(self.archive) as packed:
            packed.extractall(factory=type("Files", (), {"create": staticmethod(create)})())
        for each in written:
            each.file.close()

    def close(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _counting(archive: Path, target: Path, size: int) -> Any:
    """A file that py7zr writes to; it raises after the declared size."""
    from py7zr.io import Py7zIO

    class Counting(Py7zIO):
        def __init__(self) -> None:
            self.file, self.written = target.open("w+b"), 0

        def write(self, data: Any) -> int:
            self.written += len(data)
            if self.written > size:
                raise _hostile(archive, "holds more bytes than it declares")
            return self.file.write(data)

        def read(self, size: int | None = None) -> bytes:
            return self.file.read(-1 if size is None else size)

        def seek(self, offset: int, whence: int = 0) -> int:
            return self.file.seek(offset, whence)

        def flush(self) -> None:
            self.file.flush()

        def size(self) -> int:
            return self.written

    return Counting()


OPENERS: dict[str, Any] = {"zip": _zip, "tar": _tar, "gz": _gz, "7z": _7z}
