"""Submissions of every form: labels, rankings, long format, several samples of one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config
from test_layouts import declare, error_line, prepared, put

from comp import competition, submission
from comp.engine.bank import bank, predictions, score
from comp.engine.data import folds, make_folds, samples
from comp.engine.errors import UserError
from comp.engine.store import paths

# --- targets and forms --------------------------------------------------------------------------------------


def prediction_set(table: samples.Samples, kind: str, heads: dict[str, Any]) -> predictions.PredictionSet:
    split = folds.load(table)
    rows = predictions.rows_of(kind, table, split)
    fold = split.assignment[0][rows].astype(np.int16) if kind == "oof" else None
    meta = predictions.build_meta(kind, table, split, {"run": "exp001", "tta": ["identity"]})
    return predictions.PredictionSet(
        rows.astype(np.int32), fold, {k: np.asarray(v, np.float32) for k, v in heads.items()}, meta
    )


def write_run(table: samples.Samples, oof: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """Make folds and a run with these predictions; its score."""
    make_folds.make(config(experiment="base"), table)
    cfg = config(experiment="base")
    folder = paths.run_folder("exp001")
    for kind, heads in (("oof", oof), ("test", test)):
        bank.write(folder / f"{kind}.arrow", prediction_set(table, kind, heads))
    split = folds.load(table)
    return score.write(folder, cfg, table, split, bank.load("exp001", "oof", table, split))


def submission_lines() -> list[str]:
    table = samples.load()
    cfg = config(experiment="base")
    return (
        submission.write(cfg, table, "exp001", bank.load("exp001", "test", table, folds.load(table)))
        .read_text()
        .split()
    )


def logits(p: Any) -> Any:
    p = np.asarray(p, float)
    return np.log(p / (1 - p))


def test_multilabel_cells_with_nested_thresholds(empty: Path) -> None:
    put(empty, "train.csv", "id,tags\n" + "".join(f"{i},{'3 17' if i % 2 else '3'}\n" for i in range(8)))
    put(empty, "sample.csv", "id,tags\na,3\nb,3\n")
    declare(
        empty,
        target="tags",
        task="multilabel",
        metric="f1_micro",
        submission={"sample": "sample.csv", "form": "labels"},
    )
    table = prepared()
    assert table.heads[0].classes == ("3", "17")
    truth = table.truth(table.heads[0], table.positions("train"))
    assert truth.tolist()[:2] == [[1, 0], [1, 1]]
    record = write_run(
        table, {"tags": logits(0.1 + 0.2 * truth)}, {"tags": logits([[0.29, 0.12], [0.25, 0.05]])}
    )
    assert record["oof"] == 1.0, "the thresholds are fitted between 0.1 and 0.3, not at 0.5"
    assert submission_lines() == ["id,tags", "a,3", "b,3"], (
        "a row with nothing above its threshold gets the likeliest label"
    )
    # Thresholds that gain nothing are a half for every label, also of three.
    put(empty, "train.csv", "id,tags\n" + "".join(f"{i},{['3 17', '3', '5'][i % 3]}\n" for i in range(12)))
    table = prepared()
    truth = table.truth(table.heads[0], table.positions("train"))
    near = np.where(np.arange(12)[:, None] < 6, 0.2 + 0.6 * truth, 0.4 + 0.2 * truth)
    paths.folds_file().unlink()
    record = write_run(table, {"tags": logits(near)}, {"tags": logits([[0.6, 0.1, 0.7], [0.1, 0.4, 0.2]])})
    assert (record["oof"], record["cuts"]) == (1.0, {"tags": [0.5, 0.5, 0.5]})
    assert submission_lines() == ["id,tags", "a,3", "17", "b,5"]


def test_a_sample_with_some_of_the_label_columns(empty: Path) -> None:
    put(empty, "train.csv", "id,a,b,c\n" + "".join(f"{i},{i % 2},{i // 2 % 2},1\n" for i in range(8)))
    put(empty, "sample.csv", "id,b,a\nx,0,0\n")
    declare(empty, target=["a", "b", "c"], task="multilabel", metric="roc_auc", submission={"sample": "sample.csv", "form": "probabilities"})  # fmt: skip
    table = prepared()
    truth = table.truth(table.heads[0], table.positions("train"))
    assert table.heads[0].graded == ("b", "a")
    record = write_run(table, {"labels": logits(0.2 + 0.6 * truth)}, {"labels": logits([[0.25, 0.5, 0.9]])})
    assert record["oof"] == 1.0, record["undefined"]  # c has one class only and no AUC; it is not scored"
    header, line = submission_lines()
    assert header == "id,b,a" and [round(float(x), 3) for x in line.split(",")[1:]] == [0.5, 0.25]
    put(empty, "train.csv", "id,a,b,c\n0,1,2,0\n1,0,1,0\n")
    assert "train.csv:2: b: '2' is not between 0 and 1" in error_line()


def test_targets_of_different_tasks_in_long_format(empty: Path) -> None:
    put(empty, "train.csv", "id,kind,size\n" + "".join(f"{i},{'xy'[i % 2]},{i}.5\n" for i in range(8)))
    put(empty, "sample.csv", "row_id,target\nt1_kind,x\nt1_size,0\nt0_kind,x\nt0_size,0\n")
    put(empty, "test.csv", "id\nt0\nt1\n")
    declare(
        empty, target={"kind": "multiclass", "size": "regression"}, metric={"kind": "accuracy", "size": "spearman"}, task=None,
        test={"table": "test.csv", "image": "{id}.png"},
        submission={"sample": "sample.csv", "form": {"kind": "label", "size": "value"}, "rows": "{id}_{target}"},
    )  # fmt: skip
    table = prepared()
    assert [head.task for head in table.heads] == ["multiclass", "regression"]
    at = table.positions("train")
    codes = table.truth(table.heads[0], at)
    record = write_run(
        table,
        {"kind": np.log(0.1 + 0.8 * np.eye(2)[codes]), "size": table.targets(table.heads[1])[at]},
        {"kind": np.log([[0.1, 0.9], [0.8, 0.2]]), "size": [[2.5], [3.25]]},
    )
    assert record["oof"] == 1.0 and record["metric"] == "accuracy, spearman"
    assert submission_lines() == ["row_id,target", "t1_kind,x", "t1_size,3.25", "t0_kind,y", "t0_size,2.5"]
    declare(
        empty, target={"kind": "multiclass", "size": "regression"}, metric={"kind": "accuracy"}, task=None
    )
    with pytest.raises(UserError, match=r"competition\.metric: has kind, but the targets are kind, size"):
        config(experiment="base")


def test_samples_of_one_row_are_scored_and_written_once(empty: Path) -> None:
    rows = "".join(
        f"{p}{side}{i},{p},{side},{int(p > 'b')}\n" for p in "abcd" for side in "LR" for i in range(2)
    )
    put(empty, "train.csv", "id,patient,side,label\n" + rows)
    put(empty, "test.csv", "id,patient,side\n1,x,L\n2,x,L\n3,x,R\n")
    put(empty, "sample.csv", "pid,label\nx_L,0\nx_R,0\n")
    declare(
        empty, task="binary", metric="roc_auc", row="{patient}_{side}", merge="max", group="patient",
        test={"table": "test.csv", "image": "{id}.png"}, folds={"scheme": "stratified_group", "k": 2, "seed": 0},
        submission={"sample": "sample.csv", "form": "probability"},
    )  # fmt: skip
    table = prepared()
    truth = table.truth(table.heads[0], table.positions("train"))
    low = np.where(truth == 1, np.where(np.arange(16) % 2, 0.9, 0.1), 0.2)  # one view of two shows it
    record = write_run(table, {"label": logits(low)[:, None]}, {"label": logits([[0.2], [0.7], [0.4]])})
    assert record["rows"] == 8 and record["oof"] == 1.0
    assert [round(float(line.split(",")[1]), 3) for line in submission_lines()[1:]] == [0.7, 0.4]
    declare(empty, task="binary", metric="roc_auc", row="{patient}_{side}", test={"table": "test.csv", "image": "{id}.png"}, submission={"sample": "sample.csv", "form": "probability"})  # fmt: skip
    with pytest.raises(UserError, match="declare a group column that keeps them together"):
        make_folds.make(config(experiment="base"), prepared(), remake=True)


def test_ranking_soft_labels_extra_tables_and_weights(empty: Path) -> None:
    put(empty, "train.csv", "id,a,b,c,w\n0,2,1,1,1\n1,0,4,0,2\n2,1,1,2,1\n3,3,1,1,1\n")
    put(empty, "more.csv", "id,a,b,c\n0,1,0,0\n")
    put(empty, "sample.csv", "id,best\nx,a b\n")
    declare(
        empty, target=["a", "b", "c"], metric="kl", votes=True, weight="w",
        extra=[{"table": "more.csv", "image": "more/{id}.png"}],
        submission={"sample": "sample.csv", "form": "ranking", "k": 2},
    )  # fmt: skip
    table = prepared()
    assert table.targets(table.heads[0])[0].tolist() == [0.5, 0.25, 0.25]
    assert table.frame["source"].tolist() == ["train"] * 4 + ["test", "extra"]
    assert table.frame["id"].tolist()[-1] == "extra:0" and table.frame["weight"].tolist()[1] == 2.0
    at = table.positions("train")
    record = write_run(table, {"class": np.log(np.clip(table.targets(table.heads[0])[at], 1e-9, 1))}, {"class": np.log([[0.1, 0.3, 0.6]])})  # fmt: skip
    assert record["oof"] < 1e-6
    assert submission_lines() == ["id,best", "x,c", "b"]


def test_the_example_of_the_readme(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}" / "README.md").read_text()
    code = next(part for part in page.split("```python\n")[1:] if "def read_samples" in part).partition(
        "```"
    )[0]
    names: dict[str, Any] = {}
    exec(code, names)
    for name in ("read_samples", "write_submission"):
        monkeypatch.setattr(competition, name, names[name], raising=False)
    kinds = "".join(f"train|{i}|{'cat' if i % 2 else 'dog'}\n" for i in range(8))
    put(empty, "labels.txt", kinds + "test|x|\ntest|y|\n")
    put(empty, "sample.csv", "id,label\ny,cat\nx,cat\n")
    declare(empty, task="binary", metric="roc_auc", classes=["dog", "cat"])
    table = prepared()
    truth = table.truth(table.heads[0], table.positions("train"))
    write_run(table, {"label": logits(0.2 + 0.6 * truth)[:, None]}, {"label": logits([[0.9], [0.3]])})
    assert submission_lines() == ["id,label", "y,dog", "x,cat"]
