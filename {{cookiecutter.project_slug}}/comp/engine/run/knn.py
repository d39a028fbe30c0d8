"""Predictions by neighbours: the embeddings of a fold's own training rows lie beside its weights, and a row is answered by the
nearest of them. What is stored is a score for each class, as from a classifier, so that everything above works the same.

weights.safetensors has its gallery in weights-gallery.safetensors: (rows, size) on the unit sphere, and the class of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.schema import Config
from comp.engine.data.samples import Samples
from comp.engine.store import artifacts
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head, log_softmax

if TYPE_CHECKING:
    import torch

SHARPNESS = 20.0  # of a vote by its cosine: 0.05 nearer counts e times as much
REFERENCE = 0.5  # cosine at which an unknown class stands before its threshold is fitted
CHUNK = 512  # rows at once; memory is CHUNK x gallery
Values = NDArray[np.float32]


def gallery_file(weights: Path) -> Path:
    return weights.with_name(f"{weights.stem}-gallery.safetensors")


def gallery_bytes(cfg: Config, samples: Samples) -> int:
    """Bytes of a fold's gallery, at most."""
    embeds = loss_knobs.metric_learning_loss(cfg, samples.heads)
    return 0 if embeds is None else len(samples.labeled) * (4 * int(embeds.knobs["embedding"]) + 4)


def write(file: Path, embeddings: Values, codes: NDArray[np.int64]) -> None:
    from safetensors.numpy import save

    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(save({"embedding": embeddings, "class": codes.astype(np.int32)}))
    artifacts.add_to_manifest(file, rows=len(codes))


def read(file: Path) -> tuple[Values, NDArray[np.int64]]:
    from safetensors.numpy import load_file

    held = load_file(artifacts.verified(file, "comp train makes it"))
    return held["embedding"], held["class"].astype(np.int64)


def mean_embedding(views: NDArray[np.float32], size: int) -> Values:
    """(views, rows, outputs) -> (rows, size): what all views of a picture say together, on the sphere again."""
    mean = views[:, :, :size].astype(np.float64).mean(axis=0)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return (mean / np.maximum(length, 1e-12)).astype(np.float32)


def class_scores(
    asked: Values, gallery: Values, codes: NDArray[np.int64], head: Head, k: int, device: torch.device
) -> NDArray[np.float64]:
    """(rows, classes), log shares. The k nearest vote for their classes; a class without a vote stands where its own nearest
    picture does, behind them; one that the fold was never taught stands last."""
    import torch  # a kernel is put together without it

    others, of = torch.from_numpy(gallery).to(device), torch.from_numpy(codes).to(device)
    parts = []
    for part in torch.from_numpy(asked).to(device).split(CHUNK):
        cosine = part @ others.T  # (rows, gallery)
        nearest = cosine.new_full((len(part), len(head.outputs)), -1.0)
        nearest = nearest.scatter_reduce(1, of.expand(len(part), -1), cosine, "amax")
        best, at = cosine.topk(min(k, len(of)), dim=1)
        votes = torch.zeros_like(nearest).scatter_add(1, of[at], (SHARPNESS * (best - 1)).exp())
        parts.append(torch.where(votes > 0, votes.log(), SHARPNESS * (nearest - 1)).cpu())
    scores = torch.cat(parts).numpy().astype(np.float64)
    if head.unknown:
        scores[:, head.classes.index(head.unknown)] = SHARPNESS * (REFERENCE - 1)
    return log_softmax(scores)
