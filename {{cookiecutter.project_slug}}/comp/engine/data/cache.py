"""data/cache/<key>: every image decoded once, at the run's size and depth, in one memory-mapped file.

    pixels.bin          the images one after the other, only ever appended to
    index-<hash>.arrow  one row per file: offset, shape, crc32; bytes, mtime, hash of the file; or its fault
    manifest.json       written last: which index is current, and what decides the pixels
    journal.jsonl       only during a build: what is finished, so that a killed build resumes there

The key is a hash of everything that determines the pixels except the files themselves. A file counts as
unchanged while its size and mtime are. Entries are files, not samples: folds, runs, trials and processes
share the cache. `images[i]` is the same with and without a cache.

Pixels are never overwritten, since other processes may be reading them. Those of a file that has changed stay
as waste until the folder is deleted. Images are written in order, so the same files give the same bytes,
killed and resumed or not.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from comp.engine import hardware
from comp.engine.config import experiments
from comp.engine.config.schema import Config
from comp.engine.data import image_reader, samples
from comp.engine.data.image_reader import ImageReader
from comp.engine.errors import UserError
from comp.engine.readers import decode
from comp.engine.readers.arrays import DamagedImage, Pixels
from comp.engine.store import artifacts, locks, paths

COMMIT = 64  # images between two lines of the journal: at most so many are decoded again after a kill
CHUNK = 8  # images per task of the pool: few enough for memory, many enough to hide the cost of a task

SCHEMA = pa.schema({
    "name": pa.string(),  # path under raw
    "bytes": pa.int64(), "mtime": pa.int64(), "hash": pa.string(),  # of the file when it was read
    "offset": pa.int64(), "height": pa.int32(), "width": pa.int32(), "channels": pa.int32(),  # in pixels.bin
    "crc": pa.uint32(),  # of the pixels
    "reason": pa.string(),  # why there is no image; then height is 0
})  # fmt: skip
ABSENT, STALE = -1, -2  # no such file | not in the index, or made from another file
Stamps = NDArray[np.int64]  # (files, 2): size and mtime as they are now, -1 for no such file


class Row(NamedTuple):
    """One file, as in SCHEMA."""

    name: str
    bytes: int
    mtime: int
    hash: str
    offset: int = 0
    height: int = 0
    width: int = 0
    channels: int = 0
    crc: int = 0
    reason: str = ""


class CacheSpaceError(UserError):
    """Raised if the cache cannot be written. Images can still be decoded on the fly."""


def open_images(cfg: Config, names: Sequence[str], progress: bool, must_fit: bool = False) -> Images:
    """The images of these files under raw, in this order. Missing files are first decoded into the cache.

    If the disk is too small or read-only, images are decoded on the fly, after a printed line. `must_fit`:
    raise instead."""
    reader, files = image_reader.from_config(cfg), pa.array(names, pa.string())
    if not cfg.data.cache:
        return UncachedImages(reader, files)
    folder = paths.path("data", "cache", reader.key)
    stamps = reader.stamps(names)  # most of the time that opening takes
    index = current_index(folder)
    rows = locate(files, stamps, read_index(index))
    if index is None or (rows == STALE).any():
        try:
            _make_folder(folder)
            with locks.lock(folder, "filling the image cache", wait=True):
                index = build(folder, reader, files, stamps, progress)
        except CacheSpaceError as error:
            if must_fit:
                raise
            print(f"{error}\nimages are decoded on the fly: the same pixels, more work", flush=True)
            return UncachedImages(reader, files)
        rows = locate(files, stamps, read_index(index))
    return CachedImages(reader, files, index, rows.astype(np.int32))


def fill(experiment: str, overrides: Sequence[str]) -> None:
    """comp cache: decodes every image of the samples. Raises if they do not fit on the disk."""
    cfg = experiments.load(experiment, overrides).config
    hardware.set_threads(cfg.train.threads)
    names = sorted({path for images in samples.load().frame["images"] for path in images})
    open_images(cfg, names, cfg.machine.progress, must_fit=True)
    print(f"next: comp train {experiment}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made ({error.strerror})"
        raise CacheSpaceError("not-writable", where=paths.relative(folder), what=what) from None


# --- reading ------------------------------------------------------------------------------------------------


class UncachedImages:
    """Images that are decoded on the fly."""

    def __init__(self, reader: ImageReader, names: pa.Array):
        self.reader = reader
        self.names = names  # not a list: loader processes would copy a million Python strings

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Pixels:
        return self.reader.image(self.names[i].as_py())


class CachedImages:
    """Images of a cache: read-only views of one memory-mapped file."""

    def __init__(self, reader: ImageReader, names: pa.Array, index: Path, rows: NDArray[np.int32]):
        self.reader = reader
        self.index = index
        self.rows = rows  # row of each image in the index; ABSENT or STALE if it has none
        # Decoding a file that is absent raises the reason.
        self.absent = {int(i): names[i].as_py() for i in np.flatnonzero(rows < 0)}
        # Mapped before loader processes start: pages shared with the parent do not count as their memory.
        assert self.pages is not None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Pixels:
        row = int(self.rows[i])
        return self.pages.image(row) if row >= 0 else self.reader.image(self.absent[i])

    @cached_property
    def pages(self) -> _Pages:
        return _Pages(self.index, np.dtype(self.reader.dtype))

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapping, which cannot be pickled for another process."""
        return {key: value for key, value in self.__dict__.items() if key != "pages"}


