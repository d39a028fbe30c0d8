"""data/cache/<key>: every picture decoded once, at the run's size and depth, in one memory-mapped file.

    pixels.bin          the pictures one after the other, only ever appended to
    index-<hash>.arrow  one line a file: offset, shape, crc32, and of its source: bytes, mtime, hash; or why it is damaged
    manifest.json       written last: which index counts, and what the pictures were made with
    journal.jsonl       only while building: what a killed build had finished

The key names all that decides pixels except the files themselves; a file counts as unchanged while its size and mtime are.
Keyed by file, not by sample: folds, runs, trials and processes share it. `images[i]` is the same with and without a cache.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from comp.engine import hardware
from comp.engine.config import experiments
from comp.engine.config.schema import Config
from comp.engine.data import build_cache, cache_index, image_reader, samples
from comp.engine.readers.arrays import DamagedImage
from comp.engine.readers.decode import Pixels
from comp.engine.store import locks, paths


class UncachedImages:
    """Decoding on the fly: for sets that do not fit on the disk."""

    def __init__(self, reader: image_reader.ImageReader, names: pa.Array):
        self.reader = reader
        self.names = names  # not a list: loader processes would copy a million Python strings

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Pixels:
        return self.reader.image(self.names[i].as_py())


class CachedImages:
    """The same pictures out of the cache: read-only views of one mapped file."""

    def __init__(
        self, reader: image_reader.ImageReader, names: pa.Array, index_file: Path, where: NDArray[np.int32]
    ):
        self.reader = reader
        self.index_file = index_file
        self.where = where  # the picture's line in the index, or negative
        # Decoded on the fly, which says what is wrong with them.
        self.absent = {int(i): names[i].as_py() for i in np.flatnonzero(where < 0)}
        # Mapped here already, since pages that loader processes share with this one are not counted as theirs.
        assert self.pages is not None

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, i: int) -> Pixels:
        at = int(self.where[i])
        return self.pages.image(at) if at >= 0 else self.reader.image(self.absent[i])

    @cached_property
    def pages(self) -> _Pages:
        return _Pages(self.index_file, np.dtype(self.reader.dtype))

    def __getstate__(self) -> dict[str, Any]:
        """Mappings do not travel to another process."""
        return {key: value for key, value in self.__dict__.items() if key != "pages"}


# images[i]: (height, width, channels) of data.bit_depth; raises DamagedImage, whose text names file and reason.
Images = UncachedImages | CachedImages


class _Pages:
    """The mapped files of a process. A picture's crc32 is checked the first time this process reads it."""

    KEEP = 2**24  # bytes of pixels: what stays mapped counts as this process's memory

    def __init__(self, index_file: Path, kind: np.dtype[Any]):
        self.kind = kind
        self.folder = index_file.parent
        self.table = cache_index.mapped(index_file)
        self.offset, *self.shape, self.crc = (
            cache_index.column(self.table, name) for name in ("offset", "height", "width", "channels", "crc")
        )
        self.checked = np.zeros(len(self.table), bool)
        self.touched = 0
        file, end = self.folder / "pixels.bin", cache_index.end(self.table, kind.itemsize)
        if file.stat().st_size < end:
            raise cache_index.cache_damaged(
                self.folder,
                f"{paths.relative(file)}: {end - file.stat().st_size} bytes are missing at its end",
            )
        with file.open("rb") as opened:
            self.map = mmap.mmap(opened.fileno(), end, access=mmap.ACCESS_READ) if end else None

    def image(self, at: int) -> Pixels:
        height, width, channels = (int(column[at]) for column in self.shape)
        count = height * width * channels
        size = count * self.kind.itemsize
        if self.map is None or not size:
            raise DamagedImage(self.table["name"][at].as_py(), self.table["reason"][at].as_py())
        self.touched += size
        if self.touched > self.KEEP and hasattr(mmap, "MADV_DONTNEED"):
            # Views handed out stay valid: their pages come again, from the page cache.
            self.touched = size
            self.map.madvise(mmap.MADV_DONTNEED)
        pixels = np.frombuffer(self.map, self.kind, count, int(self.offset[at]))
        if not self.checked[at]:
            if zlib.crc32(pixels.data) != self.crc[at]:
                name = self.table["name"][at].as_py()
                what = f"{paths.relative(self.folder / 'pixels.bin')}: the picture of {name} is damaged (its crc32 differs)"
                raise cache_index.cache_damaged(self.folder, what)
            self.checked[at] = True
        return pixels.reshape(height, width, channels)


def open_images(cfg: Config, image_keys: Sequence[str], progress: bool, must_fit: bool = False) -> Images:
    """The pictures of these files under raw, in this order; what the cache lacks is decoded into it first.

    On a disk that is too small or read-only they are decoded on the fly, which is said in a line; with must_fit that is refused."""
    reader = image_reader.from_config(cfg)
    names = pa.array(image_keys, pa.string())
    if not cfg.data.cache:
        return UncachedImages(reader, names)
    folder = paths.path("data", "cache", reader.key)
    found = reader.stamps(image_keys)  # most of the start
    file = cache_index.current(folder)
    where = cache_index.locate(names, found, cache_index.mapped(file))
    if file is None or (where == cache_index.STALE).any():
        try:
            _make(folder)
            with locks.lock(folder, "filling the image cache", wait=True):
                file = build_cache.build(folder, reader, names, found, progress)
        except build_cache.CacheSpaceError as refusal:
            if must_fit:
                raise
            print(f"{refusal}\nso pictures are decoded on the fly: the same pixels, more work", flush=True)
            return UncachedImages(reader, names)
        where = cache_index.locate(names, found, cache_index.mapped(file))
    return CachedImages(reader, names, file, where.astype(np.int32))


def fill(experiment: str, overrides: Sequence[str]) -> None:
    """comp cache: decodes every image of the samples, or refuses when they do not fit on the disk."""
    cfg = experiments.load(experiment, overrides).config
    hardware.set_threads(cfg.train.threads)
    names = sorted({path for images in samples.load().frame["images"] for path in images})
    open_images(cfg, names, cfg.machine.progress, must_fit=True)
    print(f"next: comp train {experiment}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build_cache.CacheSpaceError(
            f"{paths.relative(folder)}: cannot be made ({error.strerror})"
        ) from None
