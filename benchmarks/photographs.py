"""What the picture benchmarks share: drawn photographs, variants that take turns, a project around a folder of JPEGs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "{{cookiecutter.project_slug}}"
sys.path.insert(0, str(PROJECT))
os.environ["PYTHONPATH"] = str(PROJECT)

import cv2  # noqa: E402
import numpy as np  # noqa: E402

Picture = np.ndarray[Any, np.dtype[np.uint8]]
Taken = dict[str, list[float]]


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
    image = np.stack([light + clouds(1.7) * 15 + random.integers(-30, 30) for _ in range(3)], -1)
    for _ in range(12):
        shape = np.zeros((side, side), np.uint8)
        centre, axes = (
            random.integers(0, side, 2).tolist(),
            random.integers(side // 50, side // 4, 2).tolist(),
        )
        cv2.ellipse(shape, centre, axes, random.uniform(0, 180), 0, 360, 1, -1)
        image[shape > 0] = image[shape > 0] * 0.6 + random.integers(0, 255, 3) * 0.4
    return np.clip(image, 0, 255).astype(np.uint8)


def jpegs(folder: Path, count: int, copies: int = 1, side: int = 1024, quality: int = 90) -> list[str]:
    """Copies differ by a comment: other bytes, the same work."""
    folder.mkdir(parents=True)
    for number in range(count):
        image = photograph(np.random.default_rng(number), side)
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        for copy in range(copies):
            comment = b"\xff\xfe\x00\x04" + copy.to_bytes(2, "big")
            (folder / f"{copy}-{number:04}.jpg").write_bytes(data[:2] + comment + data[2:])
    return sorted(file.name for file in folder.iterdir())


def in_turns(variants: dict[str, Callable[[Any], object]], items: Iterable[Any], rounds: int) -> Taken:
    """Seconds that each variant took for all items in each round; they take turns at every item."""
    taken: Taken = {name: [] for name in variants}
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


def ratio(above: list[float], below: list[float], times: float = 1.0) -> dict[str, float]:
    """Median and spread over the rounds."""
    return spread([times * a / b for a, b in zip(above, below, strict=True)], 3)


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    of = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in of.items()}


def per_second(taken: Taken, work: dict[str, int]) -> dict[str, dict[str, float]]:
    """What was done a second."""
    return {name: spread([work[name] / s for s in seconds]) for name, seconds in taken.items()}


def project(root: Path, names: list[str], classes: int = 10) -> Any:
    """A project whose raw folder holds these pictures; its samples table."""
    import pandas as pd

    os.environ["COMP_ROOT"] = str(root)
    from comp.engine.data import samples
    from comp.engine.store import paths
    from comp.engine.tasks import kinds

    paths.root.cache_clear()
    shutil.copytree(PROJECT / "configs", root / "configs")
    labels = tuple(map(str, range(classes)))
    ids = [f"{i:07d}" for i in range(len(names))]
    frame = pd.DataFrame(
        {
            "id": ids,
            "images": [[name] for name in names],
            "weight": 1.0,
            "source": "train",
            "row": ids,
            "target.label": np.arange(len(names)) % float(classes),
        }
    )
    samples.save(frame, (kinds.Head("label", "multiclass", labels, ("target.label",), labels),))
    return samples.load()


def blocks(blocks: int, steps: int) -> tuple[int, int]:
    """--blocks and --steps: how long a comparison of steps is. make bench takes short ones, or it would need half an hour."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=blocks)
    parser.add_argument("--steps", type=int, default=steps, help="of a block")
    said = parser.parse_args()
    return said.blocks, said.steps


def written(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=1))