# images[i]: (height, width, channels) in the dtype of data.bit_depth; raises DamagedImage with file and
# reason.
Images = UncachedImages | CachedImages


class _Pages:
    """The mapped files of a process. The crc32 of an image is checked when it is first read."""

    MAX_MAPPED = 2**24  # bytes of pixels: mapped pages count as this process's memory

    def __init__(self, index: Path, dtype: np.dtype[Any]):
        self.dtype = dtype
        self.folder = index.parent
        self.table = read_index(index)
        self.offset, *self.shape, self.crc = (
            column(self.table, name) for name in ("offset", "height", "width", "channels", "crc")
        )
        self.checked = np.zeros(len(self.table), bool)
        self.touched = 0
        file, end = self.folder / "pixels.bin", _pixels_end(self.table, dtype.itemsize)
        if (missing := end - file.stat().st_size) > 0:
            raise _damaged(file, f"{missing} bytes are missing at its end")
        with file.open("rb") as opened:
            self.map = mmap.mmap(opened.fileno(), end, access=mmap.ACCESS_READ) if end else None

    def image(self, row: int) -> Pixels:
        height, width, channels = (int(column[row]) for column in self.shape)
        count = height * width * channels
        size = count * self.dtype.itemsize
        if self.map is None or not size:
            raise DamagedImage(self.table["name"][row].as_py(), self.table["reason"][row].as_py())
        self.touched += size
        if self.touched > self.MAX_MAPPED and hasattr(mmap, "MADV_DONTNEED"):
            # Views that callers hold stay valid: the kernel reads their pages again, from the page cache.
            self.touched = size
            self.map.madvise(mmap.MADV_DONTNEED)
        pixels = np.frombuffer(self.map, self.dtype, count, int(self.offset[row]))
        if not self.checked[row]:
            if zlib.crc32(pixels.data) != self.crc[row]:
                name = self.table["name"][row].as_py()
                raise _damaged(
                    self.folder / "pixels.bin", f"the image of {name} is damaged (its crc32 differs)"
                )
            self.checked[row] = True
        return pixels.reshape(height, width, channels)


def _damaged(file: Path, what: str) -> UserError:
    remedy = f"delete {paths.relative(file.parent)}; it is built again when it is needed"
    return UserError("cache-damaged", where=paths.relative(file), what=what, remedy=remedy)


