"""comp inspect: a first configs/competition.yaml from a look at data/raw, every guess with its reason, and a page of pictures."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comp import config, store, yaml_lines
from comp.config import Refused
from comp.prepare import arrays, guess, images
from comp.prepare.arrays import Damaged
from comp.prepare.guess import Found

ORDER = ("train", "test", "id", "row", "target", "task", "metric", "group", "metadata", "folds", "submission")


def inspect() -> Path:
    file = store.path("configs", "competition.yaml")
    slug, title, raw_name = kept(file)
    raw = store.path(raw_name)
    if not raw.is_dir() or not any(raw.iterdir()):
        raise Refused(f"{store.shown(raw)}: is empty; put the unpacked competition there")
    found = guess.look(raw)
    if file.exists():
        print(f"the old one lies in {store.shown(store.trash(file))}")
    store.write_text(file, text(found, slug, title, raw_name))
    _told(found, raw)
    _contact_sheet(found.images, raw, store.path("data", "inspect.png"))
    print(f"{store.shown(file)}: a first guess, every line with its reason; correct it, then: comp check")
    config.load(store.root(), "base")  # what was written must at least be a competition
    return file


def kept(file: Path) -> tuple[str, str, str]:
    """What no look at the files can say, and the old declaration does: slug, title, and where the files are."""
    said: Any = {}
    if file.exists():
        try:
            said, _ = yaml_lines.parse(file.read_bytes())
        except yaml_lines.Unreadable:
            print(f"{store.shown(file)}: cannot be read, so slug and title have to be written anew")
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
    says = dict(found.says) | {"folds.k": 5, "folds.seed": 0}
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
    kinds = Counter(_kind(raw, name) for name in found.images)
    print(
        f"of {len(found.images)} pictures: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    )
    for line in found.unsure:
        print(f"ambiguous: {line}")


def _kind(raw: Path, name: str) -> str:
    """Format, mode and size as people say them; of what is no ordinary picture what the decoder makes of it."""
    try:
        data = images.read(raw / name, name)
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode} {image.width} x {image.height}"
    except Damaged as damaged:
        return f"no picture ({damaged.reason})"
    except (OSError, Image.UnidentifiedImageError):
        pass
    try:
        height, width, _ = images.decode(data, None, "stretch", 1, name).shape
    except Damaged as damaged:
        return f"no ordinary picture ({damaged.reason})"
    return f"{name.rpartition('.')[2]} {width} x {height}"


def _contact_sheet(names: list[str], raw: Path, file: Path, side: int = 96) -> None:
    sheet = Image.new("RGB", (8 * side, 6 * side))
    for number, name in enumerate(names[:48]):
        try:
            data = images.read(raw / name, name)
            channels = 1 if arrays.planes(data, 1, images.NO_NUMBERS, name) else 3
            pixels = images.decode(data, side, "contain", channels, name)
        except Damaged:
            continue  # said above, by kind
        picture = Image.fromarray(np.repeat(pixels, 3 // channels, axis=2))
        sheet.paste(picture, (number % 8 * side, number // 8 * side))
    with store.writing(file) as temporary:
        sheet.save(temporary, "PNG")
    print(f"{store.shown(file)}: a contact sheet")
