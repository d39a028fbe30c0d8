"""Filling an image cache: decoded in parallel, written in order, so that the same files give the same bytes.

Killed at any moment and started again it goes on behind the last line of its journal, and ends with the bytes of a build
that was never killed: what stands in pixels.bin beyond that line is cut off.
"""

from __future__ import annotations

import hashlib
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

from comp import machine, store
from comp.config import Refused
from comp.prepare import images, index
from comp.prepare.images import Damaged, Pixels
from comp.prepare.making import Making

COMMIT = 512  # pictures between two lines of the journal: at most so many are decoded again after a kill
CHUNK = 8  # pictures a task of the pool; small enough to keep memory low, large enough not to be felt


class Line(NamedTuple):
    """As in index.SCHEMA."""

    name: str
    offset: int
    height: int
    width: int
    channels: int
    crc: int
    bytes: int
    mtime: int
    hash: str
    reason: str


class NoRoom(Refused):
    """The disk is too small for this cache."""


def fill(folder: Path, how: Making, names: pa.Array, found: NDArray[np.int64], progress: bool) -> Path:
    """Adds to the cache what it lacks of these files. Called under the folder's lock; returns the index that counts."""
    before = index.current(folder)
    lines = _resumed(folder, before)
    table = pa.concat_tables([index.mapped(before), _table(lines)])
    stale = np.flatnonzero(index.where(names, found, table) == index.STALE)
    if not len(stale) and not lines and before is not None:
        return before  # another process has just done it
    todo = list(dict.fromkeys(names.take(pa.array(stale)).to_pylist()))
    _announce(folder, how, todo)
    end = index.end(table)
    twins = {} if how.by_hook else _by_hash(table)
    try:
        with (folder / "pixels.bin").open("ab") as pixels, (folder / "journal.jsonl").open("ab") as journal:
            fresh: list[Line] = []
            for line, picture in tqdm(
                _decoded(how, todo, twins),
                "cache",
                len(todo),
                unit=" images",
                disable=None if progress else True,
            ):
                twin = twins.get(line.hash)
                if twin is not None:  # the same bytes under another name, or touched but not changed
                    line = twin._replace(name=line.name, bytes=line.bytes, mtime=line.mtime)
                elif picture is not None:
                    line = line._replace(offset=end)
                    pixels.write(picture.data)
                    end += picture.nbytes
                if not how.by_hook:
                    twins[line.hash] = line
                fresh.append(line)
                if len(fresh) >= COMMIT:
                    lines += _commit(pixels, journal, fresh)
                    fresh = []
            lines += _commit(pixels, journal, fresh)
    except OSError as error:
        raise Refused(
            f"{store.shown(folder)}: could not be written ({error.strerror}); what is there stays, the next start goes on"
        ) from error
    return _published(folder, how, before, lines)