# --- index --------------------------------------------------------------------------------------------------
# A new index is a new file. manifest.json, replaced last, names the current one.


def current_index(folder: Path) -> Path | None:
    """The current index, after its sha256 is verified; None before the first build."""
    for _ in range(9):  # another process may just be replacing the index
        if not (folder / artifacts.MANIFEST).exists():
            return None
        ((name, facts),) = artifacts.read_json(folder / artifacts.MANIFEST).items()
        try:
            good = artifacts.sha256(folder / name) == facts["sha256"]
        except FileNotFoundError:
            continue
        if good:
            return folder / name
        raise _damaged(folder / name, f"damaged (sha256 differs from {artifacts.MANIFEST})")
    raise _damaged(folder / artifacts.MANIFEST, "names an index that is missing")


def _publish(folder: Path, reader: ImageReader, previous: Path | None, rows: list[Row]) -> Path:
    """Writes an index and makes it the current one. The same rows give the same name and bytes."""
    table = _merged(previous, rows)
    damaged = int((table["height"].to_numpy() == 0).sum())
    size = (folder / "pixels.bin").stat().st_size
    facts = {
        "images": len(table), "damaged": damaged, "pixels": size, "raw": reader.raw, "px": reader.size,
        "resize": reader.resize, "channels": reader.channels, "depth": reader.pixel_format.bit_depth,
        "decoder": decode.DECODER,
    }  # fmt: skip
    with artifacts.atomic(folder / "index.arrow") as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))
        sha = artifacts.sha256(temporary)
    index = folder / f"index-{sha[:16]}.arrow"
    (folder / "index.arrow").replace(index)
    before = current_index(folder)
    entry = {"sha256": sha, "size": index.stat().st_size, **facts}
    artifacts.write_json(folder / artifacts.MANIFEST, {index.name: entry})
    for old in folder.glob("index-*.arrow"):
        if old not in (index, before):  # a process that is starting may be about to map the previous one
            old.unlink()
    (folder / "journal.jsonl").unlink()
    what = f"{len(table):,} images, {damaged} of them damaged, {artifacts.format_size(size)}"
    print(f"{paths.relative(folder)}: {what}", flush=True)
    return index


def read_index(index: Path | None) -> pa.Table:
    """The index, memory-mapped, so that no process copies a million rows."""
    return pa.ipc.open_file(pa.memory_map(str(index))).read_all() if index else SCHEMA.empty_table()


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of the index: a view of the mapped file if possible, otherwise a copy."""
    chunks = table[name].chunks
    return chunks[0].to_numpy() if len(chunks) == 1 else table[name].to_numpy()


def _pixels_end(table: pa.Table, itemsize: int) -> int:
    """The offset at which the pixels of these rows end in pixels.bin."""
    height, width, channels = (
        column(table, name).astype(np.int64) for name in ("height", "width", "channels")
    )
    return int((column(table, "offset") + height * width * channels * itemsize).max(initial=0))


def locate(names: pa.Array, stamps: Stamps, table: pa.Table) -> NDArray[np.int64]:
    """(files,): the row of each file in the index, or ABSENT, or STALE."""
    rows = pc.index_in(names, table["name"]).fill_null(STALE).to_numpy().astype(np.int64)
    made_from = np.stack([column(table, "bytes"), column(table, "mtime")], 1)
    listed = np.flatnonzero(rows >= 0)
    rows[listed[(made_from[rows[listed]] != stamps[listed]).any(1)]] = STALE
    rows[stamps[:, 0] < 0] = ABSENT
    return rows


def known_hashes(raw: str, names: pa.Array, stamps: Stamps) -> NDArray[Any]:
    """The hash of each file, from any cache of this raw folder; empty if no cache has read its current
    version."""
    hashes = np.full(len(names), "", object)
    for manifest in sorted(paths.path("data", "cache").glob(f"*/{artifacts.MANIFEST}")):
        index = current_index(manifest.parent)
        if index is None or artifacts.read_json(manifest).get(index.name, {}).get("raw") != raw:
            continue
        table = read_index(index)
        rows = locate(names, stamps, table)
        found = np.flatnonzero((rows >= 0) & (hashes == ""))
        hashes[found] = table["hash"].take(pa.array(rows[found])).to_numpy(zero_copy_only=False)
    return hashes


# --- building -----------------------------------------------------------------------------------------------


def build(folder: Path, reader: ImageReader, names: pa.Array, stamps: Stamps, progress: bool) -> Path:
    """Adds the files that are missing in the cache, and returns the current index. The caller holds the
    folder's lock."""
    previous = current_index(folder)
    rows = _resume(folder, reader, previous)
    known = _merged(previous, rows)
    stale = np.flatnonzero(locate(names, stamps, known) == STALE)
    if previous is not None and not len(stale) and not rows:
        (folder / "journal.jsonl").unlink()
        return previous  # another process has just built it
    todo = list(dict.fromkeys(names.take(pa.array(stale)).to_pylist()))
    _announce(folder, reader, todo)
    by_hash = {} if reader.uses_hook else _rows_by_hash(known)
    try:
        _append(folder, reader, todo, by_hash, rows, progress)
    except OSError as error:
        raise UserError(
            "not-written",
            where=paths.relative(folder),
            what=f"could not be written ({error.strerror})",
            remedy="free space; the next start resumes where it stopped",
        ) from error
    return _publish(folder, reader, previous, rows)


