"""Adversarial validation: a difference between train and test is found if there is one, and becomes weights
and folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import config
from PIL import Image

from comp.engine.data import folds, make_folds, prepare, samples
from comp.engine.errors import UserError
from comp.engine.extras import adversarial_validation
from comp.engine.run import runner
from comp.engine.store import artifacts, paths

TINY = [
    "machine.num_workers=0",
    "machine.progress=false",
    "track=none",
    "train.epochs=1",
    "schedule.warmup=0",
]


def fewer(project: Path, darker: bool) -> None:
    """300 training and 120 test rows of the same writers; with `darker` all of test and a fifth of train is
    darker."""
    raw = project / "data" / "raw"
    train = pd.read_csv(raw / "train.csv", dtype=str).head(420).sample(frac=1, random_state=0)
    for file in (raw / "test").glob("*.png"):
        file.unlink()
    test = train.iloc[300:]
    for id_ in test["id"]:
        (raw / "train" / f"{id_}.png").rename(raw / "test" / f"{id_}.png")
    train = train.head(300)
    for kind, ids in (("test", test["id"]), ("train", train["id"][::5])):
        for id_ in ids if darker else ():
            file = raw / kind / f"{id_}.png"
            Image.fromarray((np.asarray(Image.open(file)) * 0.4).astype(np.uint8)).save(file)
    train.to_csv(raw / "train.csv", index=False)
    test[["id", "pen"]].to_csv(raw / "test.csv", index=False)
    pd.DataFrame({"id": test["id"], "label": "0"}).to_csv(raw / "sample_submission.csv", index=False)
    declared = project / "configs" / "competition.yaml"
    text = (
        declared.read_text()
        .replace("group: writer\n", "")
        .replace("stratified_group, k: 5", "stratified, k: 2")
    )
    declared.write_text(text)
    (project / "data" / "folds.parquet").unlink()
    prepare.prepare(config(experiment="base"))
    make_folds.make(config(experiment="base"), samples.load(), remake=True)


def trained(project: Path) -> None:
    runner.train("exp001", TINY, name="x")


def test_drift_is_found_and_becomes_weights_and_folds(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer(project, darker=True)
    trained(project)
    record = adversarial_validation.adversarial_validation("x")
    out = capsys.readouterr().out
    assert record["auc"] > 0.8 and "strong drift" in out and "training rows most like test" in out
    frame = pd.read_csv(project / "data" / "adversarial_validation.csv", dtype={"id": str}).set_index("id")
    train = frame[frame["source"] == "train"]
    dark = pd.read_csv(project / "data" / "raw" / "train.csv", dtype=str)["id"][::5]
    others = train.index.difference(list(dark))
    assert train.loc[dark, "weight"].mean() > 3 * train.loc[others, "weight"].mean()
    assert train["weight"].mean() == pytest.approx(1, abs=1e-4)
    assert Image.open(project / "data" / "adversarial_validation.png").width > 800
    declared = project / "configs" / "competition.yaml"
    declared.write_text(declared.read_text() + "drift: [weights, folds]\n")
    prepare.prepare(config(experiment="base"))
    rows = samples.load()
    weight = rows.frame.set_index("id")["weight"]
    assert weight[train.index].to_numpy() == pytest.approx(train["weight"].to_numpy())
    make_folds.make(config(experiment="base"), rows, remake=True)
    of = pd.Series(folds.load(rows).assignment[0], rows.frame["id"])
    assert abs((of[dark] == 0).sum() - 30) <= 3


def test_no_drift_is_reported_without_a_difference(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer(project, darker=False)
    trained(project)
    assert abs(adversarial_validation.adversarial_validation("x")["auc"] - 0.5) < 0.12
    assert "no significant drift" in capsys.readouterr().out


def test_a_missing_or_incomplete_table_is_an_error(project: Path) -> None:
    declared = project / "configs" / "competition.yaml"
    declared.write_text(declared.read_text() + "drift: [weights]\n")
    with pytest.raises(UserError, match=r"data/adversarial_validation\.csv.*comp audit --drift RUN"):
        prepare.prepare(config(experiment="base"))
    artifacts.write_text(
        paths.path("data", "adversarial_validation.csv"), "id,source,like_test,weight\nx,train,0.5,1\n"
    )
    with pytest.raises(UserError, match=r"adversarial_validation\.csv: has no row '00000', nor 1436 more"):
        prepare.prepare(config(experiment="base"))
