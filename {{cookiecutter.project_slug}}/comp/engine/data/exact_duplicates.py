"""Finds samples with the same image file, and files with equal bytes. No image is decoded.

Cost: one stat per file. Only files of equal size are read: 4 KB from the middle, and the whole file if these
are equal too. Hashes that the index of an image cache has are used instead.
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
from comp.engine.data import cache, image_key, image_reader
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.readers.arrays import DamagedImage

MIDDLE = 4096  # bytes; file headers are alike within a format, and file ends within a border of one color
CHUNK = 64  # files per task of the thread pool

Ints = NDArray[np.int64]


class ImageFiles(NamedTuple):
    """The image files of the samples: one entry for each file of each sample."""

    names: list[str]  # of each file; of an image made of one file alone the first image key (image_key.py)
    sample: Positions  # (entries,) the sample
    image: Ints  # (entries,) the file, as an index into names
    content: Ints  # (names,) equal numbers for equal bytes
    unread: dict[str, str]  # name -> why its bytes could not be read

    @property
    def by_path(self) -> Ints:
        """(entries,) equal numbers for the same file."""
        return self.image

    @property
    def by_bytes(self) -> Ints:
        """(entries,) equal numbers for equal bytes."""
        return self.content[self.image]


def find_by_path(samples: Samples) -> ImageFiles:
    """By path alone: `train/a.png` and `train/./a.png` are one file, and so are two crops of it."""
    import pandas as pd

    if "images" not in samples.frame:
        none = np.zeros(0, np.int64)
        return ImageFiles([], none, none, none, {})
    listed = samples.frame["images"].reset_index(drop=True).explode().dropna().map(_files).explode()
    code, normal = pd.factorize(listed.map(_normal))
    first = np.full(len(normal), len(code))
    np.minimum.at(first, code, np.arange(len(code)))
    names = listed.to_numpy(object)[first].tolist()  # the spelling of the image caches
    sample = listed.index.to_numpy(np.int64)
    return ImageFiles(names, sample, code.astype(np.int64), np.arange(len(names)), {})


def _files(key: str) -> list[str]:
    """The files of an image key. A single file is returned as the key itself, as in the image caches."""
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
        except UserError as error:  # an archive that cannot be opened
            unread[name] = error.lines[0]
            return -1, -1
        if found[0] < 0:
            unread[name] = f"{image_key.shown(name)}: no such file"
        return found

    stamps = np.array([stamp(name) for name in images.names], np.int64).reshape(-1, 2)
    content = _content_ids(reader, images.names, stamps, unread)
    return images._replace(content=content, unread=unread)


def _content_ids(
    reader: image_reader.ImageReader, names: list[str], stamps: NDArray[Any], unread: dict[str, str]
) -> Ints:
    """A number for each file: equal ones for equal bytes. `stamps` is (names, 2): size and mtime."""
    size = stamps[:, 0]
    content = np.arange(len(names))
    candidates = np.flatnonzero(_repeated(size) & (size > 0))
    if not len(candidates):
        return content
    chosen = [names[at] for at in candidates]
    hashes = cache.known_hashes(reader.raw, pa.array(chosen, pa.string()), stamps[candidates])
    new = hashes == ""
    # 1. No hash of a file of this size is cached: compare the middle of the files, which usually differs.
    hash_known = np.isin(size[candidates], size[candidates][~new])
    by_middle = np.flatnonzero(new & ~hash_known)
    middle = np.full(len(candidates), "", object)
    middle[by_middle] = map_files(
        lambda name: _middle(reader, name), [chosen[at] for at in by_middle], "comparing images"
    )
    # 2. Hash whole files: those with equal size and middle, and those to compare with a cached hash.
    sizes = size[candidates][by_middle]
    pair = np.array([f"{n} {m}" for n, m in zip(sizes, middle[by_middle], strict=True)], object)
    whole = np.union1d(by_middle[_repeated(pair)], np.flatnonzero(new & hash_known))
    hashes[whole] = map_files(
        lambda name: file_hash(reader, name, unread), [chosen[at] for at in whole], "hashing images"
    )
    hashed = np.flatnonzero(hashes != "")
    _, first, index = np.unique(hashes[hashed].astype(str), return_index=True, return_inverse=True)
    content[candidates[hashed]] = candidates[hashed][first[index]]
    return content


def notes_on_shared_images(cfg: Config, samples: Samples) -> list[str]:
    """For comp check, before folds are made: notes on rows that share an image; no errors, as they may
    end up in one fold."""
    import pandas as pd

    frame, images = samples.frame, find_by_bytes(cfg, samples)
    by_path, by_bytes = duplicate_pairs(images, images.by_path), duplicate_pairs(images, images.by_bytes)
    known, all_pairs = (pairs @ np.array([len(frame), 1]) for pairs in (by_path, by_bytes))
    rule = "with folds.duplicates: group they share a fold, otherwise they must not be in several folds"
    if cfg.competition.folds.scheme == "time":
        rule = "they must not be in several folds"
    ids, source = (frame[name].to_numpy(object) for name in ("id", "source"))
    notes = []
    for pairs, what, then in (
        (by_path, "share an image file", "no fold trains on one and scores another of them"),
        (by_bytes[~np.isin(all_pairs, known)], "have files of the same bytes", rule),
    ):
        pairs = pairs[(source[pairs] != "test").any(axis=1)]
        pairs = pairs[ids[pairs[:, 0]] != ids[pairs[:, 1]]]  # of an id that is twice in the table, an error
        if len(pairs):
            by_source = pd.Series(source[np.unique(pairs)]).value_counts(sort=False)
            counts = ", ".join(f"{count} {kind}" for kind, count in by_source.items())
            like = " and ".join(repr(ids[at]) for at in pairs[0])
            notes.append(f"note: {counts} rows {what}, like {like}; {then}")
    return notes


def _repeated(values: NDArray[Any]) -> NDArray[np.bool_]:
    """(values,): which of them occur more than once."""
    if not len(values):
        return np.zeros(0, bool)
    values = values.astype(str) if values.dtype == object else values
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(count[index] > 1)


def _middle(reader: image_reader.ImageReader, name: str) -> str:
    """Hash of the middle of a file. Empty for a member of an archive, which cannot be read in part."""
    try:
        with reader.file(name).open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - MIDDLE) // 2)
            return hashlib.blake2b(opened.read(MIDDLE), digest_size=16).hexdigest()
    except OSError:
        return ""


def file_hash(reader: image_reader.ImageReader, name: str, unread: dict[str, str]) -> str:
    """Hash as in an image cache. Empty for an unreadable file; the reason is added to `unread`."""
    try:
        return image_reader.content_hash(reader.read(name))
    except (DamagedImage, UserError) as error:
        unread[name] = str(error)
        return ""


def map_files(function: Callable[[str], str], names: Sequence[str], description: str) -> list[str]:
    """In order, in as many threads as there are cores: reading and hashing release the GIL."""
    from tqdm import tqdm

    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    out: list[str] = []
    with (
        ThreadPoolExecutor(hardware.cores()) as pool,
        tqdm(total=len(names), desc=description, delay=2, disable=None, leave=False) as bar,
    ):
        for part in pool.map(lambda chunk: [function(name) for name in chunk], chunks):
            out += part
            bar.update(len(part))
    return out


def duplicate_pairs(images: ImageFiles, image_id: Ints) -> NDArray[np.int64]:
    """(pairs, 2): of each image the first sample with every other that has it, which connects all of them.

    `image_id`: images.by_path or images.by_bytes.
    """
    order = np.lexsort((images.sample, image_id))
    image_id, sample = image_id[order], images.sample[order]
    first = sample[np.searchsorted(image_id, image_id)]
    return np.unique(np.column_stack([first, sample])[first != sample], axis=0)
