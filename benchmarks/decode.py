"""Decoding and filling the cache against what users have: python benchmarks/decode.py [FOLDER]

1,024 px JPEGs of quality 90, about 210 KB each, with the statistics of photographs: energy falls with frequency as in
nature, colours go together, edges are hard. Variants take turns in one process, one round after the other; a ratio is the
median of the rounds' ratios, so what else runs on the machine hits both sides. Writes decode.json into FOLDER (default: build).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from photographs import PROJECT, Picture, in_turns, jpegs, ratio, written

FILES, COPIES, ROUNDS, SIZE = 64, 6, 11, 256


def decoding(files: list[bytes]) -> dict[str, Any]:
    from comp.engine.readers import decode

    def typical(data: bytes) -> Any:
        image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        return cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    def floor(data: bytes) -> Any:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)

    def ours(data: bytes) -> Picture:
        return decode.decode(data, SIZE, "stretch", 3, "")

    variants: dict[str, Callable[[Any], object]] = {"typical": typical, "floor": floor, "ours": ours}
    taken = in_turns(variants, files, ROUNDS)
    each = {name: [round(1000 * s / len(files), 3) for s in seconds] for name, seconds in taken.items()}
    whole = [decode.decode(data, None, "stretch", 3, "") for data in files[:16]]
    away = {}
    for size in (112, 128, 160, 224, 256, 320, 384, 512):
        area = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(int) for image in whole]
        fast = [decode.decode(data, size, "stretch", 3, "") for data in files[:16]]
        away[size] = round(float(np.mean([np.abs(a - b).mean() for a, b in zip(area, fast, strict=True)])), 2)
    return {
        "kilobytes": round(sum(map(len, files)) / len(files) / 1000),
        "milliseconds": {name: statistics.median(ms) for name, ms in each.items()},
        "spread": {name: [min(ms), max(ms)] for name, ms in each.items()},
        "faster_than_typical": ratio(taken["typical"], taken["ours"]),
        "times_the_floor": ratio(taken["ours"], taken["floor"]),
        "grey_levels_from_area": away,
    }


def building(root: Path, names: list[str]) -> dict[str, Any]:
    from comp.engine import hardware
    from comp.engine.config import resolve
    from comp.engine.data import cache, image_reader
    from comp.engine.store import paths

    os.environ["COMP_ROOT"] = str(root)
    shutil.copytree(PROJECT / "configs", root / "configs")
    cfg = resolve.load(root, "exp001", [f"data.size={SIZE}", "data.channels=3", "competition.raw=raw"]).config
    reader = image_reader.from_config(cfg)

    def bare(_: object) -> None:
        with ThreadPoolExecutor(hardware.cores()) as pool:
            list(pool.map(reader.image, names, chunksize=8))

    def build(_: object) -> None:
        shutil.rmtree(paths.path("data"), ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            cache.open_images(cfg, names, progress=False)

    taken = in_turns({"bare": bare, "build": build}, [None], ROUNDS // 2)
    return {
        "milliseconds": {
            name: round(1000 * statistics.median(s) / len(names), 3) for name, s in taken.items()
        },
        "times_bare_decode": ratio(taken["build"], taken["bare"]),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = jpegs(root / "raw", FILES, COPIES)
        files = [(root / "raw" / name).read_bytes() for name in names[:FILES]]
        result = {"decode": decoding(files), "build": building(root, names)}
    written(result)


if __name__ == "__main__":
    main()
