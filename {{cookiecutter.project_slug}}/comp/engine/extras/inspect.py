"""comp inspect: a first configs/competition.yaml from the files in data/raw, each guess with its reason, and
a contact sheet."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from comp.engine.config import resolve, yaml_lines
from comp.engine.errors import UserError
from comp.engine.extras import infer_schema
from comp.engine.extras.find_tables import Guesses
from comp.engine.extras.infer_schema import Inferred
from comp.engine.readers import arrays, decode
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.store import artifacts, paths

ORDER = ("train", "test", "id", "row", "target", "task", "metric", "group", "metadata", "folds", "submission")


def inspect() -> Path:
    file = paths.path("configs", "competition.yaml")
    slug, title, raw_name = existing_values(file)
    raw = paths.path(raw_name)
    if not raw.is_dir() or not any(raw.iterdir()):
        raise UserError(
            "folder-empty",
            where=paths.relative(raw),
            what="is empty",
            remedy="put the unpacked competition there, or comp download",
        )
    inferred = infer_schema.infer(raw)
    if file.exists():
        print(f"the existing file was moved to {paths.relative(artifacts.move_to_trash(file))}")
    artifacts.write_text(file, to_yaml(inferred.guesses, slug, title, raw_name))
    _report(inferred, raw)
    _contact_sheet(inferred, raw, paths.path("data", "inspect.png"))
    print(f"{paths.relative(file)}: guesses, each with its reason; correct them, then: comp check")
    resolve.load(paths.root(), "base")  # the file must at least be valid
    return file


def existing_values(file: Path) -> tuple[str, str, str]:
    """slug, title and raw of the existing file, which cannot be guessed."""
    parsed: Any = {}
    if file.exists():
        try:
            parsed, _ = yaml_lines.parse(file.read_bytes())
        except yaml_lines.YamlError:
            print(f"{paths.relative(file)}: cannot be read; set slug and title again")
    old = parsed if isinstance(parsed, dict) else {}
    defaults = {"slug": "competition", "title": "Competition", "raw": "data/raw"}
    slug, title, raw = (str(old.get(key) or value) for key, value in defaults.items())
    return slug, title, raw


def to_yaml(guesses: Guesses, slug: str, title: str, raw: str) -> str:
    lines = ["# Written by comp inspect. Each guess has its reason; what was ambiguous is listed at the end."]
    lines += [
        f"slug: {yaml_lines.inline(slug)}",
        f"title: {yaml_lines.inline(title)}",
        f"raw: {yaml_lines.inline(raw)}",
    ]
    values = guesses.values
    for key in ORDER:
        inner = {
            name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{key}.")
        }
        if key in values:
            lines.append(f"{key}: {yaml_lines.inline(values[key])}{_reason(guesses, key)}")
        elif inner:
            lines.append(f"{key}:")
            lines += [
                f"  {name}: {yaml_lines.inline(value)}{_reason(guesses, f'{key}.{name}')}"
                for name, value in inner.items()
            ]
    lines += [f"# ambiguous: {line}" for line in guesses.ambiguous]
    return "\n".join(lines) + "\n"


def _reason(guesses: Guesses, key: str) -> str:
    return f"  # {' '.join(guesses.reasons[key].split())}" if key in guesses.reasons else ""


def _report(inferred: Inferred, raw: Path) -> None:
    guesses = inferred.guesses
    if guesses.label_counts:
        common = guesses.label_counts.most_common()
        first = ", ".join(f"{label} {count}" for label, count in common[:8])
        last = f" … {common[-1][0]} {common[-1][1]}" if len(common) > 8 else ""
        print(f"{len(common)} labels: {first}{last}")
    if guesses.value_range:
        print(guesses.value_range)
    for kind, examples in (("train", inferred.train), ("test", inferred.test)):
        formats = _summary([_image_format(raw, name) for name in examples.paths])
        print(f"of {len(examples.paths)} {kind} images: {formats}")
    for line in guesses.ambiguous:
        print(f"ambiguous: {line}")


class ImageFormat(NamedTuple):
    name: str
    size: tuple[int, int] | None = None  # width, height


def _summary(formats: list[ImageFormat]) -> str:
    """`40 JPEG RGB, 512 x 384 to 2048 x 1536; 8 PNG L, 64 x 64`"""
    lines = []
    for name, count in Counter(each.name for each in formats).most_common(6):
        sizes = sorted({each.size for each in formats if each.name == name and each.size}, key=math.prod)
        ends = [f"{width} x {height}" for width, height in sizes[:: max(1, len(sizes) - 1)][:2]]
        lines.append(f"{count} {name}" + (f", {' to '.join(ends)}" if ends else ""))
    return "; ".join(lines)


def _image_format(raw: Path, name: str) -> ImageFormat:
    """Format and mode as PIL names them; of other files, DICOM tags or the size after decoding."""
    try:
        data = decode.read(raw / name, name)
        with Image.open(io.BytesIO(data)) as image:
            return ImageFormat(f"{image.format} {image.mode}", image.size)
    except DamagedImage as damaged:
        return ImageFormat(f"no image ({damaged.reason})")
    except (OSError, Image.UnidentifiedImageError):
        pass
    if data[128:132] == b"DICM" and (dicom := _dicom_format(data)):
        return dicom
    try:
        height, width, _ = decode.decode(data, None, "stretch", 1, name).shape
    except DamagedImage as damaged:
        return ImageFormat(f"unreadable image ({damaged.reason})")
    return ImageFormat(name.rpartition(".")[2], (width, height))


def _dicom_format(data: bytes) -> ImageFormat | None:
    try:
        import pydicom
    except ImportError:
        return None  # the decoder's error names the missing package
    try:
        head = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        name = f"DICOM {head.PhotometricInterpretation} {head.BitsStored} bit"
        return ImageFormat(name, (int(head.Columns), int(head.Rows)))
    except Exception:  # pydicom raises many kinds; the decoder's error says what is wrong with the file
        return None


def _contact_sheet(inferred: Inferred, raw: Path, file: Path) -> None:
    """Training images with their labels, then some of test."""
    tiles = []
    train, test = inferred.train, inferred.test
    captions = [*train.captions, *test.captions]
    for name, caption in zip([*train.paths, *test.paths], captions, strict=True):
        try:
            data = decode.read(raw / name, name)
            channels = 1 if arrays.decode_numeric(data, 1, decode.DEFAULT_FORMAT, name) else 3
            tiles.append((decode.decode(data, plots.TILE, "contain", channels, name), caption))
        except DamagedImage:
            continue  # counted in the summary of formats
    plots.image_grid(tiles, file, title="training images with their labels, then test")
    print(f"{paths.relative(file)}: a contact sheet")