def _append(
    folder: Path,
    reader: ImageReader,
    todo: list[str],
    by_hash: dict[str, Row],
    rows: list[Row],
    progress: bool,
) -> None:
    """Decodes the files, appends their pixels, and adds a row per file to `rows`. fsync runs in a separate
    thread, so that decoding does not wait for the disk."""
    with (
        (folder / "pixels.bin").open("ab") as pixels,
        (folder / "journal.jsonl").open("ab") as journal,
        ThreadPoolExecutor(1) as disk,
    ):
        end = pixels.tell()
        fresh: list[Row] = []
        commit: Future[None] | None = None
        decoded = _decoded(reader, todo, by_hash)
        for row, image in tqdm(
            decoded, "cache", len(todo), unit=" images", disable=None if progress else True
        ):
            copy = by_hash.get(row.hash)
            if copy is not None:  # the same bytes under another name, or a new mtime
                row = copy._replace(name=row.name, bytes=row.bytes, mtime=row.mtime)
            elif image is not None:
                row = row._replace(offset=end)
                pixels.write(image.data)
                end += image.nbytes
            if not reader.uses_hook:  # a hook may make different images of the same bytes
                by_hash[row.hash] = row
            rows.append(row)
            fresh.append(row)
            if len(fresh) >= COMMIT:
                if commit:
                    commit.result()
                commit, fresh = disk.submit(_commit, pixels, journal, fresh), []
        if commit:
            commit.result()
        _commit(pixels, journal, fresh)


