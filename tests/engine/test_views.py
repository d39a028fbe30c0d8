"""Recipes as TTA views: the draw depends on the image alone, and views are averaged for every task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config

from comp import competition, models, predict, transforms
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import cv2_ops, loading, views
from comp.engine.store import paths
from comp.engine.tasks.kinds import Head


def images(count: int = 5, side: int = 24) -> torch.Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (count, 3, side, side), dtype=np.uint8))


@pytest.mark.parametrize("name", ["light", "medium", "fast", "resident"])
def test_a_draw_depends_on_the_image_alone(name: str) -> None:
    x = images()
    first, second = views.views([name, f"{name}2"])
    whole = first(x)
    assert whole.shape == x.shape and whole.dtype == torch.uint8
    assert not torch.equal(whole, x) and not torch.equal(whole, second(x))
    again = views.views([name])[0]
    alone = torch.cat([again(part) for part in x.flip(0).split(2)]).flip(0)
    assert (
        alone.int() - whole.int()
    ).abs().max() <= 1  # on the device the size of a batch may round otherwise


@pytest.mark.parametrize("name", ["ligth2", "recipe", "none"])
def test_an_unknown_view_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        views.views([name])
    error = caught.value
    assert (error.code, error.key) == ("view-unknown", "predict.tta") and repr(name) in error.what
    assert name != "ligth2" or "the nearest is light" in error.remedy


def test_a_view_named_twice_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        views.views(["light", "light"])
    assert (caught.value.code, caught.value.key) == ("view-twice", "predict.tta")


def test_a_custom_recipe_is_a_view(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = lambda size: transforms.Recipe([cv2_ops.random_rotate90()])  # noqa: E731
    monkeypatch.setattr(competition, "recipe", turns, raising=False)
    x = images(1)
    turned = {views.views([f"recipe{n}"])[0](x).numpy().tobytes() for n in range(1, 20)}
    assert turned == {torch.rot90(x, n, (2, 3)).contiguous().numpy().tobytes() for n in range(4)}


HEADS = {
    "regression": Head("ink", "regression", ("ink",), ("target.ink",)),
    "multilabel": Head("labels", "multilabel", ("odd", "large"), ("target.odd", "target.large"), ("odd", "large")),
    "multiclass": Head("label", "multiclass", tuple("0123456789"), ("target.label",), tuple("0123456789")),
}  # fmt: skip


@pytest.mark.parametrize("task", HEADS)
def test_views_are_averaged_for_every_task(project: Path, task: str) -> None:
    rows, split = samples.load(), folds.load(samples.load())
    digit = rows.frame["target.label"].to_numpy()
    more = {"target.ink": digit * 1.5, "target.odd": digit % 2, "target.large": (digit > 4).astype(float)}
    samples.save(rows.frame.assign(**more), (HEADS[task],))
    folds.save(split.frame, split.meta | {"samples": samples.load().hash})
    declared = project / "configs" / "competition.yaml"
    text = declared.read_text().replace("task: multiclass", f"task: {task}")
    metric = {"regression": "rmse", "multilabel": "mean_column_auc"}.get(task, "accuracy")
    declared.write_text(text.replace("metric: accuracy", f"metric: {metric}"))
    torch.manual_seed(0)
    views = ["identity", "hflip", "crop_top_left", "light2"]
    predicted = {}
    for names in [views, *([name] for name in views)]:
        cfg = config(f"predict.tta=[{','.join(names)}]", "machine.num_workers=0", "machine.progress=false")
        context = loading.load_context(cfg)
        weights = paths.path("weights.safetensors")
        if not weights.exists():
            models.save_weights(models.build(cfg, context.samples.heads, False, context.loader), weights)
        head = context.samples.heads[0]
        stored, _ = predict.predict(context, weights, context.samples.positions("test")[:7])
        predicted[",".join(names)] = head.spec.to_probability(stored[head.name].astype(np.float64))
    mean = np.mean([predicted[name] for name in views], axis=0)
    assert predicted[",".join(views)] == pytest.approx(mean, abs=1e-5)
    assert not np.allclose(predicted["identity"], predicted["light2"], atol=1e-5)
