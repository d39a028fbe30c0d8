"""Embeddings for retrieval: the last layer, pooling, and the losses (arcface, contrastive, triplet).

The network gives each image an embedding of length 1, and with arcface also the cosine to the nearest center
of each class. Centers are used in training only: predictions come from nearest neighbors, see
comp/engine/run/knn.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.tasks.loss_knobs import metric_learning_loss

AT_ONCE = 1024  # rows per block of the distance matrix: validation is one batch, whose square may not fit
TINY = 1e-7  # the gradient of a square root is infinite at 0


class EmbeddingLayer(nn.Module):
    """The last layer: (batch, features) -> (batch, size + classes). With classes = 0, the embedding alone."""

    def __init__(self, features: int, size: int, classes: int, sub_centers: int):
        super().__init__()
        self.neck = nn.Linear(features, size)
        self.sub_centers = sub_centers
        self.centers = None
        if classes:
            centers = torch.empty(classes * sub_centers, size)
            self.centers = nn.Parameter(nn.init.xavier_normal_(centers))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(
            x.device.type, enabled=False
        ):  # a margin needs angles more exact than half precision
            z = F.normalize(self.neck(x.float()), dim=1)
            if self.centers is None:
                return z
            cosine = F.linear(z, F.normalize(self.centers, dim=1))  # (batch, classes x sub_centers)
            return torch.cat([z, cosine.view(len(z), -1, self.sub_centers).amax(2)], 1)


class GeM(nn.Module):
    """A backbone without pooling, and generalized-mean pooling with learned p: from mean (1) towards max
    (large)."""

    def __init__(self, backbone: nn.Module, features: int, name: str):
        super().__init__()
        self.backbone, self.features, self.name = backbone, features, name
        self.p = nn.Parameter(torch.tensor([3.0]))
        self.pretrained_cfg = getattr(backbone, "pretrained_cfg", {})

    def forward(self, images: Tensor) -> Tensor:
        x = feature_map(self.backbone(images), self.features, self.name)
        with torch.autocast(x.device.type, enabled=False):
            powers = x.float().clamp(min=1e-6).pow(self.p)
            return powers.mean((2, 3)).pow(1 / self.p)


def feature_map(x: Tensor, features: int, name: str) -> Tensor:
    """(batch, features, height, width), also of networks that keep channels last."""
    if x.ndim != 4 or features not in (x.shape[1], x.shape[3]):
        raise UserError(
            "model-incompatible",
            key="model.global_pool",
            what=f"gem pools a feature map, and {name} has none before its last layer",
            remedy="set it to default",
        )
    return x if x.shape[1] == features else x.permute(0, 3, 1, 2)


def drop_unknown_class(cfg: Config, samples: Samples, rows: Positions) -> Positions:
    """Rows without those of the unknown class, where embeddings are trained: images of it have nothing in
    common."""
    if metric_learning_loss(cfg, samples.heads) is None or not samples.heads[0].unknown:
        return rows
    head = samples.heads[0]
    return rows[samples.targets(head)[rows, 0] != head.classes.index(head.unknown)]


# --- losses: (batch, size + classes), and class codes or a share per class, -> (batch,) --------------


def arcface(output: Tensor, target: Tensor, margin: Tensor, scale: float, embedding: int) -> Tensor:
    """Cross-entropy of cosines, after the angle to the true class was enlarged by a margin. Soft labels share
    the margin."""
    cosine = output[:, embedding:]
    truth = target if target.ndim == 2 else F.one_hot(target, cosine.shape[1]).to(output.dtype)
    m = margin.to(output.device) * truth  # (batch, classes), 0 for other classes
    sine = (1 - cosine**2).clamp(min=TINY).sqrt()
    # Beyond pi - m the cosine of the enlarged angle would rise again; from there on it is a falling line.
    logits = torch.where(cosine > -m.cos(), cosine * m.cos() - sine * m.sin(), cosine - m * m.sin())
    return F.cross_entropy(scale * logits, truth, reduction="none")


def class_margins(count: NDArray[np.float64], margin: float, margin_rare: float | None) -> Tensor:
    """Dynamic margin: `margin` for the most frequent class, `margin_rare` for the rarest, by count^-1/4 in
    between."""
    present = count > 0
    root = np.where(present, count, count[present].max()) ** -0.25
    low, high = root[present].min(), root[present].max()
    share = (root - low) / (high - low) if high > low else np.zeros(len(count))
    rare = margin if margin_rare is None else margin_rare
    return torch.tensor(margin + (rare - margin) * share, dtype=torch.float32)


def contrastive(output: Tensor, target: Tensor, margin: float, embedding: int) -> Tensor:
    """Over all pairs with the rest of the batch: one class close together, two classes at least `margin`
    apart."""

    def loss(squared: Tensor, same: Tensor, other: Tensor) -> Tensor:
        too_close = (margin - (squared + TINY).sqrt()).clamp(min=0) ** 2
        return (same * squared + other * too_close).sum(1) / max(1, len(output) - 1)

    return _pairwise(output, target, embedding, loss)


def triplet(output: Tensor, target: Tensor, margin: float, embedding: int) -> Tensor:
    """Batch-hard triplets: the farthest sample of the same class is nearer, by `margin`, than the nearest of
    another."""

    def loss(squared: Tensor, same: Tensor, other: Tensor) -> Tensor:
        distance = (squared + TINY).sqrt()
        farthest = torch.where(same, distance, -torch.inf).amax(1)
        nearest = torch.where(other, distance, torch.inf).amin(1)
        has_both = same.any(1) & other.any(1)  # otherwise there is no triplet, and the loss is 0
        return torch.where(has_both, farthest - nearest + margin, 0.0).clamp(min=0)

    return _pairwise(output, target, embedding, loss)


def _pairwise(
    output: Tensor, target: Tensor, embedding: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`loss` gets some rows against the whole batch: squared distances, masks of the same class and of other
    classes."""
    if target.ndim == 2:
        raise UserError(
            "loss-incompatible",
            key="loss.name",
            what="contrastive and triplet take one class per image, and mixed images have two",
        )
    z, place = output[:, :embedding], torch.arange(len(output), device=output.device)
    blocks = []
    for rows in place.split(AT_ONCE):
        same = target[rows, None] == target
        squared = (2 - 2 * z[rows] @ z.T).clamp(min=0)
        blocks.append(loss(squared, same & (rows[:, None] != place), ~same))
    return torch.cat(blocks)
