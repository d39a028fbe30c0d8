"""Reads members of archives and other containers: `train.zip/0001.jpg` may be written wherever a path of the
raw folder is expected.

    zip, uncompressed tar     read in place
    7z, compressed tar, .gz   unpacked once into data/unpacked
    bson                      `train.bson/<_id>/0.jpg`: the images of a record, in their order
    npz, npy                  `x.npz/<key>` or `x.npz/<key>/17`, `x.npy/17`: one array of it, as .npy bytes
    parquet                   `x.parquet/<first column>`: the numbers of a row, as .npy bytes
    json                      `x.json/<id>/<field>`: a list of numbers, as .npy bytes

The type of a file is taken from its first bytes, never from its name. The leading
folders of a member may be left out if the rest is unambiguous. Everything here returns bytes, so decoders do
not depend on the container.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from comp.engine.errors import UserError
from comp.engine.readers.records import Bson, Json, Npy, Parquet, as_npy, from_npy, npy_shape
from comp.engine.readers.unicode_names import nfc, zip_name
from comp.engine.store import artifacts, locks, paths


class Container(Protocol):
    names: list[str]

    def __hash__(self) -> int: ...

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes: ...


def split(path: Path) -> tuple[Path, str] | None:
    """(container file, name of the member); None if no part of the path is a file."""
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
        if parent.is_dir():
            return None
    return None


def read(path: Path) -> bytes:
    parts = split(path)
    if parts is None:
        raise FileNotFoundError(2, "no such file", str(path))
    return _read(*parts)


def stat(path: str | Path) -> tuple[int, int] | None:
    """(bytes, mtime in ns) of a file or of a member; None if there is none."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except NotADirectoryError:
        parts = split(Path(path))
    except OSError:
        return None
    if parts is None:
        return None
    container = open_container(parts[0])
    name = _find(container, parts[1])
    return None if name is None else (container.size(name), os.stat(parts[0]).st_mtime_ns)


def members(file: Path) -> list[str]:
    return open_container(file).names


def is_container(file: Path) -> bool:
    return _container_type(file) is not None


def open_container(file: Path) -> Container:
    """Opens a container once per process: a forked loader process must not share the position in an open file
    with its parent."""
    return _opened(str(file), os.stat(file).st_mtime_ns, os.getpid())


@cache
def _opened(file: str, mtime: int, process: int) -> Container:
    path = Path(file)
    kind = _container_type(path)
    if kind is None:
        raise UserError(
            "container-unknown", where=paths.relative(path), what="is no archive, so it has no members"
        )
    try:
        return kind(path)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        struct.error,
        ValueError,
    ) as error:
        what = f"is damaged and cannot be opened ({error})"
        raise UserError("file-damaged", where=paths.relative(path), what=what) from None


def _read(file: Path, name: str) -> bytes:
    container = open_container(file)
    member = _find(container, name)
    if member is None:
        raise FileNotFoundError(2, f"no such member of {file.name}", name)
    try:
        return container.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise OSError(5, f"damaged in {file.name} ({error})", name) from None


def _find(container: Container, name: str) -> str | None:
    """The member of that name, or the only one whose path ends with it."""
    if name in _all(container):
        return name
    if name.isdecimal() and isinstance(container, Bson | Npy):
        return None
    member = _by_ending(container).get(name)
    return member if member or name.isascii() else _by_nfc(container).get(nfc(name))


@cache
def _all(container: Container) -> frozenset[str]:
    return frozenset(container.names)


@cache
def _by_ending(container: Container) -> dict[str, str]:
    """Ending of a path -> the path, for endings that only one member has."""
    by_ending: dict[str, str] = {}
    twice = set()
    for name in container.names:
        ending = name
        while "/" in ending:
            ending = ending.partition("/")[2]
            twice |= {ending} & by_ending.keys()
            by_ending[ending] = name
    return {ending: name for ending, name in by_ending.items() if ending not in twice}


@cache
def _by_nfc(container: Container) -> dict[str, str]:
    """NFC form of a name or an ending -> the path, for names that are not ASCII."""
    members = {name: name for name in container.names} | _by_ending(container)
    return {nfc(name): member for name, member in members.items() if not name.isascii()}


def _container_type(file: Path) -> Callable[[Path], Container] | None:
    with file.open("rb") as opened:
        head = opened.read(512)
    for start, kind in MAGIC.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return _Tar
    if file.suffix == ".bson" and len(head) > 4:
        return Bson
    if file.suffix == ".json" and head.lstrip()[:1] == b"[":
        return Json
    return None


