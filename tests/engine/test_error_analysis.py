"""comp slices and comp label-errors: scores by class, group and metadata, and rows where all models agree
against the label."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import banked
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from comp import metrics
from comp.engine.bank import bank, nested_cv, predictions
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.extras import label_errors, slice_statistics, slices


def with_columns(project: banked.Project, **columns: Any) -> banked.Project:
    rows = project.samples
    samples.save(rows.frame.assign(**columns), rows.heads)
    rows = samples.load()
    folds.save(project.folds.frame, project.folds.meta | {"samples": rows.hash})
    return project._replace(samples=rows, folds=folds.load(rows))


def write_run(project: banked.Project, run: str, seed: int, wrong: np.ndarray) -> None:
    """OOF predictions that are correct except for the rows `wrong`, which get another class with
    confidence."""
    at = predictions.rows_of("oof", project.samples, project.folds)
    values = banked.values(project, at, 0.5, seed)
    values[wrong] = np.roll(values[wrong], 1, axis=1) if values.shape[1] > 1 else -values[wrong]
    meta = predictions.build_meta(
        "oof", project.samples, project.folds, {"run": run, "member": "", "config": "c"}
    )
    fold = project.folds.assignment[0][at].astype(np.int16)
    whole = predictions.PredictionSet(at.astype(np.int32), fold, {project.head.name: values}, meta)
    bank.write(bank.folder(run) / "oof.arrow", whole)


def test_the_worst_slice_is_first_and_significant(empty: object, capsys: pytest.CaptureFixture[str]) -> None:
    count = banked.TRAIN + banked.TEST
    place = np.arange(count)
    project = with_columns(
        banked.lay_out(empty),  # type: ignore[arg-type]
        **{
            "meta.pen": np.where(place % 4 == 1, "blue", "black"),
            "meta.age": np.where(place % 9 == 0, np.nan, place % 50.0),
            "group": [f"writer{i % 40}" for i in place],
        },
    )
    wrong = np.flatnonzero((np.arange(banked.TRAIN) % 4 == 1) & (np.arange(banked.TRAIN) % 3 < 2))
    write_run(project, "exp001", 1, wrong)
    frame = slices.slices("exp001")
    out = capsys.readouterr().out
    blue, black = (frame[frame["slice"] == f"pen {pen}"].iloc[0] for pen in ("blue", "black"))
    assert blue["n"] == 100 and black["n"] == 300
    assert blue["score"] == pytest.approx(1 / 3, abs=0.05) and blue["low"] < blue["score"] < blue["high"]
    assert blue["against all"] == "worse" and black["against all"] == "better"
    assert frame["slice"].iloc[0] == "pen blue" and "pen blue" in out and "slices differ significantly" in out
    assert "p (Holm)" in out
    assert set(frame["slice"]) >= {"age missing"} and sum(frame["slice"].str.startswith("age")) == 5
    ages = frame[frame["slice"].str.startswith("age")]
    assert ages["n"].sum() == banked.TRAIN and (ages["against all"] == "").all()
    assert pd.read_csv(bank.folder("exp001") / "slices.csv").shape == frame.shape


def test_a_slice_without_errors_by_chance_is_not_significant(empty: Any) -> None:
    """90 of 90 right where 394 of 400 are: by chance in every fourth slice."""
    place = np.arange(banked.TRAIN + banked.TEST)
    project = with_columns(banked.lay_out(empty), **{"meta.pen": np.where(place < 90, "blue", "black")})
    write_run(project, "exp001", 2, np.arange(100, 106))
    frame = slices.slices("exp001")
    blue = frame[frame["slice"] == "pen blue"].iloc[0]
    assert (blue["score"], blue["n"], blue["against all"]) == (1.0, 90, "")
    assert blue["low"] == pytest.approx(0.9708, abs=1e-4) and blue["high"] == 1 and blue["p (Holm)"] > 0.2


def test_a_worse_class_is_significant(empty: Any, capsys: pytest.CaptureFixture[str]) -> None:
    project = banked.lay_out(empty)
    bees = np.flatnonzero(project.samples.truth(project.head, np.arange(banked.TRAIN)) == 1)
    write_run(project, "exp001", 1, bees[::5])
    frame: Any = slices.slices("exp001").set_index("slice")
    assert frame.index[0] == "label bee" and len(frame) == 3 and frame["n"].sum() == banked.TRAIN
    assert (
        frame["against all"].to_dict()["label bee"] == "worse" and frame.loc["label bee", "p (Holm)"] < 1e-6
    )
    assert "3 of 3 slices differ significantly from all rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "metric"), [("binary", "roc_auc"), ("ordinal", "qwk"), ("multilabel", "f1_micro")]
)
def test_classes_are_scored_by_accuracy_if_the_metric_needs_several(
    empty: Any, task: str, metric: str
) -> None:
    """Rows of one class have no area and no kappa: they are scored by accuracy."""
    place = np.arange(banked.TRAIN + banked.TEST)
    project = with_columns(
        banked.lay_out(empty, task, metric=metric), **{"meta.pen": np.where(place < 90, "blue", "black")}
    )
    write_run(project, "exp001", 1, np.arange(0, 90, 2))
    frame = slices.slices("exp001")
    classes = frame[frame["slice"].str.startswith("label ")]
    assert len(classes) == max(len(project.head.classes), len(project.head.outputs))
    assert set(classes["metric"]) == {"accuracy"} and classes["score"].notna().all()
    pens: Any = frame[frame["slice"].str.startswith("pen ")].set_index("slice")
    assert set(pens["metric"]) == {metric}
    assert pens["against all"].to_dict() == {"pen blue": "worse", "pen black": "better"}
    assert pens.loc["pen blue", "low"] < pens.loc["pen blue", "score"] < pens.loc["pen blue", "high"]


@pytest.mark.parametrize(("metric", "worlds", "most"), [("accuracy", 30, 7), ("roc_auc", 10, 4)])
@pytest.mark.parametrize("per_group", [1, 10])
def test_slices_that_do_not_differ_are_not_reported(
    metric: str, worlds: int, most: int, per_group: int
) -> None:
    """Data sets with 10 slices that differ by chance only; one data set in ten may report a slice."""
    reported = 0
    for seed in range(worlds):
        random = np.random.default_rng(seed)
        groups = np.arange(600) // per_group
        ease: Any = 2.0 + (random.normal(size=600)[groups] if per_group > 1 else 0)
        truth = random.integers(0, 2, 600) * 1.0
        answer: Any = (2 * truth - 1) * ease + random.normal(0, 1.5, 600)
        answer = (answer > 0) * 1.0 if metric == "accuracy" else 1 / (1 + np.exp(-answer))
        scored = slice_statistics.SliceScorer(
            metrics.METRICS[metric],
            truth,
            answer,
            pd.DataFrame(index=range(600)),
            groups if per_group > 1 else None,
        )
        parts = [np.flatnonzero(groups // (60 // per_group) == i) for i in range(10)]
        p = [
            slice_statistics.fisher_test(scored, each)
            if metric == "accuracy"
            else slice_statistics.permutation_test(scored, each, 10)
            for each in parts
        ]
        reported += bool((nested_cv.holm(np.array(p)) <= slice_statistics.ALPHA).any())
    assert reported <= most


def test_intervals_of_shares_and_corrected_p_values() -> None:
    assert nested_cv.wilson(10, 20, 0.95) == pytest.approx(
        (0.2993, 0.7007), abs=1e-4
    )  # R: prop.test(10, 20, correct=FALSE)
    assert nested_cv.wilson(0, 20, 0.95) == pytest.approx((0, 0.1611), abs=1e-4)
    assert nested_cv.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # R: p.adjust


def test_no_slices_is_an_error(empty: object) -> None:
    write_run(banked.lay_out(empty, "regression"), "exp001", 1, np.zeros(0, int))  # type: ignore[arg-type]
    with pytest.raises(UserError, check=lambda error: error.code == "slices-missing"):
        slices.slices("exp001")


def test_label_errors_that_all_models_agree_on_are_listed_and_drawn(
    empty: object, capsys: pytest.CaptureFixture[str]
) -> None:
    project = banked.lay_out(empty)  # type: ignore[arg-type]
    both, one = np.array([3, 77, 210]), np.array([5, 90])
    write_run(project, "exp001", 1, np.concatenate([both, one]))
    write_run(project, "exp002", 2, both)
    frame = label_errors.label_errors([])
    assert set(frame["position"]) == set(both) and (frame["margin"] > 0.3).all()
    line = frame[frame["position"] == 77].iloc[0]
    label = project.head.classes[int(project.samples.targets(project.head)[77, 0])]
    assert line["label"] == label and line["predicted"] != label and line["id"] == "00077"
    out = capsys.readouterr().out
    assert "3 of 400 rows are likely label errors: exp001, exp002" in out and "00077" in out
    assert "written: data/label_errors.csv, data/label_errors.png (the first 3)" in out
    assert "margin: probability of the prediction less that of the label" in out
    assert out.splitlines()[-1].endswith("in read_samples (comp/competition.py), then comp prepare")
    assert Image.open(empty / "data" / "label_errors.png").width > 800  # type: ignore[operator]


def test_a_run_of_a_few_rows_or_of_other_folds_is_left_out(
    empty: object, capsys: pytest.CaptureFixture[str]
) -> None:
    project = banked.lay_out(empty)  # type: ignore[arg-type]
    both = np.array([3, 77, 210])
    for seed, run in enumerate(("exp001", "exp002", "exp001-debug", "other")):
        write_run(project, run, seed, both)
    few = bank.load("exp001-debug", "oof", project.samples, project.folds)
    heads = {name: np.where(np.arange(len(v))[:, None] < 50, v, np.nan) for name, v in few.heads.items()}
    bank.write(bank.folder("exp001-debug") / "oof.arrow", replace(few, heads=heads))
    other = bank.load("other", "oof", project.samples, project.folds)
    bank.write(bank.folder("other") / "oof.arrow", replace(other, meta=other.meta | {"folds": "f" * 64}))
    assert set(label_errors.label_errors([])["position"]) == set(both)
    out = capsys.readouterr().out
    assert "3 of 400 rows are likely label errors: exp001, exp002" in out
    assert "exp001-debug predicts 50 of 400 rows" in out and "left out: runs/other/oof.arrow" in out


@pytest.mark.parametrize(("task", "rows"), [("binary", [8, 9]), ("regression", [])])
def test_other_tasks(empty: object, task: str, rows: list[int]) -> None:
    project = banked.lay_out(empty, task)  # type: ignore[arg-type]
    if task == "regression":  # far from the mean, so that the wrong sign is a large mistake
        rows = np.argsort(-np.abs(project.samples.targets(project.head)[: banked.TRAIN, 0]))[:3].tolist()
    for seed, run in enumerate(("exp001", "exp002")):
        write_run(project, run, seed, np.array(rows))
    frame = label_errors.label_errors(["exp001", "exp002"])
    assert set(frame["position"]) >= set(rows) and len(frame) <= len(rows) + 6
