"""Hostile archives: nothing is written outside of the folder, nothing runs."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from comp.engine.errors import UserError
from comp.engine.readers import unpack

Build = Callable[[Path], Path]
BOMB = b"\0" * 30_000_000


def zip_of(*names: str, data: bytes = b"x", **info: int) -> Build:
    def build(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
            for name in names:
                entry = zipfile.ZipInfo("x")
                entry.filename = name
                for key, value in info.items():
                    setattr(entry, key, value)
                entry.compress_type = zipfile.ZIP_DEFLATED
                out.writestr(entry, data)
        return folder / "a.zip"

    return build


def tar_of(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    suffix: str = ".tar",
    mode: str = "w",
    then: str = "",
) -> Build:
    def build(folder: Path) -> Path:
        with tarfile.open(folder / f"a{suffix}", mode) as out:  # type: ignore[call-overload]
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = kind, link, 0o4777
            entry.size = 1 if kind == tarfile.REGTYPE else 0
            out.addfile(entry, io.BytesIO(b"x"))
            if then:  # through a link that the archive itself has made
                more = tarfile.TarInfo(then)
                more.size = 1
                out.addfile(more, io.BytesIO(b"y"))
        return folder / f"a{suffix}"

    return build


def seven(name: str, link: bool = False, password: str | None = None) -> Build:
    def build(folder: Path) -> Path:
        import py7zr

        py7zr.py7zr.check_archive_path = lambda arcname: True  # the writer is more careful than an attacker
        with py7zr.SevenZipFile(folder / "a.7z", "w", password=password) as out:
            if link:
                (folder / "link").symlink_to("/etc/passwd")
                out.write(folder / "link", name)
            else:
                out.writef(io.BytesIO(b"x"), name)
        return folder / "a.7z"

    return build


def changed(build: Build, change: Callable[[bytes], bytes]) -> Build:
    def rebuilt(folder: Path) -> Path:
        file = build(folder)
        file.write_bytes(change(file.read_bytes()))
        return file

    return rebuilt


def raw(name: str, data: bytes) -> Build:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return build


def nested(depth: int) -> Build:
    data = b"x"
    for _ in range(depth):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("b.zip", data)
        data = out.getvalue()
    return raw("a.zip", data)


def inside(build: Build) -> Build:
    """The hostile archive within a harmless one."""

    def outer(folder: Path) -> Path:
        deep = folder / "deep"
        deep.mkdir()
        inner = build(deep)
        with zipfile.ZipFile(folder / "outer.zip", "w") as out:
            out.write(inner, inner.name)
        return folder / "outer.zip"

    return outer


def wrong_size(data: bytes) -> bytes:
    """The directory declares one byte instead of 30 MB."""
    at = data.rindex(b"PK\1\2")
    return data[: at + 24] + struct.pack("<I", 1) + data[at + 28 :]


def overlapping(data: bytes) -> bytes:
    """Two names for the same packed bytes."""
    first, second = data.index(b"PK\1\2"), data.rindex(b"PK\1\2")
    return data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :]


def xz_bomb(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar.xz", "w:xz") as out:
        entry = tarfile.TarInfo("a")
        entry.size = len(BOMB)
        out.addfile(entry, io.BytesIO(BOMB))
    return folder / "a.tar.xz"


LINK = (stat.S_IFLNK | 0o777) << 16
HOSTILE: dict[str, Build] = {
    "zip ..": zip_of("../evil"),
    "zip deep ..": zip_of("a/b/../../../evil"),
    "zip absolute": zip_of("/tmp/evil"),
    "zip backslash ..": zip_of("..\\evil"),
    "zip mixed slashes": zip_of("a\\..\\..\\evil"),
    "zip drive": zip_of("C:\\evil"),
    "zip drive relative": zip_of("c:evil"),
    "zip unc": zip_of("\\\\host\\share"),
    "zip newline": zip_of("a\nb"),
    "zip escape": zip_of("a\x1b[2Jb"),
    "zip long": zip_of("x" * 300),
    "zip very long": zip_of("a/" * 1500 + "x"),
    "zip dot": zip_of("."),
    "zip twice": zip_of("a", "a"),
    "zip twice, unicode": zip_of("\u00e9", "e\u0301"),
    "zip file and folder": zip_of("a", "a/b"),
    "zip good then evil": zip_of("good", "../evil"),
    "zip link": zip_of("a", data=b"/etc/passwd", external_attr=LINK),
    "zip device": zip_of("a", external_attr=(stat.S_IFBLK | 0o777) << 16),
    "zip fifo": zip_of("a", external_attr=(stat.S_IFIFO | 0o777) << 16),
    "zip encrypted": changed(zip_of("a"), lambda data: data[:6] + b"\1" + data[7:data.rindex(b"PK\1\2") + 8] + b"\1" + data[data.rindex(b"PK\1\2") + 9 :]),
    "zip bomb": zip_of("a", data=BOMB),
    "zip bomb, wrong size": changed(zip_of("a", data=BOMB), wrong_size),
    "zip overlapping": changed(zip_of("a", "b"), overlapping),
    "zip nested deep": nested(6),
    "zip in zip ..": inside(zip_of("../../evil")),
    "zip in zip bomb": inside(zip_of("a", data=BOMB)),
    "tar ..": tar_of("../evil"),
    "tar absolute": tar_of("/tmp/evil"),
    "tar gz ..": tar_of("../evil", suffix=".tar.gz", mode="w:gz"),
    "tar link": tar_of("a", tarfile.SYMTYPE, "/etc"),
    "tar link, then through it": tar_of("a", tarfile.SYMTYPE, "/tmp", then="a/evil"),
    "tar hard link": tar_of("a", tarfile.LNKTYPE, "/etc/passwd"),
    "tar device": tar_of("a", tarfile.CHRTYPE),
    "tar fifo": tar_of("a", tarfile.FIFOTYPE),
    "tar in zip, link": inside(tar_of("a", tarfile.SYMTYPE, "../..")),
    "tar file and folder": tar_of("a", then="a/b"),
    "gz bomb": raw("a.csv.gz", gzip.compress(BOMB)),
    "7z ..": seven("../evil"),
    "7z absolute": seven("/tmp/evil"),
    "7z link": seven("a", link=True),
    "7z encrypted": seven("a", password="x" * 9),
    "xz bomb": xz_bomb,
}  # fmt: skip
BROKEN: dict[str, Build] = {
    "zip cut": changed(zip_of("a", data=os.urandom(5000)), lambda data: data[:3000]),
    "zip bit": changed(
        zip_of("a", data=os.urandom(5000)), lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    ),
    "tar cut": changed(tar_of("a", suffix=".tar.gz", mode="w:gz"), lambda data: data[:40]),
    "gz cut": raw("a.csv.gz", gzip.compress(os.urandom(5000))[:3000]),
    "not a zip": raw("a.zip", b"<html>please log in</html>"),
    "empty": raw("a.zip", b""),
    "7z bit": changed(seven("a"), lambda data: data[:33] + bytes([data[33] ^ 1]) + data[34:]),
}


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("build", HOSTILE.values(), ids=HOSTILE)
def test_hostile(empty: Path, build: Build) -> None:
    assert len(HOSTILE) >= 40
    made = empty / "made"
    made.mkdir()
    archive = build(made)
    target = empty / "place" / "raw"
    before, marks = everything(empty), [Path("/tmp/evil").exists(), os.listdir("/")]
    with pytest.raises((UserError, unpack.DamagedArchive)) as caught:
        unpack.unpack(archive, target, 1_000_000, lambda size: False)
    assert len(str(caught.value).splitlines()) == 1
    outside = {
        name for name in everything(empty) - before if not name.startswith("place/raw") and name != "place"
    }
    assert not outside
    assert marks == [Path("/tmp/evil").exists(), os.listdir("/")]
    assert not [
        path
        for path in target.rglob("*")
        if path.is_symlink() or (path.is_file() and path.stat().st_mode & 0o111)
    ]


@pytest.mark.parametrize("build", BROKEN.values(), ids=BROKEN)
def test_damage_has_a_type_of_its_own(empty: Path, build: Build) -> None:
    made = empty / "made"
    made.mkdir()
    with pytest.raises(unpack.DamagedArchive):
        unpack.unpack(build(made), empty / "raw", 1_000_000, lambda size: False)


@pytest.mark.parametrize(
    "build",
    [zip_of("a/b", "c"), tar_of("a/b", then="c"), tar_of("a/b", suffix=".tgz", mode="w:gz", then="c")],
)
def test_harmless(empty: Path, build: Build) -> None:
    made = empty / "made"
    made.mkdir()
    unpack.unpack(build(made), empty / "raw", 1_000_000, lambda size: False)
    assert everything(empty / "raw") == {"a", "a/b", "c"}


def test_7z_and_gz(empty: Path) -> None:
    import py7zr

    with py7zr.SevenZipFile(empty / "a.7z", "w") as out:
        for name, data in {
            "d/1.png": b"one",
            "t.csv.gz": gzip.compress(b"id\n1\n"),
            "scan.nii.gz": b"stays",
            "none": b"",
        }.items():
            out.writef(io.BytesIO(data), name)
    unpack.unpack(empty / "a.7z", empty / "raw", 1_000_000, lambda size: False)
    assert everything(empty / "raw") == {"d", "d/1.png", "t.csv", "scan.nii.gz", "none"}
    assert (empty / "raw/t.csv").read_bytes() == b"id\n1\n" and (
        empty / "raw/scan.nii.gz"
    ).read_bytes() == b"stays"
