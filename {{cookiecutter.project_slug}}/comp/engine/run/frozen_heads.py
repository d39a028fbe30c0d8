"""Heads on a frozen backbone: their arrays are fitted by comp features with scikit-learn, and predict here
without it.

    runs/<run>/frozen/weights.safetensors              the backbone, the same for all folds
    runs/<run>/seed0/fold3/<head>/weights.safetensors  the head of a fold: scale of the features, arrays
    runs/<run>/features.npy                            (samples, features): the training rows of knn heads

A head is stored where and as a checkpoint is, so ensembles, the recheck and kernels treat it as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head, sigmoid, softmax

if TYPE_CHECKING:
    from torch import nn

    from comp.engine.data.samples import Positions
    from comp.engine.run.context import Context

FOLDER, FILE = "frozen", "features.npy"
N_NEIGHBORS = 15
CHUNK = 512  # rows against all training rows at once
MIN_PROBABILITY = 1e-6  # of a class without training rows
Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


def backbone_of(run: str) -> Path:
    return paths.run_folder(run) / FOLDER / "weights.safetensors"


def is_head(weights: Path) -> bool:
    return "fitted" in (artifacts.manifest_entry(weights) or {})


def required_files(weights: Path) -> list[Path]:
    """Further files that the head needs."""
    run = weights.parents[3].name
    entry = artifacts.manifest_entry(weights) or {}
    return [backbone_of(run), *([paths.run_folder(run) / FILE] if entry["fitted"] == "knn" else [])]


def write(weights: Path, kind: str, arrays: Arrays, backbone: str) -> None:
    """`backbone`: sha256 of the weights whose features the head was fitted on."""
    from safetensors.numpy import save

    with artifacts.atomic(weights) as temporary:
        temporary.write_bytes(save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))
    artifacts.add_to_manifest(weights, fitted=kind, backbone=backbone)


def read(weights: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    run = weights.parents[3].name
    entry = artifacts.manifest_entry(weights) or {}
    if entry["backbone"] != (artifacts.manifest_entry(backbone_of(run)) or {}).get("sha256"):
        raise UserError(
            "backbone-differs",
            where=paths.relative(weights),
            what="was fitted on features of another backbone",
            remedy=f"comp features {run} fits it again",
        )
    arrays = load_file(artifacts.verified(weights))
    if "rows" in arrays:
        features = np.load(artifacts.verified(paths.run_folder(run) / FILE))
        arrays["near"] = features[arrays["rows"]]
    return arrays


def standardized(arrays: Arrays, features: NDArray[np.floating]) -> Array:
    return ((features - arrays["middle"]) / arrays["spread"]).astype(np.float64)


def outputs(head: Head, arrays: Arrays, features: NDArray[np.floating]) -> Array:
    """(rows, features) -> (rows, outputs), probabilities or values."""
    x = standardized(arrays, features)
    near = standardized(arrays, arrays["near"]) if "near" in arrays else None

    def predict(prefix: str) -> Array:
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        return _outputs(own, x, near)

    if head.spec.space != "logit":
        return predict(f"{head.name}/") * arrays[f"{head.name}/scale"] + arrays[f"{head.name}/shift"]
    if head.task in ("multilabel", "binary"):
        return np.column_stack(
            [
                _probabilities(predict(f"{head.name}/{k}/"), arrays[f"{head.name}/{k}/present"], 2)[:, 1]
                for k in range(len(head.outputs))
            ]
        )
    return _probabilities(predict(f"{head.name}/"), arrays[f"{head.name}/present"], len(head.outputs))


def _outputs(arrays: Arrays, x: Array, near: Array | None) -> Array:
    if "y" in arrays:
        assert near is not None
        return _nearest_neighbors(near, arrays["y"], x)
    last = sum(name.startswith("weight") for name in arrays)
    for layer in range(last):
        x = x @ arrays[f"weight{layer}"] + arrays[f"bias{layer}"]
        x = np.maximum(x, 0) if layer < last - 1 else x
    if "present" not in arrays:
        return x  # values
    if len(arrays["present"]) == 1:
        return np.ones((len(x), 1))
    return np.column_stack([1 - (p := sigmoid(x)), p]) if x.shape[1] == 1 else softmax(x)


def _probabilities(predicted: Array, present: NDArray[np.int64], classes: int) -> Array:
    """`present`: the classes that have training rows; the others get MIN_PROBABILITY."""
    out = np.full((len(predicted), classes), MIN_PROBABILITY)
    out[:, present] = np.clip(predicted, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.asarray(out / out.sum(1, keepdims=True))


def _nearest_neighbors(near: Array, y: NDArray[Any], x: Array) -> Array:
    """The mean of the nearest by cosine, weighted by 1 / distance; an identical row gets all the weight."""
    count = min(N_NEIGHBORS, len(near))
    near = near / np.maximum(np.linalg.norm(near, axis=1, keepdims=True), 1e-12)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    parts = []
    for start in range(0, len(x), CHUNK):
        distance = np.clip(1 - x[start : start + CHUNK] @ near.T, 0, 2)
        at = np.argpartition(distance, count - 1, axis=1)[:, :count]
        weight = 1 / np.maximum(np.take_along_axis(distance, at, 1), 1e-12)
        parts.append((weight[:, :, None] * y[at]).sum(1) / weight.sum(1, keepdims=True))
    return np.concatenate(parts) if parts else np.empty((0, y.shape[1]))


def headless(cfg: Config, run: str, context: Context) -> nn.Module:
    from comp import models

    file = backbone_of(run)
    return models.load_weights(models.headless(cfg, False, context.loader), file).to(context.device)


def predict_rows(context: Context, weights: Path, rows: Positions) -> tuple[list[Array], dict[int, str]]:
    """For each head (rows, outputs) as they are stored, and for each row with a damaged image the reason."""
    from comp import transforms
    from comp.engine.run import normalize
    from comp.engine.run.forward import forward_rows

    cfg, run = context.cfg, weights.parents[3].name
    module = headless(cfg, run, context)
    preprocess = transforms.Preprocess(normalize.build(cfg, module, context.device))
    features, damaged = forward_rows(
        module, context.loader, rows, cfg.predict.batch_size, preprocess, cfg.train.amp
    )
    arrays = read(weights)
    heads = context.samples.heads
    if not len(rows):
        return [np.empty((0, len(head.outputs))) for head in heads], damaged
    return [
        np.asarray(head.spec.from_probability(outputs(head, arrays, features[0]))) for head in heads
    ], damaged
