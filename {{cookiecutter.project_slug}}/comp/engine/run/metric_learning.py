"""Retrieval: a network that puts pictures of one class close together, and the losses that teach it.

What it puts out for a picture is its embedding, on the unit sphere, and beside it (arcface) the cosine to the nearest centre
of each class. The centres only teach: predictions come from neighbours, see comp/engine/run/knn.py.
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
from comp.engine.errors import Refused
from comp.engine.tasks.loss_knobs import metric_learning_loss

AT_ONCE = 1024  # rows against all: validation is one batch, and its square may not fit
TINY = 1e-7  # the slope of a root ends nowhere at 0


class EmbeddingLayer(nn.Module):
    """The last layer: (batch, features) -> (batch, size + classes)"""

    def __init__(self, features: int, size: int, classes: int, per_class: int):
        super().__init__()
        self.neck = nn.Linear(features, size)
        self.per_class = per_class
        self.centres = None
        if classes:
            self.centres = nn.Parameter(nn.init.xavier_normal_(torch.empty(classes * per_class, size)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(
            x.device.type, enabled=False
        ):  # angles of half precision are too coarse for a margin
            z = F.normalize(self.neck(x.float()), dim=1)
            if self.centres is None:
                return z
            cosine = F.linear(z, F.normalize(self.centres, dim=1))  # (batch, classes x per_class)
            return torch.cat([z, cosine.view(len(z), -1, self.per_class).amax(2)], 1)


class GeM(nn.Module):
    """A backbone that ends in a map, and the mean of its p-th powers: from mean (1) to max (large), p learned."""

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
    """(batch, features, rows, columns), of networks that keep channels last too."""
    if x.ndim != 4 or features not in (x.shape[1], x.shape[3]):
        raise Refused(f"model.global_pool: gem wants a map of features, and {name} ends in none")
    return x if x.shape[1] == features else x.permute(0, 3, 1, 2)


def drop_unknown_class(cfg: Config, samples: Samples, rows: Positions) -> Positions:
    """Rows of the unknown class look like nothing in particular: where embeddings are taught they neither teach nor answer."""
    if metric_learning_loss(cfg, samples.heads) is None or not samples.heads[0].unknown:
        return rows
    head = samples.heads[0]
    return rows[samples.targets(head)[rows, 0] != head.classes.index(head.unknown)]


# --- losses: (batch, size + classes) and class codes, or shares for each class, -> (batch,) -------------------------------


def arcface(output: Tensor, target: Tensor, margin: Tensor, scale: float, embedding: int) -> Tensor:
    """The angle to one's own class has to be smaller by a margin than to any other. Shared labels share the margin."""
    cosine = output[:, embedding:]
    truth = target if target.ndim == 2 else F.one_hot(target, cosine.shape[1]).to(output.dtype)
    m = margin.to(output.device) * truth  # (batch, classes), 0 where not the class
    sine = (1 - cosine**2).clamp(min=TINY).sqrt()
    # Beyond pi - m the cosine would rise again; from there on it falls in a straight line.
    pushed = torch.where(cosine > -m.cos(), cosine * m.cos() - sine * m.sin(), cosine - m * m.sin())
    return F.cross_entropy(scale * pushed, truth, reduction="none")


def class_margins(count: NDArray[np.float64], margin: float, margin_rare: float | None) -> Tensor:
    """Dynamic margin: `margin` for the most frequent class, `margin_rare` for the rarest, by the fourth root in between."""
    there = count > 0
    root = np.where(there, count, count[there].max()) ** -0.25
    low, high = root[there].min(), root[there].max()
    share = (root - low) / (high - low) if high > low else np.zeros(len(count))
    rare = margin if margin_rare is None else margin_rare
    return torch.tensor(margin + (rare - margin) * share, dtype=torch.float32)


def contrastive(output: Tensor, target: Tensor, margin: float, embedding: int) -> Tensor:
    """Of all pairs with the others of the batch: one class close, two classes at least `margin` apart."""

    def of(squared: Tensor, same: Tensor, other: Tensor) -> Tensor:
        apart = (margin - (squared + TINY).sqrt()).clamp(min=0) ** 2
        return (same * squared + other * apart).sum(1) / max(1, len(output) - 1)

    return _against_all(output, target, embedding, of)


def triplet(output: Tensor, target: Tensor, margin: float, embedding: int) -> Tensor:
    """The farthest of one's own class in the batch has to be nearer, by `margin`, than the nearest of another."""

    def of(squared: Tensor, same: Tensor, other: Tensor) -> Tensor:
        distance = (squared + TINY).sqrt()
        farthest = torch.where(same, distance, -torch.inf).amax(1)
        nearest = torch.where(other, distance, torch.inf).amin(1)
        whole = same.any(1) & other.any(1)  # who is alone in the batch says nothing
        return torch.where(whole, farthest - nearest + margin, 0.0).clamp(min=0)

    return _against_all(output, target, embedding, of)


def _against_all(
    output: Tensor, target: Tensor, embedding: int, of: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`of` takes, of some rows against the whole batch, squared distances, who shares one's class, who does not."""
    if target.ndim == 2:
        raise Refused("loss.name: contrastive and triplet want one class a picture, and mixed ones have two")
    z, place = output[:, :embedding], torch.arange(len(output), device=output.device)
    parts = []
    for mine in place.split(AT_ONCE):
        same = target[mine, None] == target
        squared = (2 - 2 * z[mine] @ z.T).clamp(min=0)
        parts.append(of(squared, same & (mine[:, None] != place), ~same))
    return torch.cat(parts)
