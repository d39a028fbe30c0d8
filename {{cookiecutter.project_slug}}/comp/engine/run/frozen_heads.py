"""Heads on a frozen backbone, as numbers: what comp features fitted with scikit-learn, without scikit-learn.

    runs/<run>/frozen/weights.safetensors                   the backbone, the same for all folds
    runs/<run>/seed0/fold3/<head>/weights.safetensors       the head of a fold: how features are scaled, and its own numbers
    runs/<run>/features.npy                                 (samples, features): of knn the training rows are looked up there

A head has the place and the shape of a checkpoint, so blends, the recheck and kernels take it for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head, sigmoid, softmax

if TYPE_CHECKING:
    from torch import nn

    from comp.engine.data.samples import Positions
    from comp.engine.run.context import Context

FOLDER, FILE = "frozen", "features.npy"
NEIGHBOURS = 15
CHUNK = 512  # rows against all training rows at once
FLOOR = 1e-6  # of a class that a training part lacks
Array = NDArray[np.float64]
Numbers = Mapping[str, NDArray[Any]]


def backbone_of(run: str) -> Path:
    return paths.run_folder(run) / FOLDER / "weights.safetensors"


def is_head(weights: Path) -> bool:
    return "fitted" in (artifacts.manifest_entry(weights) or {})


def required_files(weights: Path) -> list[Path]:
    """What a head needs beside its own file."""
    run = weights.parents[3].name
    entry = artifacts.manifest_entry(weights) or {}
    return [backbone_of(run), *([paths.run_folder(run) / FILE] if entry["fitted"] == "knn" else [])]


def write(weights: Path, kind: str, numbers: Numbers, backbone: str) -> None:
    """`backbone`: hash of the weights whose features it was fitted on."""
    from safetensors.numpy import save

    with artifacts.atomic(weights) as temporary:
        temporary.write_bytes(save({name: np.ascontiguousarray(value) for name, value in numbers.items()}))
    artifacts.add_to_manifest(weights, fitted=kind, backbone=backbone)


def read(weights: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    run = weights.parents[3].name
    entry = artifacts.manifest_entry(weights) or {}
    if entry["backbone"] != (artifacts.manifest_entry(backbone_of(run)) or {}).get("sha256"):
        raise Refused(
            f"{paths.relative(weights)}: was fitted on features of another backbone; comp features {run} fits it anew"
        )
    numbers = load_file(artifacts.verified(weights))
    if "rows" in numbers:
        seen = np.load(artifacts.verified(paths.run_folder(run) / FILE))
        numbers["near"] = seen[numbers["rows"]]
    return numbers


def standardized(numbers: Numbers, seen: NDArray[np.floating]) -> Array:
    return ((seen - numbers["middle"]) / numbers["spread"]).astype(np.float64)


def outputs(head: Head, numbers: Numbers, seen: NDArray[np.floating]) -> Array:
    """(rows, features) -> (rows, outputs): what the task's `store` takes."""
    x = standardized(numbers, seen)
    near = standardized(numbers, numbers["near"]) if "near" in numbers else None

    def of(prefix: str) -> Array:
        mine = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
        return _outputs(mine, x, near)

    if head.spec.space != "logit":
        return of(f"{head.name}/") * numbers[f"{head.name}/scale"] + numbers[f"{head.name}/shift"]
    if head.task in ("multilabel", "binary"):
        return np.column_stack([
            _probabilities(of(f"{head.name}/{k}/"), numbers[f"{head.name}/{k}/present"], 2)[:, 1]
            for k in range(len(head.outputs))
        ])  # fmt: skip
    return _probabilities(of(f"{head.name}/"), numbers[f"{head.name}/present"], len(head.outputs))


def _outputs(numbers: Numbers, x: Array, near: Array | None) -> Array:
    if "y" in numbers:
        assert near is not None
        return _neighbours(near, numbers["y"], x)
    last = sum(name.startswith("weight") for name in numbers)
    for layer in range(last):
        x = x @ numbers[f"weight{layer}"] + numbers[f"bias{layer}"]
        x = np.maximum(x, 0) if layer < last - 1 else x
    if "present" not in numbers:
        return x  # values
    if len(numbers["present"]) == 1:
        return np.ones((len(x), 1))
    return np.column_stack([1 - (p := sigmoid(x)), p]) if x.shape[1] == 1 else softmax(x)


def _probabilities(said: Array, present: NDArray[np.int64], classes: int) -> Array:
    """Classes that a training part lacks get next to nothing."""
    out = np.full((len(said), classes), FLOOR)
    out[:, present] = np.clip(said, FLOOR, 1 - FLOOR)
    return np.asarray(out / out.sum(1, keepdims=True))


def _neighbours(near: Array, y: NDArray[Any], x: Array) -> Array:
    """The mean of the nearest by cosine, each weighing 1 / distance; one that is the same picture is the answer."""
    count = min(NEIGHBOURS, len(near))
    there = near / np.maximum(np.linalg.norm(near, axis=1, keepdims=True), 1e-12)
    here = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    parts = []
    for start in range(0, len(here), CHUNK):
        distance = np.clip(1 - here[start : start + CHUNK] @ there.T, 0, 2)
        at = np.argpartition(distance, count - 1, axis=1)[:, :count]
        found = np.maximum(np.take_along_axis(distance, at, 1), 1e-12)
        weight = 1 / found
        parts.append((weight[:, :, None] * y[at]).sum(1) / weight.sum(1, keepdims=True))
    return np.concatenate(parts) if parts else np.empty((0, y.shape[1]))


def headless(cfg: Config, run: str, context: Context) -> nn.Module:
    from comp import models

    file = backbone_of(run)
    return models.load_weights(models.headless(cfg, False, context.loader), file).to(context.device)


def predict_rows(context: Context, weights: Path, rows: Positions) -> tuple[list[Array], dict[int, str]]:
    """Of each head (rows, outputs) as they are stored, and for each row whose picture is damaged the reason."""
    from comp import transforms
    from comp.engine.run import normalize
    from comp.engine.run.evaluate import forward_rows

    cfg, run = context.cfg, weights.parents[3].name
    module = headless(cfg, run, context)
    look = transforms.Preprocess(normalize.build(cfg, module, context.device))
    seen, damaged = forward_rows(module, context.loader, rows, cfg.predict.batch_size, look, cfg.train.amp)
    numbers = read(weights)
    heads = context.samples.heads
    if not len(rows):
        return [np.empty((0, len(head.outputs))) for head in heads], damaged
    return [
        np.asarray(head.spec.from_probability(outputs(head, numbers, seen[0]))) for head in heads
    ], damaged
