"""A contact sheet of samples: a small image and a caption each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.schema import Config
from comp.engine.data import image_reader
from comp.engine.data.image_reader import ImageReader
from comp.engine.readers import arrays
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots

EMPTY = ("", "")  # a white tile, which fills a row of the sheet


def write(cfg: Config, images: Iterable[tuple[str, str]], file: Path, title: str, **layout: Any) -> None:
    """`images`: (path, caption). `layout`: as plots.image_grid takes it, like columns=8."""
    reader = replace(image_reader.from_config(cfg), size=plots.TILE, resize="contain")
    plots.image_grid(
        [(_tile(reader, name), caption) for name, caption in images], file, title=title, **layout
    )


def _tile(reader: ImageReader, name: str) -> NDArray[np.uint8]:
    """(height, width, 3). A damaged image is black."""
    if not name:
        return np.full((plots.TILE, plots.TILE, 3), 255, np.uint8)
    try:
        return arrays.to_uint8(reader.image(name))
    except DamagedImage:
        return np.zeros((plots.TILE, plots.TILE, 3), np.uint8)
