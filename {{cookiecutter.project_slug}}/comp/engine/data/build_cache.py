"""Filling an image cache: decoded in parallel, written in order, so that the same files give the same bytes.

Killed at any moment and started again it goes on behind the last line of its journal, and ends with the bytes of a build
that was never killed: what stands in pixels.bin beyond that line is cut off. Pixels are never overwritten, since other
processes may be reading them; those of a file that has changed stay behind as waste until the folder is deleted.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from comp.engine import hardware
from comp.engine.data import cache_index
from comp.engine.data.image_reader import ImageReader, content_hash
from comp.engine.errors import Refused, UserError
from comp.engine.readers import decode
from comp.engine.readers.arrays import DamagedImage
from comp.engine.readers.decode import Pixels
from comp.engine.store import artifacts, paths

COMMIT = 64  # pictures between two lines of the journal: at most so many are decoded again after a kill, or synced when all are made
CHUNK = 8  # pictures a task of the pool: few enough for memory, many enough for the pool not to be felt


class Line(NamedTuple):
    """One file, as in index.SCHEMA."""

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


Made = tuple[Line, Pixels | None]


class CacheSpaceError(Refused):
    """The disk has no place for this cache."""


def build(
    folder: Path, reader: ImageReader, names: pa.Array, found: NDArray[np.int64], progress: bool
) -> Path:
    """Adds to the cache what it lacks of these files. Called under the folder's lock; returns the index that counts."""
    before = cache_index.current(folder)
    lines = _resumed(folder, reader, before)
    known = _merged(before, lines)
    stale = np.flatnonzero(cache_index.locate(names, found, known) == cache_index.STALE)
    if before is not None and not len(stale) and not lines:
        (folder / "journal.jsonl").unlink()
        return before  # another process has just done it
    todo = list(dict.fromkeys(names.take(pa.array(stale)).to_pylist()))
    _announce(folder, reader, todo)
    twins = {} if reader.uses_hook else _twins(known)
    try:
        # Syncing has a thread of its own, or decoding would wait for the disk.
        with (
            (folder / "pixels.bin").open("ab") as pixels,
            (folder / "journal.jsonl").open("ab") as journal,
            ThreadPoolExecutor(1) as disk,
        ):
            end = pixels.tell()
            fresh: list[Line] = []
            commit: Future[None] | None = None
            made = _decoded(reader, todo, twins)
            for line, image in tqdm(
                made, "cache", len(todo), unit=" images", disable=None if progress else True
            ):
                twin = twins.get(line.hash)
                if twin is not None:  # the same bytes under another name, or touched and not changed
                    line = twin._replace(name=line.name, bytes=line.bytes, mtime=line.mtime)
                elif image is not None:
                    line = line._replace(offset=end)
                    pixels.write(image.data)
                    end += image.nbytes
                if not reader.uses_hook:  # which may make different pictures of the same bytes
                    twins[line.hash] = line
                lines.append(line)
                fresh.append(line)
                if len(fresh) >= COMMIT:
                    if commit:
                        commit.result()
                    commit, fresh = disk.submit(_commit, pixels, journal, fresh), []
            if commit:
                commit.result()
            _commit(pixels, journal, fresh)
    except OSError as error:
        what = f"{paths.relative(folder)}: could not be written ({error.strerror})"
        raise Refused(f"{what}; what is there stays, and the next start goes on from it") from error
    return _published(folder, reader, before, lines)


