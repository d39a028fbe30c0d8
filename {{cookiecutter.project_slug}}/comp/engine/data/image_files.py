"""Records the image files that runs were trained on in data/images/<digest>.parquet, to detect replaced
files.

One row per file: name, bytes, mtime, and the hash from an image cache, or empty if no cache has read the
file. An archive is one row for all its members. The digest is computed from names and hashes (sizes without a
hash), so it is the same in a copied project; mtimes only save reading. A comparison costs one stat per file,
and reads the files whose mtime has changed.
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
from comp.engine.data import cache, exact_duplicates, image_key, image_reader, samples
from comp.engine.errors import UserError
from comp.engine.readers import containers
from comp.engine.store import artifacts, paths

SCHEMA = pa.schema({"name": pa.string(), "bytes": pa.int64(), "mtime": pa.int64(), "hash": pa.string()})
Stamps = NDArray[np.int64]  # (files, 2): size and mtime
HashLevel = Literal["none", "cached", "all"]  # of which files: those that an image cache has read, or all


class Comparison(NamedTuple):
    files: int
    changed: list[str]
    missing: list[str]
    mtime_only: int  # new mtime, same bytes
    size_only: int  # new mtime, same size, and no hash to compare


def record(cfg: Config) -> str:
    """Writes a record of the files as they are now and returns its digest, for inputs.json."""
    return _write(_table(cfg, "cached"))


def compare(cfg: Config, digest: str) -> Comparison:
    """Compares the files of a record with the files as they are now."""
    record = _read(cfg, digest)
    names, old_hashes = record["name"].to_pylist(), record["hash"].to_numpy(zero_copy_only=False)
    old_stamps = np.stack([cache.column(record, name) for name in ("bytes", "mtime")], 1)
    reader = image_reader.from_config(cfg)
    new_stamps = reader.stamps(names)
    missing = (new_stamps[:, 0] < 0) & (old_stamps[:, 0] >= 0)
    changed = (new_stamps[:, 0] != old_stamps[:, 0]) & ~missing
    new_mtime = (new_stamps[:, 1] != old_stamps[:, 1]) & ~missing & ~changed
    to_read = np.flatnonzero(new_mtime & (old_hashes != ""))
    if len(to_read):
        images = _files(cfg)
        files = {names[at]: images.get(names[at], [names[at]]) for at in to_read}
        new_hashes = np.array(_hashes(reader, files, new_stamps[to_read], "all"), object)
        changed[to_read[new_hashes != old_hashes[to_read]]] = True
        same_bytes = to_read[new_hashes == old_hashes[to_read]]
        old_stamps[same_bytes] = new_stamps[same_bytes]
        if len(same_bytes):  # the next comparison does not read them
            _write(pa.table([record["name"], *map(pa.array, old_stamps.T), record["hash"]], schema=SCHEMA))
    unchanged = new_mtime & ~changed
    return Comparison(
        len(names),
        [names[at] for at in np.flatnonzero(changed)],
        [names[at] for at in np.flatnonzero(missing)],
        int((unchanged & (old_hashes != "")).sum()),
        int((unchanged & (old_hashes == "")).sum()),
    )


def _file(digest: str) -> Path:
    return paths.path("data", "images", f"{digest}.parquet")


def _digest(table: pa.Table) -> str:
    contents = [
        hash or str(size)
        for hash, size in zip(table["hash"].to_pylist(), table["bytes"].to_pylist(), strict=True)
    ]
    text = "\n".join([*table["name"].to_pylist(), *contents])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(table: pa.Table) -> str:
    """Writes a record under the digest of its content, so that it needs no manifest and concurrent readers
    always read the same content."""
    digest = _digest(table)
    with artifacts.atomic(_file(digest)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return digest


def _read(cfg: Config, digest: str) -> pa.Table:
    """Reads a record. A missing or damaged one is written again if the files are still the same."""
    try:
        table = pq.read_table(_file(digest), schema=SCHEMA)
        if _digest(table) == digest:
            return table
        what = "damaged"
    except FileNotFoundError:
        what = "missing"
    except (pa.ArrowException, OSError):
        what = "damaged"
    # Which hashes the record had is not known any more, so all levels are tried, the cheapest first.
    hash_levels: tuple[HashLevel, ...] = ("none", "cached", "all")
    for table in (_table(cfg, level) for level in hash_levels):
        if _digest(table) == digest:
            _write(table)
            return table
    raise UserError(
        "image-record-lost",
        where=paths.relative(_file(digest)),
        what=f"{what}, and the image files have changed since it was written",
    )


def _table(cfg: Config, level: HashLevel) -> pa.Table:
    reader, files = image_reader.from_config(cfg), _files(cfg)
    stamps = reader.stamps(list(files))
    hashed = _hashes(reader, files, stamps, level)
    return pa.table([list(files), stamps[:, 0], stamps[:, 1], hashed], schema=SCHEMA)


def _files(cfg: Config) -> dict[str, list[str]]:
    """file -> image keys: all members of an archive; for any other file one of the images made from it. Files
    that are channels of one image count as one file, as in ImageReader.stamp."""
    reader = image_reader.from_config(cfg)
    listed = samples.load().frame["images"]
    keys = {image_key.paths(key): key for images in listed for key in images[: cfg.data.max_images]}
    archives: dict[str, str] = {}  # by folder; empty for a real folder
    files: dict[str, list[str]] = {}
    for joined, key in sorted(keys.items()):
        parts = image_key.files(joined)
        for folder in {os.path.dirname(part) for part in parts} - archives.keys():
            # containers.split looks at the parents of a path, so it gets the path of some member
            inside = containers.split(Path(reader.folder, folder, "member"))
            archives[folder] = os.path.relpath(inside[0], reader.folder) if inside else ""
        places = [archives[os.path.dirname(part)] or part for part in parts]
        for place in dict.fromkeys(places) if places != parts else [joined]:
            files.setdefault(place, []).append(key)
    return files


def _hashes(
    reader: image_reader.ImageReader, files: dict[str, list[str]], stamps: Stamps, level: HashLevel
) -> list[str]:
    """The hash of each file; of an archive a hash of those of its members."""
    if level == "none":
        return [""] * len(files)
    names = list(files)
    single = np.array(
        [at for at, name in enumerate(names) if image_key.paths(files[name][0]) == name], np.int64
    )
    hashed = [""] * len(names)
    for at, file_hash in zip(
        single,
        _file_hashes(reader, [files[names[at]][0] for at in single], stamps[single], level),
        strict=True,
    ):
        hashed[at] = file_hash
    for at in np.setdiff1d(np.arange(len(names)), single):
        members = files[names[at]]
        inside = _file_hashes(reader, members, reader.stamps(members), level)
        hashed[at] = artifacts.digest([*zip(members, inside, strict=True)]) if all(inside) else ""
    return hashed


def _file_hashes(
    reader: image_reader.ImageReader, names: list[str], stamps: Stamps, level: HashLevel
) -> list[str]:
    known = cache.known_hashes(reader.raw, pa.array(names, pa.string()), stamps)
    if level == "all":
        new = np.flatnonzero(known == "")
        unread: dict[str, str] = {}
        known[new] = exact_duplicates.map_files(
            lambda name: exact_duplicates.file_hash(reader, name, unread),
            [names[at] for at in new],
            "hashing images",
        )
    return list(known)
