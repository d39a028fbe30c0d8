"""comp inspect: a first configs/competition.yaml from a look at data/raw, every guess with its reason, and a page of pictures."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from comp.engine.config import resolve, yaml_lines
from comp.engine.errors import Refused
from comp.engine.extras import infer_schema
from comp.engine.extras.find_tables import Found
from comp.engine.readers import arrays, decode
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.store import artifacts, paths

ORDER = ("train", "test", "id", "row", "target", "task", "metric", "group", "metadata", "folds", "submission")


def inspect() -> Path:
    file = paths.path("configs", "competition.yaml")
    slug, title, raw_name = kept(file)
    raw = paths.path(raw_name)
    if not raw.is_dir() or not any(raw.iterdir()):
        raise Refused(f"{paths.relative(raw)}: is empty; put the unpacked competition there")
    found = infer_schema.look(raw)
    if file.exists():
        print(f"the old one lies in {paths.relative(artifacts.move_to_trash(file))}")
    artifacts.write_text(file, text(found, slug, title, raw_name))
    _told(found, raw)
    _contact_sheet(found, raw, paths.path("data", "inspect.png"))
    print(f"{paths.relative(file)}: a first guess, every line with its reason; correct it, then: comp check")
    resolve.load(paths.root(), "base")  # what was written must at least be a competition
    return file


def kept(file: Path) -> tuple[str, str, str]:
    """What no look at the files can say, and the old declaration does: slug, title, and where the files are."""
    said: Any = {}
    if file.exists():
        try:
            said, _ = yaml_lines.parse(file.read_bytes())
        except yaml_lines.YamlError:
            print(f"{paths.relative(file)}: cannot be read, so slug and title have to be written anew")
    old = said if isinstance(said, dict) else {}
    usual = {"slug": "competition", "title": "Competition", "raw": "data/raw"}
    slug, title, raw = (str(old.get(key) or value) for key, value in usual.items())
    return slug, title, raw


def text(found: Found, slug: str, title: str, raw: str) -> str:
    lines = [
        "# Written by comp inspect. Every guess has its reason beside it; what was ambiguous stands at the end."
    ]
    lines += [
        f"slug: {yaml_lines.inline(slug)}",
        f"title: {yaml_lines.inline(title)}",
        f"raw: {yaml_lines.inline(raw)}",
    ]
    says = found.says
    for key in ORDER:
        inner = {name.partition(".")[2]: value for name, value in says.items() if name.startswith(f"{key}.")}
        if key in says:
            lines.append(f"{key}: {yaml_lines.inline(says[key])}{_why(found, key)}")
        elif inner:
            lines.append(f"{key}:")
            lines += [
                f"  {name}: {yaml_lines.inline(value)}{_why(found, f'{key}.{name}')}"
                for name, value in inner.items()
            ]
    lines += [f"# ambiguous: {line}" for line in found.unsure]
    return "\n".join(lines) + "\n"


def _why(found: Found, key: str) -> str:
    return f"  # {' '.join(found.why[key].split())}" if key in found.why else ""


def _told(found: Found, raw: Path) -> None:
    if found.labels:
        common = found.labels.most_common()
        shown = ", ".join(f"{label} {count}" for label, count in common[:8])
        print(
            f"{len(common)} labels: {shown}"
            + (f" … {common[-1][0]} {common[-1][1]}" if len(common) > 8 else "")
        )
    if found.spread:
        print(found.spread)
    for source, names in found.images.items():
        print(f"of {len(names)} {source} pictures: {_kinds([_look(raw, name) for name in names])}")
    for line in found.unsure:
        print(f"ambiguous: {line}")


def _kinds(looks: list[Look]) -> str:
    """`40 JPEG RGB, 512 x 384 to 2048 x 1536; 8 PNG L, 64 x 64`"""
    lines = []
    for kind, count in Counter(look.kind for look in looks).most_common(6):
        sizes = sorted({look.size for look in looks if look.kind == kind and look.size}, key=math.prod)
        ends = [f"{width} x {height}" for width, height in sizes[:: max(1, len(sizes) - 1)][:2]]
        lines.append(f"{count} {kind}" + (f", {' to '.join(ends)}" if ends else ""))
    return "; ".join(lines)


class Look(NamedTuple):
    kind: str
    size: tuple[int, int] | None = None  # width, height


def _look(raw: Path, name: str) -> Look:
    """Format and mode as people say them; of what is no ordinary picture what the decoder makes of it."""
    try:
        data = decode.read(raw / name, name)
        with Image.open(io.BytesIO(data)) as image:
            return Look(f"{image.format} {image.mode}", image.size)
    except DamagedImage as damaged:
        return Look(f"no picture ({damaged.reason})")
    except (OSError, Image.UnidentifiedImageError):
        pass
    if data[128:132] == b"DICM" and (dicom := _dicom(data)):
        return dicom
    try:
        height, width, _ = decode.decode(data, None, "stretch", 1, name).shape
    except DamagedImage as damaged:
        return Look(f"no ordinary picture ({damaged.reason})")
    return Look(name.rpartition(".")[2], (width, height))


def _dicom(data: bytes) -> Look | None:
    try:
        import pydicom
    except ImportError:
        return None  # the decoder says what is missing
    try:
        head = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        kind = f"DICOM {head.PhotometricInterpretation} {head.BitsStored} bit"
        return Look(kind, (int(head.Columns), int(head.Rows)))
    except Exception:  # as in arrays.py: whoever decodes it says what is wrong
        return None


def _contact_sheet(found: Found, raw: Path, file: Path) -> None:
    """Training pictures with their labels, then some of test."""
    tiles = []
    train, test = found.images["train"], found.images["test"]
    captions = [*found.captions, *["test"] * len(test)]
    for name, caption in zip([*train, *test], captions, strict=True):
        try:
            data = decode.read(raw / name, name)
            channels = 1 if arrays.decode_numeric(data, 1, decode.DEFAULT_FORMAT, name) else 3
            tiles.append((decode.decode(data, plots.TILE, "contain", channels, name), caption))
        except DamagedImage:
            continue  # said above, by kind
    plots.image_grid(tiles, file, title="training pictures with their labels, then test")
    print(f"{paths.relative(file)}: a contact sheet")
