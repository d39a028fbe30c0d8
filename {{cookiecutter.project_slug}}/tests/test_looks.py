"""Where models are wrong: slices with n and interval, rows that several models deny."""

from __future__ import annotations

from typing import Any

import banked
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from comp import bank, folds, predictions, samples
from comp.ensemble import contradicted, slices
from comp.refused import Refused


def with_columns(project: banked.Project, **columns: Any) -> banked.Project:
    rows = project.samples
    samples.save(rows.frame.assign(**columns), rows.heads)
    rows = samples.load()
    folds.save(project.folds.frame, project.folds.meta | {"samples": rows.hash})
    return project._replace(samples=rows, folds=folds.load(rows))


def said(project: banked.Project, run: str, seed: int, wrong: np.ndarray) -> None:
    """A run that is right nearly everywhere, and sure of another class where it is wrong."""
    at = predictions.rows_of("oof", project.samples, project.folds)
    values = banked.values(project, at, 0.5, seed)
    values[wrong] = np.roll(values[wrong], 1, axis=1) if values.shape[1] > 1 else -values[wrong]
    meta = predictions.meta("oof", project.samples, project.folds, {"run": run, "member": "", "config": "c"})
    fold = project.folds.of_sample[0][at].astype(np.int16)
    whole = predictions.PredictionSet(at.astype(np.int32), fold, {project.head.name: values}, meta)
    bank.write(bank.folder(run) / "oof.arrow", whole)


def test_the_slice_that_is_worse_stands_first_and_is_told(
    empty: object, capsys: pytest.CaptureFixture[str]
) -> None:
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
    said(project, "exp001", 1, wrong)
    frame = slices.slices("exp001")
    out = capsys.readouterr().out
    blue, black = (frame[frame["slice"] == f"pen {pen}"].iloc[0] for pen in ("blue", "black"))
    assert blue["n"] == 100 and black["n"] == 300
    assert blue["score"] == pytest.approx(1 / 3, abs=0.05) and blue["low"] < blue["score"] < blue["high"]
    assert blue["against all"] == "worse" and black["against all"] == "better"
    assert frame["slice"].iloc[0] == "pen blue" and "pen blue" in out and "slices differ" in out
    assert set(frame["slice"]) >= {"age missing"} and sum(frame["slice"].str.startswith("age")) == 5
    ages = frame[frame["slice"].str.startswith("age")]
    assert ages["n"].sum() == banked.TRAIN and (ages["against all"] == "").all()
    assert pd.read_csv(bank.folder("exp001") / "slices.csv").shape == frame.shape


def test_nothing_to_slice_by_is_said(empty: object) -> None:
    said(banked.lay_out(empty), "exp001", 1, np.zeros(0, int))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="nothing to slice by"):
        slices.slices("exp001")


def test_wrong_labels_are_denied_by_all_and_drawn(empty: object, capsys: pytest.CaptureFixture[str]) -> None:
    project = banked.lay_out(empty)  # type: ignore[arg-type]
    both, one = np.array([3, 77, 210]), np.array([5, 90])
    said(project, "exp001", 1, np.concatenate([both, one]))
    said(project, "exp002", 2, both)
    frame = contradicted.contradicted([])
    assert set(frame["position"]) == set(both) and (frame["denied"] > 0.3).all()
    line = frame[frame["position"] == 77].iloc[0]
    given = project.head.classes[int(project.samples.targets(project.head)[77, 0])]
    assert line["given"] == given and line["models say"] != given and line["id"] == "00077"
    out = capsys.readouterr().out
    assert "3 rows of 400 are denied by all of exp001, exp002" in out and "00077" in out
    assert Image.open(empty / "data" / "contradicted.png").width > 800  # type: ignore[operator]


@pytest.mark.parametrize(("task", "rows"), [("binary", [8, 9]), ("regression", [])])
def test_other_tasks(empty: object, task: str, rows: list[int]) -> None:
    project = banked.lay_out(empty, task)  # type: ignore[arg-type]
    if task == "regression":  # far from the mean, so that the wrong sign is a large mistake
        rows = np.argsort(-np.abs(project.samples.targets(project.head)[: banked.TRAIN, 0]))[:3].tolist()
    for seed, run in enumerate(("exp001", "exp002")):
        said(project, run, seed, np.array(rows))
    frame = contradicted.contradicted(["exp001", "exp002"])
    assert set(frame["position"]) >= set(rows) and len(frame) <= len(rows) + 6
