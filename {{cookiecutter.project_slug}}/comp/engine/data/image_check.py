"""comp check: checks that every image of the tables exists and decodes. Files that are unchanged since the
last check are not opened again."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from comp.engine import hardware
from comp.engine.config import declaration
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data import image_key, image_reader
from comp.engine.data.prepare import Prepared
from comp.engine.errors import UserError
from comp.engine.readers import decode
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 2000  # images submitted to the pool at once
SMALL = 96  # px; smaller images lose most of their detail in the first two layers of the usual stems
DECODED_SIZE = 32  # px; finds the same damage as a full decode, and is faster


class CheckedImage(NamedTuple):
    """The result of opening an image. Size and mtime show later whether the file has changed."""

    name: str
    bytes: int
    mtime: int
    side: int  # px of the shorter side; 0 if unknown
    fault: str  # empty if it decodes; starts with decode.WARNED for a JPEG that libjpeg warns about


def check(cfg: Config, prepared: Prepared, as_trained: bool) -> tuple[list[UserError], list[str]]:
    """Returns faults and notes. `as_trained`: decode at data.size and by data.resize, as training does."""
    reader = image_reader.from_config(cfg)
    if not as_trained:
        reader = replace(reader, size=DECODED_SIZE, resize="stretch")
    raw = paths.path(cfg.competition.raw)
    first_row: dict[str, int] = {}  # image key -> the first row that lists it
    for row, names in enumerate(prepared.frame["images"]):
        for name in names:
            first_row.setdefault(name, row)
    listed_files = {file for name in first_row for file in image_key.files(name)}
    existing_files = set(_files_in_folders(raw, listed_files))
    is_folder = {
        folder: (raw / folder).is_dir() for folder in {os.path.dirname(file) for file in listed_files}
    }
    existing_files |= {  # members of an archive
        file for file in listed_files if not is_folder[os.path.dirname(file)] and reader.stamp(file)[0] >= 0
    }
    existing = {name for name in first_row if existing_files.issuperset(image_key.files(name))}
    faults = _missing_images(prepared, first_row, existing, existing_files, raw)
    checked = _check_all(reader, [name for name in first_row if name in existing])
    lenient = reader.pixel_format.lenient
    warned = [image for image in checked if image.fault.startswith(decode.WARNED)]
    damaged = [image for image in checked if image.fault and not (lenient and image in warned)]
    faults += [
        UserError("image-damaged", where=prepared.where(first_row[image.name]), what=_described(image))
        for image in damaged
    ]
    notes = [f"{len(first_row)} images listed, {len(checked)} found, {len(damaged)} damaged"]
    notes += _unlisted(prepared, sorted(existing_files - listed_files))
    sides = [image.side for image in checked if image.side]
    side = int(np.median(sides)) if sides else SMALL
    # Only the size of an experiment counts: without one, cfg is configs/base.yaml.
    enlarged = as_trained and cfg.data.size > side
    if side < SMALL and cfg.model.stem != "small" and not enlarged:
        subject = (
            f"this experiment (data.size={cfg.data.size}) has" if as_trained else "configs/base.yaml has"
        )
        notes.append(
            f"hint: half of the images are {side} px or smaller, and {subject} model.stem={cfg.model.stem}, "
            f"which divides the size by up to 4; small images need model.stem=small with data.size={side}, "
            "or a data.size above theirs"
        )
    notes += _libjpeg_warnings(warned, prepared, first_row, lenient)
    return faults, notes


def _described(image: CheckedImage) -> str:
    return f"image {image_key.shown(image.name)}: {image.fault}"


def _missing_images(
    prepared: Prepared, first_row: dict[str, int], existing: set[str], existing_files: set[str], raw: Path
) -> list[UserError]:
    """One fault per missing image, or one for the template of a table if none of its images exists."""
    faults = []
    for source in prepared.frame["source"].unique():
        names = [n for images in prepared.frame["images"][prepared.frame["source"] == source] for n in images]
        missing = [name for name in names if name not in existing]
        if missing and len(missing) == len(names):
            candidates = sorted(existing_files) or sorted(str(p.relative_to(raw)) for p in raw.iterdir())
            example = next(file for file in image_key.files(missing[0]) if file not in existing_files)
            faults.append(
                declaration.error(
                    "images-missing",
                    f"{source}.image",
                    f"none of {len(names)} files exists, like {example}",
                    f"did you mean {nearest(example, candidates[:2000])[0]}?",
                )
            )
            continue
        faults += [
            UserError(
                "image-missing",
                where=prepared.where(first_row[name]),
                what=f"image {image_key.shown(name)}: no such file",
            )
            for name in dict.fromkeys(missing)
        ]
    return faults


def _libjpeg_warnings(
    warned: Sequence[CheckedImage], prepared: Prepared, first_row: dict[str, int], lenient: bool
) -> list[str]:
    """Notes on JPEGs that decode with a warning. Whether they are complete must be checked by eye."""
    if not warned:
        return []
    if not lenient:
        return [
            f"hint: {len(warned)} of them are JPEGs that libjpeg warns about, like "
            f"{image_key.shown(warned[0].name)}; if they look complete, set pixels: {{lenient: true}} in "
            f"{declaration.FILE} to use all of them"
        ]
    return [
        f"note: {len(warned)} JPEGs that libjpeg warns about are used as far as they decode (pixels.lenient "
        f"in {declaration.FILE})",
        *(f"note: {prepared.where(first_row[image.name])}: {_described(image)}" for image in warned),
    ]


def _unlisted(prepared: Prepared, names: Sequence[str]) -> list[str]:
    """Notes on images that no row lists, one per folder. They are not faults, since hosts leave some behind;
    but they may also belong to rows that were lost."""
    sources: dict[str, set[str]] = {}  # of the rows that list images of a folder
    for source, listed in zip(prepared.frame["source"], prepared.frame["images"], strict=True):
        for name in (file for key in listed for file in image_key.files(key)):
            sources.setdefault(os.path.dirname(name), set()).add(source)
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(os.path.dirname(name), []).append(name)
    return [
        f"note: {len(found)} more files in {folder or 'data/raw'}, like {found[0]}, are listed by no "
        f"{' or '.join(sorted(sources[folder]))} row and not used"
        for folder, found in by_folder.items()
    ]


def _files_in_folders(raw: Path, listed: Collection[str]) -> Iterator[str]:
    """All files in the folders of the listed images that have a suffix of theirs."""
    suffixes = {os.path.splitext(name)[1] for name in listed}
    for folder in sorted({os.path.dirname(name) for name in listed}):
        if (raw / folder).is_dir():
            with os.scandir(raw / folder) as entries:
                for entry in entries:
                    if os.path.splitext(entry.name)[1] in suffixes and _is_file(entry):
                        yield os.path.join(folder, entry.name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself; opening it reports the error
        return True


# --- opening ------------------------------------------------------------------------------------------------


def _check_all(reader: image_reader.ImageReader, names: Sequence[str]) -> list[CheckedImage]:
    """Decodes in parallel. Images whose size, mtime and decoder are those of the last check are not opened
    again."""
    from tqdm import tqdm

    file = paths.path("data", "checked", f"{reader.key}.parquet")
    known = {image.name: image for image in _load(file)}
    done: dict[str, CheckedImage] = {}
    todo = []
    for name in names:
        old = known.get(name)
        if old and (old.bytes, old.mtime) == reader.stamp(name):
            done[name] = old
        else:
            todo.append(name)
    if todo:
        print(f"opening {len(todo)} images" + (f", {len(done)} are unchanged" if done else ""))
        try:
            with (
                ThreadPoolExecutor(hardware.cores()) as pool,
                tqdm(total=len(todo), desc="check", disable=None) as progress,
            ):
                for start in range(0, len(todo), BATCH):
                    for image in pool.map(lambda name: _check_one(reader, name), todo[start : start + BATCH]):
                        done[image.name] = image
                        progress.update()
        finally:  # also after Ctrl+C: the next check continues from here
            _save(file, list(done.values()))
    return [done[name] for name in names]


def _check_one(reader: image_reader.ImageReader, name: str) -> CheckedImage:
    size, mtime = reader.stamp(name)
    side, fault = 0, ""
    strict = replace(reader, pixel_format=reader.pixel_format._replace(lenient=False))
    try:
        data = reader.read(name)
        strict.image(name, data)
        side = _shorter_side(data)
    except decode.DamagedImage as damaged:
        fault = damaged.reason
    return CheckedImage(name, size, mtime, side, fault)


def _shorter_side(data: bytes) -> int:
    """The shorter side from the header; 0 for a format that only load_image of competition.py reads."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size)
    except Image.UnidentifiedImageError:
        return 0


def _load(file: Path) -> list[CheckedImage]:
    """Reads the results of the last check. If the file is damaged, all images are opened again."""
    import pyarrow.parquet as pq

    entry = artifacts.manifest_entry(file)
    if entry is None or entry["sha256"] != artifacts.sha256(file):
        return []
    table: pa.Table = pq.read_table(file)
    columns = (table[name].to_pylist() for name in CheckedImage._fields)
    return [CheckedImage(*row) for row in zip(*columns, strict=True)]


def _save(file: Path, images: Sequence[CheckedImage]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with artifacts.atomic(file) as temporary:
        columns = {name: [getattr(image, name) for image in images] for name in CheckedImage._fields}
        pq.write_table(pa.table(columns), temporary)
    artifacts.add_to_manifest(file)
