"""Decoding and filling the cache against what users have: python benchmarks/decode.py [FOLDER]

1,024 px JPEGs of quality 90, about 210 KB each, with the statistics of photographs: energy falls with frequency as in
nature, colours go together, edges are hard. Variants take turns in one process, one round after the other; a ratio is the
median of the rounds' ratios, so what else runs on the machine hits both sides. Writes decode.json into FOLDER (default: build).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "{{cookiecutter.project_slug}}"
sys.path.insert(0, str(PROJECT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

FILES, COPIES, ROUNDS, SIZE = 64, 6, 15, 256
Picture = np.ndarray[Any, np.dtype[np.uint8]]


def photograph(random: np.random.Generator, side: int) -> Picture:
    """Noise whose energy falls with frequency, a common brightness, ellipses with hard edges."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf

    def clouds(power: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        field = np.fft.irfft2(
            np.fft.rfft2(random.standard_normal((side, side))) / frequency**power, (side, side)
        )
        return field / field.std()

    light = clouds(random.uniform(1.3, 1.5)) * 45 + 115
    picture = np.stack([light + clouds(1.7) * 15 + random.integers(-30, 30) for _ in range(3)], -1)
    for _ in range(12):
        shape = np.zeros((side, side), np.uint8)
        centre, axes = (
            random.integers(0, side, 2).tolist(),
            random.integers(side // 50, side // 4, 2).tolist(),
        )
        cv2.ellipse(shape, centre, axes, random.uniform(0, 180), 0, 360, 1, -1)
        picture[shape > 0] = picture[shape > 0] * 0.6 + random.integers(0, 255, 3) * 0.4
    return np.clip(picture, 0, 255).astype(np.uint8)


def jpegs(folder: Path, count: int, copies: int = 1, side: int = 1024, quality: int = 90) -> list[str]:
    """Copies differ by a comment: other bytes, the same work."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture = photograph(np.random.default_rng(number), side)
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        for copy in range(copies):
            comment = b"\xff\xfe\x00\x04" + copy.to_bytes(2, "big")
            (folder / f"{copy}-{number:04}.jpg").write_bytes(data[:2] + comment + data[2:])
    return sorted(file.name for file in folder.iterdir())


def in_turns(
    variants: dict[str, Callable[[Any], object]], items: Iterable[Any], rounds: int
) -> dict[str, list[float]]:
    """Seconds that each variant took for all items in each round; they take turns at every item."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        spent = dict.fromkeys(variants, 0.0)
        for item in items:
            for name, run in variants.items():
                began = time.perf_counter()
                run(item)
                spent[name] += time.perf_counter() - began
        for name, seconds in spent.items():
            if number:  # the first round warms up
                taken[name].append(seconds)
    return taken


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def decoding(files: list[bytes]) -> dict[str, Any]:
    from comp.prepare import images

    def typical(data: bytes) -> Picture:
        picture = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
        return cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    def floor(data: bytes) -> Picture:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)

    def ours(data: bytes) -> Picture:
        return images.decode(data, SIZE, "stretch", 3, "")

    variants: dict[str, Callable[[Any], object]] = {"typical": typical, "floor": floor, "ours": ours}
    taken = in_turns(variants, files, ROUNDS)
    each = {name: [round(1000 * s / len(files), 3) for s in seconds] for name, seconds in taken.items()}
    whole = [images.decode(data, None, "stretch", 3, "") for data in files[:16]]
    away = {}
    for size in (112, 128, 160, 224, 256, 320, 384, 512):
        area = [
            cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA).astype(int) for picture in whole
        ]
        fast = [images.decode(data, size, "stretch", 3, "") for data in files[:16]]
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
    from comp import config, machine, store
    from comp.prepare import cache, making

    os.environ["COMP_ROOT"] = str(root)
    shutil.copytree(PROJECT / "configs", root / "configs")
    cfg = config.load(root, "exp001", [f"data.size={SIZE}", "data.channels=3", "competition.raw=raw"]).config
    how = making.of(cfg)

    def bare(_: object) -> None:
        with ThreadPoolExecutor(machine.cores()) as pool:
            list(pool.map(how.picture, names, chunksize=8))

    def build(_: object) -> None:
        shutil.rmtree(store.path("data"), ignore_errors=True)
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
    target = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "build")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = jpegs(root / "raw", FILES, COPIES)
        files = [(root / "raw" / name).read_bytes() for name in names[:FILES]]
        result = {"decode": decoding(files), "build": building(root, names)}
    target.mkdir(parents=True, exist_ok=True)
    (target / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
