"""data/images/<digest>.parquet: the image files that runs were made of, so that a run notices when some of them are replaced.

A line a file: name, bytes, mtime, and the hash that an image cache took when it read the file; empty where no cache knows it. All
members of an archive are one line, that of the archive. The digest is of names and hashes, of sizes where there is no hash, and so
the same in a copied project; mtimes only spare the reading. To compare costs one stat a file, and of a file that was touched its bytes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from comp.engine.config.schema import Config
from comp.engine.data import cache_index, exact_duplicates, image_key, image_reader, samples
from comp.engine.errors import Refused
from comp.engine.readers import containers
from comp.engine.store import artifacts, paths

SCHEMA = pa.schema({"name": pa.string(), "bytes": pa.int64(), "mtime": pa.int64(), "hash": pa.string()})
Stamps = NDArray[np.int64]  # (files, 2): size and mtime
Hashes = Literal["none", "cached", "all"]


class Compared(NamedTuple):
    files: int
    changed: list[str]
    missing: list[str]
    touched: int  # other mtime, same bytes
    sized: int  # other mtime, same size, and no hash to compare


def record(cfg: Config) -> str:
    """Written for the files as they are now. The digest, for made_of.json."""
    return _written(_table(cfg, "cached"))


def compare(cfg: Config, digest: str) -> Compared:
    """The files of a record as they are now."""
    old = _read(cfg, digest)
    names, hashed = old["name"].to_pylist(), old["hash"].to_numpy(zero_copy_only=False)
    then = np.stack([cache_index.column(old, name) for name in ("bytes", "mtime")], 1)
    reader = image_reader.from_config(cfg)
    now = reader.stamps(names)
    missing = (now[:, 0] < 0) & (then[:, 0] >= 0)
    changed = (now[:, 0] != then[:, 0]) & ~missing
    moved = (now[:, 1] != then[:, 1]) & ~missing & ~changed
    read = np.flatnonzero(moved & (hashed != ""))
    if len(read):
        images = _files(cfg)
        files = {names[at]: images.get(names[at], [names[at]]) for at in read}
        again = np.array(_hashes(reader, files, now[read], "all"), object)
        changed[read[again != hashed[read]]] = True
        same = read[again == hashed[read]]
        then[same] = now[same]
        if len(same):  # so that they are not read the next time
            _written(pa.table([old["name"], *map(pa.array, then.T), old["hash"]], schema=SCHEMA))
    touched = moved & ~changed
    return Compared(
        len(names),
        [names[at] for at in np.flatnonzero(changed)],
        [names[at] for at in np.flatnonzero(missing)],
        int((touched & (hashed != "")).sum()),
        int((touched & (hashed == "")).sum()),
    )


def _file(digest: str) -> Path:
    return paths.path("data", "images", f"{digest}.parquet")


def _digest(table: pa.Table) -> str:
    held = [
        hash or str(size)
        for hash, size in zip(table["hash"].to_pylist(), table["bytes"].to_pylist(), strict=True)
    ]
    text = "\n".join([*table["name"].to_pylist(), *held])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _written(table: pa.Table) -> str:
    """Named by what it says, so it needs no manifest, and whoever reads it meanwhile reads one of two that say the same."""
    digest = _digest(table)
    with artifacts.atomic(_file(digest)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return digest


def _read(cfg: Config, digest: str) -> pa.Table:
    """A record that is gone or damaged is made again, if the files are still those."""
    try:
        table = pq.read_table(_file(digest), schema=SCHEMA)
        if _digest(table) == digest:
            return table
        what = "damaged"
    except FileNotFoundError:
        what = "gone"
    except (pa.ArrowException, OSError):
        what = "damaged"
    ways: tuple[Hashes, ...] = ("none", "cached", "all")
    for table in (_table(cfg, hashes) for hashes in ways):
        if _digest(table) == digest:
            _written(table)
            return table
    raise Refused(
        f"{paths.relative(_file(digest))}: {what}, and the image files are not those that it was made of"
    )


def _table(cfg: Config, hashes: Hashes) -> pa.Table:
    reader, files = image_reader.from_config(cfg), _files(cfg)
    found = reader.stamps(list(files))
    hashed = _hashes(reader, files, found, hashes)
    return pa.table([list(files), found[:, 0], found[:, 1], hashed], schema=SCHEMA)


def _files(cfg: Config) -> dict[str, list[str]]:
    """file -> the images in it: of an archive its members, of any other file one of the images that are made from it. Files that
    are channels of one image are one, as making.stamp takes them."""
    reader = image_reader.from_config(cfg)
    listed = samples.load().frame["images"]
    keys = {image_key.paths(key): key for images in listed for key in images[: cfg.data.max_images]}
    archives: dict[str, str] = {}  # by folder; empty for a real folder
    files: dict[str, list[str]] = {}
    for joined, key in sorted(keys.items()):
        parts = image_key.files(joined)
        for folder in {os.path.dirname(part) for part in parts} - archives.keys():
            inside = containers.split(Path(reader.folder, folder, "x"))
            archives[folder] = os.path.relpath(inside[0], reader.folder) if inside else ""
        places = [archives[os.path.dirname(part)] or part for part in parts]
        for place in dict.fromkeys(places) if places != parts else [joined]:
            files.setdefault(place, []).append(key)
    return files


def _hashes(
    reader: image_reader.ImageReader, files: dict[str, list[str]], found: Stamps, hashes: Hashes
) -> list[str]:
    """Of each file; of an archive one over its members."""
    if hashes == "none":
        return [""] * len(files)
    names = list(files)
    single = np.array(
        [at for at, name in enumerate(names) if image_key.paths(files[name][0]) == name], np.int64
    )
    hashed = [""] * len(names)
    for at, each in zip(
        single, _of(reader, [files[names[at]][0] for at in single], found[single], hashes), strict=True
    ):
        hashed[at] = each
    for at in np.setdiff1d(np.arange(len(names)), single):
        members = files[names[at]]
        inside = _of(reader, members, reader.stamps(members), hashes)
        hashed[at] = artifacts.digest([*zip(members, inside, strict=True)]) if all(inside) else ""
    return hashed


def _of(reader: image_reader.ImageReader, names: list[str], found: Stamps, hashes: Hashes) -> list[str]:
    known = cache_index.known_hashes(reader.raw, pa.array(names, pa.string()), found)
    if hashes == "all":
        new = np.flatnonzero(known == "")
        unread: dict[str, str] = {}
        known[new] = exact_duplicates.map_files(
            lambda name: exact_duplicates.file_hash(reader, name, unread),
            [names[at] for at in new],
            "hashing images",
        )
    return list(known)