def _decoded(how: Making, names: list[str], known: dict[str, Line]) -> Iterator[tuple[Line, Pixels | None]]:
    """In the order of `names`, decoded by as many threads as there are cores: OpenCV and Pillow release Python's lock."""
    threads = machine.cores()
    chunks = iter([names[start : start + CHUNK] for start in range(0, len(names), CHUNK)])
    with ThreadPoolExecutor(threads) as pool:

        def start(chunk: list[str]) -> Future[list[tuple[Line, Pixels | None]]]:
            return pool.submit(lambda: [made for name in chunk for made in _made(how, name, known)])

        running = deque(start(chunk) for chunk in islice(chunks, 4 * threads))
        try:
            while running:
                yield from running.popleft().result()
                running.extend(start(chunk) for chunk in islice(chunks, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _made(how: Making, name: str, known: dict[str, Line]) -> list[tuple[Line, Pixels | None]]:
    """One file's line and pixels. Nothing for a file that cannot be read now: that may pass, damage does not."""
    try:
        status = os.stat(how.file(name))
        data = how.read(name)
    except (OSError, Damaged):
        return []
    line = Line(
        name, 0, 0, 0, 0, 0, status.st_size, status.st_mtime_ns, hashlib.sha256(data).hexdigest()[:32], ""
    )
    if line.hash in known:
        return [(line, None)]
    try:
        picture = how.picture(name, data)
    except Damaged as damaged:
        return [(line._replace(reason=damaged.reason), None)]
    height, width, channels = picture.shape
    return [(line._replace(height=height, width=width, channels=channels, crc=zlib.crc32(picture)), picture)]


def _commit(pixels: BinaryIO, journal: BinaryIO, fresh: list[Line]) -> list[Line]:
    """The pixels are on disk before the line that counts them."""
    pixels.flush()
    os.fsync(pixels.fileno())
    journal.write(json.dumps(fresh).encode() + b"\n")
    journal.flush()
    return fresh


def _resumed(folder: Path, before: Path | None) -> list[Line]:
    """What a killed build had finished. Its first line names the index that it added to."""
    journal, pixels = folder / "journal.jsonl", folder / "pixels.bin"
    head = json.dumps(before.name if before else None).encode() + b"\n"
    text = journal.read_bytes() if journal.exists() else b""
    lines: list[Line] = []
    if text.startswith(head):
        text = text[: text.rfind(b"\n") + 1]  # a torn last line never happened
        lines = [Line(*values) for part in text.splitlines()[1:] for values in json.loads(part)]
    else:
        text = head
    journal.write_bytes(text)
    pixels.touch()
    end = index.end(pa.concat_tables([index.mapped(before), _table(lines)]))
    if pixels.stat().st_size < end:
        raise index.broken(
            folder, f"{store.shown(pixels)}: {end - pixels.stat().st_size} bytes are missing at its end"
        )
    os.truncate(pixels, end)
    return lines


def _published(folder: Path, how: Making, before: Path | None, lines: list[Line]) -> Path:
    old = index.mapped(before)
    replaced = pc.is_in(old["name"], pa.array([line.name for line in lines], pa.string()))
    table = pa.concat_tables([old.filter(pc.invert(replaced)), _table(lines)])
    damaged = sum(table["height"].to_numpy() == 0)
    facts = {"images": len(table), "damaged": int(damaged), "pixels": index.end(table)}
    made_with = {
        "raw": how.raw,
        "px": how.size,
        "fit": how.fit,
        "channels": how.channels,
        "decoder": images.DECODER,
    }
    written = index.publish(folder, table, facts | made_with)
    (folder / "journal.jsonl").unlink()
    print(
        f"{store.shown(folder)}: {len(table):,} pictures, {damaged} damaged, {store.readable(facts['pixels'])}",
        flush=True,
    )
    return written


def _announce(folder: Path, how: Making, todo: list[str]) -> None:
    size = len(todo) * _bytes_each(how, todo)
    what = f"{store.shown(folder)}: {len(todo):,} pictures of {how.size} px"
    try:
        store.need_space(size, what)
    except Refused as refusal:
        raise NoRoom(*refusal.lines) from None
    print(f"{what}, about {store.readable(size)}", flush=True)


def _bytes_each(how: Making, names: list[str]) -> int:
    square = how.size * how.size * how.channels
    if how.fit != "cover":
        return square
    shapes = [images.shape(how.file(name)) for name in names[:: max(1, len(names) // 64)]]
    ratios = [max(shape) / min(shape) for shape in shapes if shape]
    return int(square * (sum(ratios) / len(ratios) if ratios else 1))


def _by_hash(table: pa.Table) -> dict[str, Line]:
    return {line.hash: line for line in (Line(**row) for row in table.to_pylist())}


def _table(lines: list[Line]) -> pa.Table:
    columns = list(zip(*lines, strict=True)) if lines else [[] for _ in index.SCHEMA]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, index.SCHEMA, strict=True)],
        index.SCHEMA,
    )
