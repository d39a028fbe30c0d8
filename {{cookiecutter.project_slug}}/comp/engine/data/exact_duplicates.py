"""Which samples name the same image file, and which name files of equal bytes. Nothing is decoded here.

Costs one stat a file. Bytes are read only of files that share their size with another: 4 KB from the middle of each, and all of
those that agree there. A hash that an image cache holds is taken from its index, so a project with caches reads nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from comp.engine import hardware
from comp.engine.config.schema import Config
from comp.engine.data import cache_index, image_key, image_reader
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.readers.arrays import DamagedImage

MIDDLE = 4096  # bytes: heads are alike within a format, and ends within a border of one colour
CHUNK = 64  # files a task of the pool

Ints = NDArray[np.int64]


class ImageFiles(NamedTuple):
    """A line for each image file of each sample."""

    names: list[str]  # of each file, or the first key of an image that is made of it alone
    sample: Positions
    image: Ints  # place in names
    content: Ints  # of each name; files of equal bytes share a number, and every other file has its own
    unread: dict[str, str]  # name -> why its bytes could not be compared

    @property
    def by_path(self) -> Ints:
        return self.image

    @property
    def by_bytes(self) -> Ints:
        return self.content[self.image]


def find_by_path(samples: Samples) -> ImageFiles:
    """From the table alone: `train/a.png` and `train/./a.png` are one file, and so are two crops of it (image_key.py)."""
    import pandas as pd

    if "images" not in samples.frame:
        none = np.zeros(0, np.int64)
        return ImageFiles([], none, none, none, {})
    listed = samples.frame["images"].reset_index(drop=True).explode().dropna().map(_files).explode()
    code, normal = pd.factorize(listed.map(_normal))
    first = np.full(len(normal), len(code))
    np.minimum.at(first, code, np.arange(len(code)))
    names = listed.to_numpy(object)[first].tolist()  # as the caches spell them
    return ImageFiles(
        names, listed.index.to_numpy(np.int64), code.astype(np.int64), np.arange(len(names)), {}
    )


def _files(key: str) -> list[str]:
    """The key itself for one file, since the caches know it by that; otherwise the files, which are channels of one image."""
    files = image_key.files(key)
    return files if len(files) > 1 else [key]


def _normal(key: str) -> str:
    return os.path.normpath(image_key.paths(key))


def find_by_bytes(cfg: Config, samples: Samples) -> ImageFiles:
    images, reader = find_by_path(samples), image_reader.from_config(cfg)
    unread: dict[str, str] = {}

    def stamp(name: str) -> tuple[int, int]:
        try:
            found = reader.stamp(name)
        except UserError as refused:  # an archive that cannot be opened
            unread[name] = refused.lines[0]
            return -1, -1
        if found[0] < 0:
            unread[name] = f"{image_key.shown(name)}: no such file"
        return found

    found = np.array([stamp(name) for name in images.names], np.int64).reshape(-1, 2)
    content = _content(reader, images.names, found, unread)
    return images._replace(content=content, unread=unread)


def _content(
    reader: image_reader.ImageReader, names: list[str], found: NDArray[Any], unread: dict[str, str]
) -> Ints:
    """A number for each file: equal ones for equal bytes."""
    size = found[:, 0]
    content = np.arange(len(names))
    asked = np.flatnonzero(_shared(size) & (size > 0))
    if not len(asked):
        return content
    chosen = [names[at] for at in asked]
    hashed = cache_index.known_hashes(reader.raw, pa.array(chosen, pa.string()), found[asked])
    new = hashed == ""
    # Of a size that no cache holds the middle of a file tells most apart; beside a known hash only a hash helps.
    mixed = np.isin(size[asked], size[asked][~new])
    told = np.flatnonzero(new & ~mixed)
    middle = np.full(len(asked), "", object)
    middle[told] = map_files(
        lambda name: _middle(reader, name), [chosen[at] for at in told], "comparing images"
    )
    pair = np.array([f"{n} {m}" for n, m in zip(size[asked][told], middle[told], strict=True)], object)
    whole = np.union1d(told[_shared(pair)], np.flatnonzero(new & mixed))
    hashed[whole] = map_files(
        lambda name: file_hash(reader, name, unread), [chosen[at] for at in whole], "hashing images"
    )
    same = np.flatnonzero(hashed != "")
    _, first, place = np.unique(hashed[same].astype(str), return_index=True, return_inverse=True)
    content[asked[same]] = asked[same][first[place]]
    return content


def _shared(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of them occur more than once."""
    if not len(values):
        return np.zeros(0, bool)
    values = values.astype(str) if values.dtype == object else values
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(count[place] > 1)


def _middle(reader: image_reader.ImageReader, name: str) -> str:
    """Empty for a member of an archive, of which nothing is gained by reading a part."""
    try:
        with reader.file(name).open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - MIDDLE) // 2)
            return hashlib.blake2b(opened.read(MIDDLE), digest_size=16).hexdigest()
    except OSError:
        return ""


def file_hash(reader: image_reader.ImageReader, name: str, unread: dict[str, str]) -> str:
    """As an image cache has it; empty for what cannot be read, whose reason goes into `unread`."""
    try:
        return image_reader.content_hash(reader.read(name))
    except (DamagedImage, UserError) as fault:
        unread[name] = str(fault)
        return ""


def map_files(work: Callable[[str], str], names: Sequence[str], doing: str) -> list[str]:
    """In order, by as many threads as there are cores: reading and hashing release Python's lock."""
    from tqdm import tqdm

    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    out: list[str] = []
    with (
        ThreadPoolExecutor(hardware.cores()) as pool,
        tqdm(total=len(names), desc=doing, delay=2, disable=None, leave=False) as bar,
    ):
        for part in pool.map(lambda chunk: [work(name) for name in chunk], chunks):
            out += part
            bar.update(len(part))
    return out


def duplicate_pairs(images: ImageFiles, code: Ints) -> NDArray[np.int64]:
    """(pairs, 2): the first sample of each image with every other that has it; enough to hold them together. `code`: by_path or
    by_bytes, a number a line."""
    order = np.lexsort((images.sample, code))
    code, sample = code[order], images.sample[order]
    first = sample[np.searchsorted(code, code)]
    return np.unique(np.column_stack([first, sample])[first != sample], axis=0)
