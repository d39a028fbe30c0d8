"""The index of an image cache: one line a file. A new index is a new file; manifest.json, replaced last, says which counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

SCHEMA = pa.schema({
    "name": pa.string(),  # path under raw
    "bytes": pa.int64(), "mtime": pa.int64(), "hash": pa.string(),  # of the file as it was
    "offset": pa.int64(), "height": pa.int32(), "width": pa.int32(), "channels": pa.int32(),  # in pixels.bin
    "crc": pa.uint32(),  # of the pixels
    "reason": pa.string(),  # why there is no picture; then height is 0
})  # fmt: skip
ABSENT, STALE = -1, -2  # no such file | not in the index, or made from another file


def current(folder: Path) -> Path | None:
    """The index that counts, its bytes verified; None before the first build."""
    for _ in range(9):  # another process may be replacing one index by the next right now
        if not (folder / artifacts.MANIFEST).exists():
            return None
        ((name, facts),) = artifacts.read_json(folder / artifacts.MANIFEST).items()
        try:
            good = artifacts.sha256(folder / name) == facts["sha256"]
        except FileNotFoundError:
            continue
        if good:
            return folder / name
        raise cache_damaged(
            folder, f"{paths.relative(folder / name)}: damaged (sha256 differs from {artifacts.MANIFEST})"
        )
    raise cache_damaged(
        folder, f"{paths.relative(folder)}: {artifacts.MANIFEST} names an index that is not there"
    )


def publish(folder: Path, table: pa.Table, facts: dict[str, Any]) -> Path:
    """The same lines have the same name and bytes. From here on they count."""
    with artifacts.atomic(folder / "index.arrow") as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))
        sha = artifacts.sha256(temporary)
    index = folder / f"index-{sha[:16]}.arrow"
    (folder / "index.arrow").replace(index)
    before = current(folder)
    size = index.stat().st_size
    artifacts.write_json(folder / artifacts.MANIFEST, {index.name: {"sha256": sha, "size": size, **facts}})
    for old in folder.glob("index-*.arrow"):
        if old not in (index, before):  # a process that is just starting may be about to map the one before
            old.unlink()
    return index


def mapped(index: Path | None) -> pa.Table:
    """Memory-mapped: no process copies a million lines."""
    return pa.ipc.open_file(pa.memory_map(str(index))).read_all() if index else SCHEMA.empty_table()


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """A view into the mapped file where that is possible, not a copy."""
    chunks = table[name].chunks
    return chunks[0].to_numpy() if len(chunks) == 1 else table[name].to_numpy()


def end(table: pa.Table, each: int) -> int:
    """Where the pixels of these lines end in pixels.bin, with so many bytes each."""
    height, width, channels = (
        column(table, name).astype(np.int64) for name in ("height", "width", "channels")
    )
    return int((column(table, "offset") + height * width * channels * each).max(initial=0))


def locate(names: pa.Array, found: NDArray[np.int64], table: pa.Table) -> NDArray[np.int64]:
    """The line of each name, or ABSENT, or STALE. `found` is (size, mtime) of the files as they are now, -1 without one."""
    at = pc.index_in(names, table["name"]).fill_null(STALE).to_numpy().astype(np.int64)
    made_from = np.stack([column(table, "bytes"), column(table, "mtime")], 1)
    listed = np.flatnonzero(at >= 0)
    at[listed[(made_from[at[listed]] != found[listed]).any(1)]] = STALE
    at[found[:, 0] < 0] = ABSENT
    return at


def known_hashes(raw: str, names: pa.Array, found: NDArray[np.int64]) -> NDArray[Any]:
    """The hash of each file by any cache of this raw folder; empty where none has seen it as it is now (size and mtime)."""
    hashed = np.full(len(names), "", object)
    for manifest in sorted(paths.path("data", "cache").glob(f"*/{artifacts.MANIFEST}")):
        file = current(manifest.parent)
        if file is None or artifacts.read_json(manifest).get(file.name, {}).get("raw") != raw:
            continue
        table = mapped(file)
        at = locate(names, found, table)
        here = np.flatnonzero((at >= 0) & (hashed == ""))
        hashed[here] = table["hash"].take(pa.array(at[here])).to_numpy(zero_copy_only=False)
    return hashed


def cache_damaged(folder: Path, what: str) -> Refused:
    return Refused(f"{what}; delete {paths.relative(folder)}, it is made again by itself")
