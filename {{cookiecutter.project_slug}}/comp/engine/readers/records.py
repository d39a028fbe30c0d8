"""Containers of images that are records or arrays: .bson, .npy, .parquet and .json. See containers.py."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from comp.engine.errors import UserError
from comp.engine.store import paths


class Bson:
    """Images in the documents of a .bson file, as `<_id>/<n>.jpg`. Their offsets are found in one pass when
    the file is opened."""

    def __init__(self, file: Path):
        self.path = file
        self.places: dict[str, tuple[int, int]] = {}
        for record, images in records(file):
            for number, place in enumerate(images):
                self.places[f"{record.get('_id')}/{number}.jpg"] = place
        self.names = list(self.places)

    def size(self, name: str) -> int:
        return self.places[name][1]

    def read(self, name: str) -> bytes:
        offset, size = self.places[name]
        with self.path.open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)


def records(file: Path) -> Iterator[tuple[dict[str, Any], list[tuple[int, int]]]]:
    """The documents of a .bson file: the fields, and (offset, size) of every binary in it, at any depth."""
    with file.open("rb") as opened:
        at = 0
        while head := opened.read(4):
            size = struct.unpack("<i", head)[0] if len(head) == 4 else 0
            body = opened.read(max(size - 4, 0))
            if size < 5 or len(body) != size - 4:
                raise UserError(
                    "file-damaged", where=paths.relative(file), what=f"cut off or damaged at byte {at}"
                )
            images: list[tuple[int, int]] = []
            yield _document(head + body, 0, at, images, file), images
            at += size


_FIXED = {0x01: "<d", 0x10: "<i", 0x12: "<q", 0x09: "<q", 0x08: "<?", 0x11: "<Q"}


def _document(
    data: bytes, start: int, base: int, images: list[tuple[int, int]], file: Path
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    at = start + 4
    while data[at]:
        kind, end = data[at], data.index(0, at + 1)
        key, at = data[at + 1 : end].decode(), end + 1
        if kind in _FIXED:
            (out[key],) = struct.unpack_from(_FIXED[kind], data, at)
            at += struct.calcsize(_FIXED[kind])
        elif kind in (0x02, 0x0D, 0x0E):
            (size,) = struct.unpack_from("<i", data, at)
            out[key] = data[at + 4 : at + 3 + size].decode()
            at += 4 + size
        elif kind in (0x03, 0x04):
            (size,) = struct.unpack_from("<i", data, at)
            inner = _document(data, at, base, images, file)
            out |= {f"{key}.{name}": value for name, value in inner.items()}
            at += size
        elif kind == 0x05:
            (size,) = struct.unpack_from("<i", data, at)
            images.append((base + at + 5, size))
            at += 5 + size
        elif kind == 0x07:
            out[key] = data[at : at + 12].hex()
            at += 12
        elif kind in (0x06, 0x0A):
            out[key] = None
        else:
            raise UserError(
                "file-unsupported",
                where=paths.relative(file),
                what=f"byte {base + at}: the type {kind:#x} of {key!r} is not supported",
            )
    return out


class Npy:
    def __init__(self, file: Path):
        with file.open("rb") as opened:
            if not npy_shape(opened, file.stat().st_size):
                raise ValueError("a single number, no array of images")
        self.array = np.load(file, mmap_mode="r")
        self.names = [str(i) for i in range(len(self.array))]

    def size(self, name: str) -> int:
        return int(self.array[0].nbytes)

    def read(self, name: str) -> bytes:
        return as_npy(self.array[int(name)])


class Parquet:
    """Rows of a parquet file whose numbers are an image, named by the first column."""

    def __init__(self, file: Path):
        import pyarrow.parquet as pq

        self.table = pq.read_table(file, memory_map=True)
        self.names = [str(name) for name in self.table.column(0).to_pylist()]
        self.row_of = {name: i for i, name in enumerate(self.names)}

    def size(self, name: str) -> int:
        return 8 * (self.table.num_columns - 1)

    def read(self, name: str) -> bytes:
        row = self.table.slice(self.row_of[name], 1).to_pydict()
        return as_npy(np.array([value[0] for value in list(row.values())[1:]]))


class Json:
    """Fields with lists of numbers in the records of a json file, as `<id>/<field>`."""

    def __init__(self, file: Path):
        self.lists: dict[str, Any] = {}
        for number, record in enumerate(json.loads(file.read_bytes())):
            key = record.get("id", number) if isinstance(record, dict) else number
            for field, value in record.items() if isinstance(record, dict) else ():
                if isinstance(value, list) and value and isinstance(value[0], int | float | list):
                    self.lists[f"{key}/{field}"] = value
        self.names = list(self.lists)

    def size(self, name: str) -> int:
        return 8 * len(self.lists[name])

    def read(self, name: str) -> bytes:
        return as_npy(np.array(self.lists[name]))


def as_npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array))
    return out.getvalue()


def npy_shape(file: BinaryIO, size: int) -> tuple[int, ...]:
    """The shape in the header of a .npy of `size` bytes. Raises ValueError with one line if the file is not a
    complete array: np.load would allocate memory for any shape, and parses the header as Python."""
    try:
        version = np.lib.format.read_magic(file)
        reader = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = reader(file)
    except Exception as error:  # Python's tokenizer and parser raise various ones
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        reason = re.sub(r" at 0x\w+", "", reason)  # it is stored in the cache, whose bytes must not vary
        raise ValueError(f"no valid header of an array: {reason}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    expected, present = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or expected > present:
        raise ValueError(
            f"its header declares {dtype} of shape {shape}, {expected:,} bytes, and {present:,} follow"
        )
    return tuple(shape)


def from_npy(data: bytes) -> NDArray[Any]:
    npy_shape(io.BytesIO(data), len(data))
    array: NDArray[Any] = np.load(io.BytesIO(data))
    return array