def _decoded(reader: ImageReader, names: list[str], known: dict[str, Line]) -> Iterator[Made]:
    """In the order of `names`, by as many threads as there are cores: decoders release Python's lock."""
    threads = hardware.cores()
    chunks = iter([names[start : start + CHUNK] for start in range(0, len(names), CHUNK)])
    with ThreadPoolExecutor(threads) as pool:

        def started(number: int) -> list[Future[list[Made]]]:
            return [pool.submit(_made, reader, chunk, known) for chunk in islice(chunks, number)]

        running = deque(started(4 * threads))
        try:
            while running:
                yield from running.popleft().result()
                running += started(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _made(reader: ImageReader, names: list[str], known: dict[str, Line]) -> list[Made]:
    """Lines and pixels of files; nothing for one that cannot be read now: that may pass, damage does not."""
    made: list[Made] = []
    for name in names:
        size, mtime = reader.stamp(
            name
        )  # before the bytes: a file that changes in between is noticed next time
        try:
            data = reader.read(name)
        except DamagedImage:
            continue
        line = Line(name, size, mtime, content_hash(data))
        image = None
        if line.hash not in known:
            try:
                image = reader.image(name, data)
                height, width, channels = image.shape
                line = line._replace(
                    height=height, width=width, channels=channels, crc=zlib.crc32(image.data)
                )
            except DamagedImage as damaged:
                line = line._replace(reason=damaged.reason)
        made.append((line, image))
    return made


def _commit(pixels: BinaryIO, journal: BinaryIO, fresh: list[Line]) -> None:
    """The pixels are on the disk before the line that counts them."""
    pixels.flush()
    os.fsync(pixels.fileno())
    journal.write(json.dumps(fresh).encode() + b"\n")
    journal.flush()


def _resumed(folder: Path, reader: ImageReader, before: Path | None) -> list[Line]:
    """What a killed build had finished; pixels.bin and journal end there. Lines that have come to count do no harm again."""
    journal, pixels = folder / "journal.jsonl", folder / "pixels.bin"
    journal.touch()
    pixels.touch()
    text = journal.read_bytes()
    text = text[: text.rfind(b"\n") + 1]  # a torn line never happened
    lines = [Line(*values) for part in text.splitlines() for values in json.loads(part)]
    counted = artifacts.read_json(folder / artifacts.MANIFEST)[before.name]["pixels"] if before else 0
    each = np.dtype(reader.dtype).itemsize
    end = max([counted] + [line.offset + line.height * line.width * line.channels * each for line in lines])
    if pixels.stat().st_size < end:
        raise cache_index.cache_damaged(
            folder, f"{paths.relative(pixels)}: {end - pixels.stat().st_size} bytes are missing at its end"
        )
    os.truncate(journal, len(text))
    os.truncate(pixels, end)
    return lines


def _published(folder: Path, reader: ImageReader, before: Path | None, lines: list[Line]) -> Path:
    table = _merged(before, lines)
    damaged = int((table["height"].to_numpy() == 0).sum())
    size = (folder / "pixels.bin").stat().st_size
    made_with = {
        "raw": reader.raw,
        "px": reader.size,
        "resize": reader.resize,
        "channels": reader.channels,
        "depth": reader.pixel_format.depth,
        "decoder": decode.DECODER,
    }
    facts = {"images": len(table), "damaged": damaged, "pixels": size}
    file = cache_index.publish(folder, table, facts | made_with)
    (folder / "journal.jsonl").unlink()
    what = f"{len(table):,} pictures, {damaged} of them damaged, {artifacts.format_size(size)}"
    print(f"{paths.relative(folder)}: {what}", flush=True)
    return file


def _announce(folder: Path, reader: ImageReader, todo: list[str]) -> None:
    size = len(todo) * _bytes_each(reader, todo)
    what = f"{paths.relative(folder)}: {len(todo):,} pictures of {reader.size} px"
    try:
        artifacts.require_space(size, what)
    except UserError as refusal:
        raise CacheSpaceError(*refusal.lines) from None
    print(f"{what}, about {artifacts.format_size(size)}", flush=True)


def _bytes_each(reader: ImageReader, names: list[str]) -> int:
    square = reader.size * reader.size * reader.channels * np.dtype(reader.dtype).itemsize
    if reader.resize != "cover":
        return square
    shapes = [decode.shape(reader.file(name)) for name in names[:: max(1, len(names) // 64)]]
    ratios = [max(shape) / min(shape) for shape in shapes if shape and min(shape)]
    return int(square * sum(ratios) / len(ratios)) if ratios else square


def _merged(before: Path | None, lines: list[Line]) -> pa.Table:
    """One line a file: the latest."""
    latest = {line.name: line for line in lines}
    new = pa.Table.from_pylist([line._asdict() for line in latest.values()], cache_index.SCHEMA)
    old = cache_index.mapped(before)
    return pa.concat_tables([old.filter(pc.invert(pc.is_in(old["name"], new["name"]))), new])


def _twins(table: pa.Table) -> dict[str, Line]:
    columns = [table[name].to_pylist() for name in cache_index.SCHEMA.names]
    return {line.hash: line for line in map(Line, *columns)}
