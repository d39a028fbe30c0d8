"""Predictions by nearest neighbors: a row gets the classes of the nearest training rows of its fold, by the
model's embeddings. What is stored is a score for each class, as from a classifier, so ensembles and
submissions need not distinguish them.

weights.safetensors has its gallery in weights-gallery.safetensors: normalized embeddings (rows, size), and
the class of each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.store import artifacts
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head, log_softmax

if TYPE_CHECKING:
    import torch

    from comp.engine.run.context import Context

SCALE = 20.0  # inverse temperature of a vote: a cosine higher by 0.05 weighs e times as much
UNKNOWN_COSINE = 0.5  # of the unknown class, before its threshold is fitted
CHUNK = 512  # rows at once; memory is CHUNK x gallery
Values = NDArray[np.float32]
Forward = Callable[..., tuple[Values, dict[int, str]]]  # (context, weights, rows, description)


def predicts(context: Context) -> bool:
    """Whether the loss learns embeddings (ArcFace, triplet, ...), so that predictions come from neighbors."""
    return loss_knobs.metric_learning_loss(context.cfg, context.samples.heads) is not None


def build_gallery(context: Context, weights: Path, train_rows: Positions, forward: Forward) -> None:
    """The embeddings of the fold's training rows by the fold's model, unless they are there."""
    # Both import torch, which comp kernel does not need.
    from comp.engine.data import class_balance
    from comp.engine.run import metric_learning

    file, cfg = gallery_file(weights), context.cfg
    if artifacts.manifest_entry(file):
        return
    (head,) = context.samples.heads
    rows = metric_learning.drop_unknown_class(cfg, context.samples, train_rows[: cfg.train.max_samples])
    outputs, damaged = forward(context, weights, rows, "gallery")
    intact = ~np.isin(rows, list(damaged))
    embeddings = mean_embedding(outputs[:, intact], loss_knobs.head_losses(cfg, [head])[0].knobs["embedding"])
    write(file, embeddings, class_balance.class_codes(head, context.samples, rows[intact]))


def predict(context: Context, weights: Path, outputs: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """(views, rows, model outputs) -> of the one head (rows, classes)."""
    (head,) = context.samples.heads
    loss = loss_knobs.metric_learning_loss(context.cfg, context.samples.heads)
    assert loss is not None
    queries = mean_embedding(outputs, loss.knobs["embedding"])
    k = context.cfg.predict.n_neighbors or loss_knobs.N_NEIGHBORS
    return [class_scores(queries, *read(gallery_file(weights)), head, k, context.device)]


def gallery_file(weights: Path) -> Path:
    return weights.with_name(f"{weights.stem}-gallery.safetensors")


def gallery_bytes(cfg: Config, samples: Samples) -> int:
    """At most, of one fold."""
    embeds = loss_knobs.metric_learning_loss(cfg, samples.heads)
    return 0 if embeds is None else len(samples.labeled) * (4 * int(embeds.knobs["embedding"]) + 4)


def write(file: Path, embeddings: Values, codes: NDArray[np.int64]) -> None:
    from safetensors.numpy import save

    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(save({"embedding": embeddings, "class": codes.astype(np.int32)}))
    artifacts.add_to_manifest(file, rows=len(codes))


def read(file: Path) -> tuple[Values, NDArray[np.int64]]:
    from safetensors.numpy import load_file

    tensors = load_file(artifacts.verified(file, "comp train makes it"))
    return tensors["embedding"], tensors["class"].astype(np.int64)


def mean_embedding(views: NDArray[np.float32], size: int) -> Values:
    """(views, rows, outputs) -> (rows, size): the mean over the views, normalized again."""
    mean = views[:, :, :size].astype(np.float64).mean(axis=0)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return (mean / np.maximum(length, 1e-12)).astype(np.float32)


def class_scores(
    queries: Values, gallery: Values, codes: NDArray[np.int64], head: Head, k: int, device: torch.device
) -> NDArray[np.float64]:
    """(rows, classes), log probabilities. The k nearest vote for their classes. A class without a vote is
    ranked after those by its own nearest row; a class without training rows comes last."""
    import torch  # comp kernel imports this module without it

    embeddings, classes = torch.from_numpy(gallery).to(device), torch.from_numpy(codes).to(device)
    parts = []
    for part in torch.from_numpy(queries).to(device).split(CHUNK):
        cosine = part @ embeddings.T  # (rows, gallery)
        nearest = cosine.new_full((len(part), len(head.outputs)), -1.0)
        nearest = nearest.scatter_reduce(1, classes.expand(len(part), -1), cosine, "amax")
        best, at = cosine.topk(min(k, len(classes)), dim=1)
        votes = torch.zeros_like(nearest).scatter_add(1, classes[at], (SCALE * (best - 1)).exp())
        parts.append(torch.where(votes > 0, votes.log(), SCALE * (nearest - 1)).cpu())
    scores = torch.cat(parts).numpy().astype(np.float64)
    if head.unknown:
        scores[:, head.classes.index(head.unknown)] = SCALE * (UNKNOWN_COSINE - 1)
    return log_softmax(scores)
