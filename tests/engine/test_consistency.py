"""Consistency between views of an image, and the stem for small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import banked
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import config
from timm.loss import JsdCrossEntropy
from torch.nn import functional as F

from comp import data
from comp.engine.data import class_balance
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.run import consistency, small_stem

VIEWS = ["augment.jsd_views=3", "train.batch_size=30"]


def test_the_divergence_equals_timms(empty: Path) -> None:
    head = banked.HEADS["multiclass"]
    torch.manual_seed(0)
    output, target = torch.randn(30, 3), torch.randint(3, (10,))
    each = consistency.consistency_loss(config(*VIEWS, experiment="base"), (head,))(output)
    by_view = output.unflatten(0, (10, 3)).transpose(0, 1).flatten(0, 1)  # timm has all first views first
    theirs = JsdCrossEntropy(3, consistency.WEIGHT, smoothing=0.0)(
        by_view, target.repeat(3)
    ) - F.cross_entropy(by_view[:10], target)
    assert each.shape == (30,) and each.mean() == pytest.approx(theirs.item(), rel=1e-4)
    same = output[::3].repeat_interleave(3, 0)
    assert consistency.consistency_loss(config(*VIEWS, experiment="base"), (head,))(same).abs().max() < 1e-5
    assert consistency.consistency_loss(config(experiment="base"), (head,))(output) == 0


def test_the_divergence_of_multilabel_is_per_label(empty: Path) -> None:
    head, output = banked.HEADS["multilabel"], torch.randn(4, 3)
    each = consistency.consistency_loss(config("augment.jsd_views=2", experiment="base"), (head,))(output)
    p = output.sigmoid().unflatten(0, (2, 2))
    both = torch.stack([p, 1 - p], -1)
    middle = both.mean(1, keepdim=True)
    wanted = 12 * (both * (both / middle).log()).sum(-1).mean((1, 2))
    assert torch.allclose(each, wanted.repeat_interleave(2), atol=1e-5)


def test_views_are_neighbours_with_their_own_seeds(empty: Path) -> None:
    cfg, rows = config(*VIEWS, experiment="base"), np.arange(50)
    table = Samples(pd.DataFrame(), (), "x")
    batches = list(data.training_batches(rows, 30, 0, 0, 0, class_balance.make_sampler(cfg, table, rows)))
    drawn = np.array([[d.sample for d in batch] for batch in batches]).reshape(-1, 3)
    assert len(batches) == 5 and (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0])) == 50
    assert len({d.seed for batch in batches for d in batch}) == 150


def test_incompatible_knobs_are_errors(empty: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch_size: 32 .*augment.jsd_views: 3.*a multiple of 3"):
        config("augment.jsd_views=3", experiment="base")
    with pytest.raises(UserError, match=r"augment.jsd_views: 2.*mixup"):
        config("augment.jsd_views=2", "augment.mixup=0.2", experiment="base")
    with pytest.raises(UserError, match=r"augment.jsd_views: target label is a value"):
        consistency.validate(config("augment.jsd_views=2", experiment="base"), (banked.HEADS["regression"],))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("test_resnet", 8),
        ("resnet10t", 8),
        ("test_efficientnet", 4),
        ("test_convnext", 8),
        ("regnetx_002", 4),
    ],
)
def test_a_small_stem_keeps_the_resolution(name: str, side: int) -> None:
    image = torch.randn(1, 3, 64, 64)
    module: Any = timm.create_model(name, num_classes=0).eval()
    original = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        before = module.forward_features(image).shape[2]
        after = small_stem.small(module, name).forward_features(image).shape[2]
    assert (before, after) == (2, side)
    new = [k for k, v in module.state_dict().items() if not torch.equal(v, original[k])]
    assert new == (["stem.0.weight"] if name == "test_convnext" else [])


def test_a_large_kernel_is_initialized_anew_and_networks_without_stem_are_errors() -> None:
    module: Any = small_stem.small(timm.create_model("resnet18", num_classes=0), "resnet18")
    assert module.conv1.weight.shape == (64, 3, 3, 3) and isinstance(module.maxpool, torch.nn.Identity)
    with pytest.raises(UserError, match=r"model.stem: small: test_vit has no stem"):
        small_stem.small(timm.create_model("test_vit"), "test_vit")
