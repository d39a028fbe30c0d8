"""What snapshots are worth: one training that falls once, against one of the same length that falls four times.

Rule, fixed before the first comparison:
data      digits   the practice digits, 20 % of the training labels replaced by another digit, drawn with seed 0
          drawn    ten kinds of drawings of 32 px (draw() below), labels as they are
          fold 0 of five, at most 800 training pictures; scored on fold 0's own rows with their true labels
training  comp.engine.run.runner.train, test_resnet from scratch, 12 epochs, light recipe, AdamW 5e-3, no EMA, 5 seeds; equal epochs everywhere
rows      single cosine        the run whose rate falls once
          last snapshot        the run whose rate falls four times, its last weights
          last 3 snapshots     mean of the probabilities of that run's last three snapshots
          no cycles, last 3    the same mean for the run whose rate falls once, weights taken at the same steps: the control
said      accuracy, mean ± standard deviation over seeds, and the paired differences
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
from numpy.typing import NDArray
from photographs import PROJECT, written

SEEDS, EPOCHS, CYCLES, LAST, FLIPPED, DRAWN = 5, 12, 4, 3, 0.2, 1000
COMPETITION = """
slug: snapshots
title: Snapshots
raw: data/raw
train: {table: train.csv, image: "{id}.png"}
test: {table: test.csv, image: "{id}.png"}
id: id
target: label
task: multiclass
metric: accuracy
folds: {scheme: stratified, k: 5, seed: 0}
submission: {sample: sample_submission.csv, form: label}
"""
EXPERIMENT = f"""
base: base
data: {{size: 32, channels: 1}}
augment: {{recipe: light}}
model: {{name: test_resnet, pretrained: false}}
optim: {{lr: 5e-3}}
train: {{epochs: {EPOCHS}, max_samples: 800}}
schedule: {{warmup: 0}}
snapshots: {{cycles: {CYCLES}, last: {LAST}}}
machine: {{num_workers: 0, progress: false}}
track: {{mode: none}}
"""


def digits() -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = [
        cv2.resize((each * 255 / 16).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
        for each in found.images
    ]
    return pictures, found.target.astype(np.int64)


def drawings() -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    return [draw(np.random.default_rng(i), i % 10) for i in range(DRAWN)], np.arange(DRAWN) % 10


def draw(random: np.random.Generator, kind: int) -> NDArray[np.uint8]:
    """Circle, ring, square, frame, triangle, cross, two bars lying or standing, a checkerboard, a cone: anywhere, any size, in noise."""
    field = np.full((32, 32), random.uniform(60, 160), np.float32)
    x, y = random.integers(10, 22, 2).tolist()
    r = int(random.integers(5, 10))
    ink = float(field[0, 0] + random.choice([-1, 1]) * random.uniform(25, 60))
    corner, end = (x - r, y - r), (x + r, y + r)
    if kind in (0, 1):
        cv2.circle(field, (x, y), r, ink, -1 if kind == 0 else 2)
    elif kind in (2, 3):
        cv2.rectangle(field, corner, end, ink, -1 if kind == 2 else 2)
    elif kind == 4:
        cv2.fillPoly(field, [np.array([[x, y - r], [x - r, y + r], [x + r, y + r]])], ink)
    elif kind == 5:
        cv2.line(field, corner, end, ink, 2)
        cv2.line(field, (x + r, y - r), (x - r, y + r), ink, 2)
    elif kind in (6, 7):
        for shift in (-r // 2, r // 2):
            a, b = (
                ((x - r, y + shift), (x + r, y + shift))
                if kind == 6
                else ((x + shift, y - r), (x + shift, y + r))
            )
            cv2.line(field, a, b, ink, 2)
    elif kind == 8:
        for i in range(-r, r, 4):
            for j in range(-r, r, 4):
                if (i + j) // 4 % 2:
                    cv2.rectangle(field, (x + i, y + j), (x + i + 3, y + j + 3), ink, -1)
    else:
        cv2.ellipse(field, (x, y), (r, r), random.uniform(0, 360), 0, 60, ink, -1)
    return np.clip(field + random.normal(0, 25, field.shape), 0, 255).astype(np.uint8)


def lay_out(root: Path, pictures: list[NDArray[np.uint8]], labels: NDArray[np.int64]) -> None:
    """A project whose test rows are a few of the same pictures: nobody looks at them here."""
    shutil.copytree(PROJECT / "configs", root / "configs")
    (root / "configs/competition.yaml").write_text(COMPETITION)
    (root / "configs/snapshots.yaml").write_text(EXPERIMENT)
    raw = root / "data/raw"
    raw.mkdir(parents=True)
    for i, image in enumerate(pictures):
        cv2.imwrite(str(raw / f"p{i}.png"), image)
    (raw / "train.csv").write_text(
        "id,label\n" + "".join(f"p{i},{label}\n" for i, label in enumerate(labels))
    )
    for i in range(4):
        cv2.imwrite(str(raw / f"t{i}.png"), pictures[i])
    tests = [f"t{i}" for i in range(4)]
    (raw / "test.csv").write_text("id\n" + "\n".join(tests) + "\n")
    (raw / "sample_submission.csv").write_text("id,label\n" + "".join(f"{t},0\n" for t in tests))


def accuracies(root: Path, truth: NDArray[np.int64]) -> dict[str, list[float]]:
    from comp.engine.bank import bank
    from comp.engine.config import resolve
    from comp.engine.data import folds, make_folds, prepare, samples
    from comp.engine.run import runner
    from comp.engine.store import paths

    os.environ["COMP_ROOT"] = str(root)
    paths.root.cache_clear()
    cfg = resolve.load(root, "snapshots").config
    prepare.prepare(cfg)
    make_folds.make(cfg, samples.load())
    table = samples.load()
    split, head = folds.load(table), table.heads[0]
    number = {f"p{i}": label for i, label in enumerate(truth)}
    found: dict[str, list[float]] = {
        name: [] for name in ("single cosine", "last snapshot", "last 3 snapshots", "no cycles, last 3")
    }
    for seed in range(SEEDS):
        for name, restarts in (("cycles", "true"), ("once", "false")):
            runner.train("snapshots", [f"snapshots.restarts={restarts}"], fold="0", seed=seed, name=name)

        def right(run: str, *inside: str, seed: int = seed) -> float:
            place = paths.fold_folder(run, seed, 0)
            sets = [bank.read(place / each / "oof.arrow", table, split) for each in inside]
            said = np.mean([each.probability(head) for each in sets], 0).argmax(1)
            ids = table.frame["id"].to_numpy()[sets[0].row]
            return float(np.mean(said == [number[i] for i in ids]))

        last = [f"snap{i}" for i in range(CYCLES - LAST + 1, CYCLES + 1)]
        found["single cosine"].append(right("once", ""))
        found["last snapshot"].append(right("cycles", ""))
        found["last 3 snapshots"].append(right("cycles", *last))
        found["no cycles, last 3"].append(right("once", *last))
    return found


def told(found: dict[str, list[float]]) -> dict[str, Any]:
    def spread(values: NDArray[np.float64]) -> str:
        return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"

    scores = {name: np.array(values) for name, values in found.items()}
    last = scores["last 3 snapshots"]
    return {
        **{name: spread(values) for name, values in scores.items()},
        **{
            f"last 3 snapshots minus {name}": spread(last - values)
            for name, values in scores.items()
            if values is not last
        },
    }


def main() -> None:
    result = {}
    for name, (pictures, truth) in {"digits, 20 % flipped": digits(), "drawn": drawings()}.items():
        labels = truth.copy()
        if "flipped" in name:
            random = np.random.default_rng(0)
            flipped = random.random(len(labels)) < FLIPPED
            labels[flipped] = (labels[flipped] + random.integers(1, 10, flipped.sum())) % 10
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder), pictures, labels)
            result[name] = told(accuracies(Path(folder), truth))
    written(result)


if __name__ == "__main__":
    main()