def _decoded(
    reader: ImageReader, names: list[str], by_hash: dict[str, Row]
) -> Iterator[tuple[Row, Pixels | None]]:
    """Decoded files in the order of `names`, by one thread per core: decoders release the GIL."""
    threads = hardware.cores()
    chunks = iter([names[start : start + CHUNK] for start in range(0, len(names), CHUNK)])
    with ThreadPoolExecutor(threads) as pool:

        def submit(number: int) -> list[Future[list[tuple[Row, Pixels | None]]]]:
            return [pool.submit(_decode_chunk, reader, chunk, by_hash) for chunk in islice(chunks, number)]

        running = deque(submit(4 * threads))
        try:
            while running:
                yield from running.popleft().result()
                running += submit(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_chunk(
    reader: ImageReader, names: list[str], by_hash: dict[str, Row]
) -> list[tuple[Row, Pixels | None]]:
    """Decodes some files. Unreadable ones are left out, since that may be temporary, unlike damage."""
    decoded: list[tuple[Row, Pixels | None]] = []
    for name in names:
        size, mtime = reader.stamp(name)  # before the bytes: a change in between makes the row stale
        try:
            data = reader.read(name)
        except DamagedImage:
            continue
        row = Row(name, size, mtime, image_reader.content_hash(data))
        image = None
        if row.hash not in by_hash:
            try:
                image = reader.image(name, data)
                height, width, channels = image.shape
                row = row._replace(height=height, width=width, channels=channels, crc=zlib.crc32(image.data))
            except DamagedImage as damaged:
                row = row._replace(reason=damaged.reason)
        decoded.append((row, image))
    return decoded


def _commit(pixels: BinaryIO, journal: BinaryIO, fresh: list[Row]) -> None:
    """Syncs the pixels to disk, then writes the journal line that lists them."""
    pixels.flush()
    os.fsync(pixels.fileno())
    journal.write(json.dumps(fresh).encode() + b"\n")
    journal.flush()


def _resume(folder: Path, reader: ImageReader, previous: Path | None) -> list[Row]:
    """The rows that a killed build had finished; pixels.bin and the journal are truncated after them. Rows
    that the index already has may be merged again without effect."""
    journal, pixels = folder / "journal.jsonl", folder / "pixels.bin"
    journal.touch()
    pixels.touch()
    text = journal.read_bytes()
    text = text[: text.rfind(b"\n") + 1]  # without an incomplete last line
    rows = [Row(*values) for line in text.splitlines() for values in json.loads(line)]
    indexed = artifacts.read_json(folder / artifacts.MANIFEST)[previous.name]["pixels"] if previous else 0
    itemsize = np.dtype(reader.dtype).itemsize
    end = max([indexed] + [row.offset + row.height * row.width * row.channels * itemsize for row in rows])
    if (missing := end - pixels.stat().st_size) > 0:
        raise _damaged(pixels, f"{missing} bytes are missing at its end")
    os.truncate(journal, len(text))
    os.truncate(pixels, end)
    return rows


def _announce(folder: Path, reader: ImageReader, todo: list[str]) -> None:
    size = len(todo) * _bytes_each(reader, todo)
    what = f"{paths.relative(folder)}: {len(todo):,} images of {reader.size} px"
    try:
        artifacts.require_space(size, what)
    except UserError as error:
        raise CacheSpaceError(
            error.code, where=error.where, key=error.key, what=error.what, remedy=error.remedy
        ) from None
    print(f"{what}, about {artifacts.format_size(size)}", flush=True)


def _bytes_each(reader: ImageReader, names: list[str]) -> int:
    """Estimated bytes per image: with resize=cover they depend on aspect ratios, of which 64 are sampled."""
    square = reader.size * reader.size * reader.channels * np.dtype(reader.dtype).itemsize
    if reader.resize != "cover":
        return square
    shapes = [decode.shape(reader.file(name)) for name in names[:: max(1, len(names) // 64)]]
    ratios = [max(shape) / min(shape) for shape in shapes if shape and min(shape)]
    return int(square * sum(ratios) / len(ratios)) if ratios else square


def _merged(previous: Path | None, rows: list[Row]) -> pa.Table:
    """The rows of both, one per file: the latest."""
    latest = {row.name: row for row in rows}
    new = pa.Table.from_pylist([row._asdict() for row in latest.values()], SCHEMA)
    old = read_index(previous)
    return pa.concat_tables([old.filter(pc.invert(pc.is_in(old["name"], new["name"]))), new])


def _rows_by_hash(table: pa.Table) -> dict[str, Row]:
    columns = [table[name].to_pylist() for name in SCHEMA.names]
    return {row.hash: row for row in map(Row, *columns)}
