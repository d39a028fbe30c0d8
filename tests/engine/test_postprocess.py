"""Postprocessing of a blend (calibration, thresholds, label shift, cut points) is used if it improves the
nested score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from banked import lay_out, load, made, member, recipe_of, three
from sklearn.metrics import log_loss

from comp import metrics
from comp.engine.bank import bank
from comp.engine.ensemble import calibration, fit, postprocess_selection
from comp.engine.ensemble.blend_config import Blend
from comp.engine.ensemble.context import Context
from comp.engine.tasks.kinds import Head

LABELS = Head("t", "multilabel", tuple("abc"), tuple("abc"))
BINARY = Head("t", "binary", ("t",), ("t",), ("0", "1"))


def test_calibration_is_used_only_where_it_improves(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    member(project, "exp001", noise=2.0)
    folder = bank.folder("exp001")
    for kind in bank.KINDS:  # logits five times too large
        stored = load(project, "exp001", kind)
        loud = {"label": stored.heads["label"] * 5}
        bank.write(
            folder / f"{kind}.arrow",
            type(stored)(
                stored.row.copy(), None if stored.fold is None else stored.fold.copy(), loud, stored.meta
            ),
        )
    sure = made(project, "method: mean", "[exp001]")["oof"]
    calm = {}
    for step in ("temperature", "platt", "isotonic"):
        calm[step] = made(project, f"method: mean\nafter: [{step}]", "[exp001]")["oof"]
        assert calm[step] < sure - (0.05 if step == "isotonic" else 0.1), step
        assert recipe_of("blend001")["after"]["label"]
    made(project, "method: mean\nafter: [temperature, isotonic]", "[exp001]")
    out = capsys.readouterr().out
    assert "isotonic: not used, log_loss" in out and "temperature: used, log_loss" in out
    assert len(recipe_of("blend001")["after"]["label"]) == 1


@pytest.mark.parametrize("step", ["temperature", "platt", "isotonic"])
def test_unknown_labels_are_ignored_by_calibration(step: str) -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (300, 3)).astype(float)
    stored = 5 * (2 * truth - 1 + random.normal(0, 1, truth.shape))
    told = truth.copy()
    told[::3, 1], told[:, 2] = np.nan, np.nan
    metric = metrics.find("mean_column_log_loss")
    assert not calibration.not_applicable(step, LABELS, metric, told)
    found = calibration.fit(step, stored, told, LABELS, metric, None)
    p = LABELS.spec.to_probability(calibration.apply(found, stored, LABELS))
    assert np.isfinite(p).all()
    if step == "isotonic":
        known = ~np.isnan(told[:, 1])
        alone = calibration.fit(step, stored[known, 1:2], truth[known, 1], BINARY, metric, None)
        one = BINARY.spec.to_probability(calibration.apply(alone, stored[:, 1:2], BINARY))
        assert p[:, 1] == pytest.approx(one[:, 0], abs=1e-9)
        assert p[:, 2] == pytest.approx(LABELS.spec.to_probability(stored)[:, 2], abs=1e-5), "no known label"
    raw = LABELS.spec.to_probability(stored)
    assert log_loss(truth[:, 0], p[:, 0]) < log_loss(truth[:, 0], raw[:, 0]) - 0.05


def test_steps_are_nested_and_used_only_for_significant_gains(empty: Path) -> None:
    """Flip the labels of a fold: its weights, its steps and the decision to use them must not change."""
    project = three(lay_out(empty, "binary", metric="log_loss"))
    text = "members: [exp001, exp002, exp003]\nmethod: logistic\nafter: [isotonic, temperature]"
    blend_ = Blend.model_validate(yaml.safe_load(text))
    oof = [load(project, f"exp00{i}") for i in (1, 2, 3)]

    def nested_() -> Any:
        return fit.fit_ensemble(project.setup, blend_, oof, (), {}, {}).nested["label"]

    before = nested_()
    frame, fold = project.samples.frame, project.folds.assignment[0][:400]
    rows = np.flatnonzero(fold == 2)
    frame.loc[frame.index[rows], "target.label"] = 1 - frame["target.label"].iloc[rows]
    now = nested_()
    assert (now[fold == 2] == before[fold == 2]).all() and (now[fold != 2] != before[fold != 2]).any()
    context = Context(
        project.cfg, project.samples, project.folds, blend_, np.arange(400), fold.astype(np.int64), {}
    )
    random = np.random.default_rng(0)
    truth = project.samples.truth(project.head, context.rows)
    base = (2 * truth - 1)[:, None] + random.normal(0, 1, (400, 1))
    lucky = base + 1e-4 * random.normal(size=base.shape)
    better, same = (
        postprocess_selection.measure_gain(context, project.head, base, each, context.rows)
        for each in (base * 1.5, lucky)
    )
    assert better.improved and better.fold_gain > better.error and not same.improved


@pytest.mark.parametrize(("task", "metric"), [("binary", "f1"), ("multiclass", "f1_macro")])
def test_thresholds_are_used_where_they_improve(empty: Path, task: str, metric: str) -> None:
    project = lay_out(empty, task, metric=metric)
    member(project, "exp001", noise=1.5)
    folder = bank.folder("exp001")
    for kind in bank.KINDS:  # one class is never predicted
        stored = load(project, "exp001", kind)
        shifted = stored.heads["label"].copy()
        shifted[:, 0] -= 3.0
        bank.write(
            folder / f"{kind}.arrow",
            type(stored)(
                stored.row.copy(),
                None if stored.fold is None else stored.fold.copy(),
                {"label": shifted},
                stored.meta,
            ),
        )
    before = made(project, "method: mean", "[exp001]")["oof"]
    assert made(project, "method: mean\nafter: [thresholds]", "[exp001]")["oof"] > before + 0.1


def test_prior_correction_finds_the_shift_of_test(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    truth = (random.random(4000) < 0.8).astype(float)
    own = (truth * 2 - 1 + random.normal(size=4000))[:, None] * 2  # calibrated for equal class shares
    step = calibration.prior(own, np.array([0.5, 0.5]), BINARY)
    assert step["shares"][1] == pytest.approx(0.8, abs=0.03)
    corrected = calibration.apply(step, own, BINARY)
    assert log_loss(truth, BINARY.spec.to_probability(corrected)[:, 0]) < log_loss(
        truth, BINARY.spec.to_probability(own)[:, 0]
    )
    project = three(lay_out(empty, "binary", metric="log_loss"))
    for kind in ("prior", "rank"):
        plain = made(project, "method: mean")["oof"]
        assert made(project, f"method: mean\ncorrect: {kind}")["oof"] == plain, "OOF rows are not corrected"
        assert f"correct: {kind}" in capsys.readouterr().out


def test_cut_points_are_used_only_where_they_improve(empty: Path) -> None:
    """Values shrunken to the mean need fitted cuts; for values with the right spread rounding is as good."""
    from comp.engine.bank import score

    project = lay_out(empty, "ordinal")
    truth = project.samples.truth(project.head, np.arange(400)).astype(float)
    rows, fold = np.arange(400), np.arange(400) % 5
    metric = metrics.find("qwk")
    for shrunk, fitted_ in ((0.3, True), (1.0, False)):
        value = (1.5 + shrunk * (truth - 1.5) + np.random.default_rng(0).normal(0, 0.1 * shrunk, 400))[
            :, None
        ]
        _, cuts = score.metric_predictions(
            metric, project.head, value, project.samples, project.folds, rows, fold
        )
        assert cuts is not None and (np.abs(cuts - [0.5, 1.5, 2.5]).max() > 0.1) == fitted_