class _Zip:
    def __init__(self, file: Path):
        self.file = zipfile.ZipFile(file)  # zipfile locks while reading, so threads may share it
        self.infos = {zip_name(info): info for info in self.file.infolist() if not info.is_dir()}
        self.sizes = {name: info.file_size for name, info in self.infos.items()}
        self.names = [name for name in self.sizes if not name.startswith("__MACOSX/")]
        if set(self.sizes) and all(name.endswith(".npy") for name in self.sizes):
            self._arrays()

    def _arrays(self) -> None:
        """The members of an .npz: arrays by name with or without the suffix, and images of a stack by
        index."""
        self.names += [name.removesuffix(".npy") for name in self.sizes]
        for name in list(self.sizes):
            shape = npy_shape(io.BytesIO(self.file.open(self.infos[name]).read(4096)), self.sizes[name])
            if (len(shape) > 2 and shape[-1] > 4) or len(shape) > 3:
                self.names += [f"{name.removesuffix('.npy')}/{i}" for i in range(shape[0])]

    def _member(self, name: str) -> tuple[str, int | None]:
        if name in self.sizes:
            return name, None
        if f"{name}.npy" in self.sizes:
            return f"{name}.npy", None
        stem, _, number = name.rpartition("/")
        return f"{stem}.npy", int(number)

    def size(self, name: str) -> int:
        return self.sizes[self._member(name)[0]]

    def read(self, name: str) -> bytes:
        member, number = self._member(name)
        if number is None:
            return self.file.read(self.infos[member])
        return as_npy(_stack(self, member)[number])


@cache
def _stack(container: _Zip, member: str) -> Any:
    return from_npy(container.file.read(member))


class _Tar:
    """An uncompressed tar, read in place by a table of offsets."""

    def __init__(self, file: Path):
        self.path = file
        with tarfile.open(file, "r:") as tar:
            self.places = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in tar if m.isreg()}
        self.names = list(self.places)

    def size(self, name: str) -> int:
        return self.places[name][1]

    def read(self, name: str) -> bytes:
        offset, size = self.places[name]
        with self.path.open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)


class _Unpacked:
    """A container that cannot be read in place: unpacked into data/unpacked; done.json is written last."""

    def __init__(self, file: Path):
        status = file.stat()
        key = artifacts.digest([file.name, status.st_size, status.st_mtime_ns])[:16]
        self.folder = paths.path("data", "unpacked", f"{file.stem}-{key}")
        done = self.folder / "done.json"
        with locks.lock(self.folder, f"unpacking {file.name}", wait=True):
            if not done.exists():
                print(
                    f"{paths.relative(file)}: unpacking once into {paths.relative(self.folder)} …", flush=True
                )
                artifacts.write_json(done, sorted(self._unpack(file)))
        self.names = artifacts.read_json(done)

    def _unpack(self, file: Path) -> Iterator[str]:
        if file.open("rb").read(6) == b"7z\xbc\xaf\x27\x1c":
            try:
                import py7zr
            except ImportError:
                raise UserError(
                    "package-missing",
                    where=paths.relative(file),
                    what="is a 7z archive, which needs py7zr",
                    remedy="pip install py7zr, or unpack it in its folder",
                ) from None
            with py7zr.SevenZipFile(file) as archive:
                names = [info.filename for info in archive.list() if not info.is_directory]
                _validate_members(file, names)
                archive.extractall(self.folder)
            yield from names
            return
        if not tarfile.is_tarfile(file):  # `train.csv.gz` is one file
            yield self._decompress(file)
            return
        with tarfile.open(file) as tar:
            for member in tar:
                if member.isreg():
                    tar.extract(member, self.folder, filter="data")  # raises for a path out of the folder
                    yield member.name.removeprefix("./")

    def _decompress(self, file: Path) -> str:
        stream = next(kind for start, kind in STREAMS.items() if file.open("rb").read(8).startswith(start))
        self.folder.mkdir(parents=True, exist_ok=True)
        with stream(file) as packed, (self.folder / file.stem).open("wb") as out:
            shutil.copyfileobj(packed, out, 2**20)
        return file.stem

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def _validate_members(file: Path, names: list[str]) -> None:
    for name in names:
        if name.startswith("/") or ".." in Path(name).parts:
            what = f"the path of the member {name!r} leads out of the folder"
            raise UserError("archive-hostile", where=paths.relative(file), what=what)


STREAMS: dict[bytes, Any] = {  # first bytes -> opens a path
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
MAGIC: dict[bytes, Callable[[Path], Container]] = {
    b"PK\x03\x04": _Zip,
    b"PK\x05\x06": _Zip,
    b"7z\xbc\xaf\x27\x1c": _Unpacked,
    **dict.fromkeys(STREAMS, _Unpacked),
    b"\x93NUMPY": Npy,
    b"PAR1": Parquet,
}
