"""Ensembles: config errors, valid predictions, equal bits for one row and a batch, scores and marks,
kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked import HEADS, TRAIN, Project, declare, lay_out, member
from scipy.stats import rankdata

from comp import metrics
from comp.engine.bank import bank, predictions, score, thresholds
from comp.engine.ensemble import average
from comp.engine.ensemble.blend import FILES, blend
from comp.engine.ensemble.blend_config import read
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

TASKS = list(HEADS)
METHODS = {
    "mean": "method: mean",
    "logit": "method: mean\nspace: logit",
    "weighted": "method: weighted\nweights: [3, 1, 2.5]",
    "rank": "method: rank",
    "weighted rank": "method: rank\nweights: [3, 1, 1]",
    "geometric": "method: geometric",
}


@pytest.fixture
def project(empty: Path) -> Project:
    return three(lay_out(empty))


def three(project: Project) -> Project:
    """Members that differ in noise and in scale, so that ranks are not means."""
    for i, noise in enumerate((1.2, 1.5, 2.0)):
        member(project, f"exp00{i + 1}", noise=noise, seed=10 + i)
    return project


def lines_of(project: Project, text: str) -> list[str]:
    declare(project, "blend001", text)
    with pytest.raises(UserError) as caught:
        blend("blend001")
    return caught.value.lines


def load(project: Project, address: str, kind: str = "oof") -> predictions.PredictionSet:
    return bank.load(address, kind, project.samples, project.folds)


# --- config -------------------------------------------------------------------------------------------------

MISTAKES = {
    "members: [exp001, exp002]\nmethd: mean": ["blend001.yaml:2: methd: no such key; did you mean method?"],
    "members: [exp001]\nmethod: medain": ["blend001.yaml:2: method"],
    "members: []\nmethod: mean": ["blend001.yaml:1: members"],
    "method: mean": ["blend001.yaml: members: is missing"],
    "members: [exp001, exp002]\nmethod: weighted": ["blend001.yaml:2: method: weighted needs weights"],
    "members: [exp001, exp002]\nmethod: weighted\nweights: [1]": ["blend001.yaml:3: weights: 1 numbers for 2 members"],
    "members: [exp001, exp002]\nmethod: weighted\nweights: [1, -1]": ["blend001.yaml:3: weights.1"],
    "members: [exp001, exp002]\nmethod: weighted\nweights: [1, true]": ["blend001.yaml:3: weights.1"],
    "members: [exp001, exp002]\nmethod: weighted\nweights: [1, .nan]": ["blend001.yaml:3: weights.1"],
    "members: [exp001, exp002]\nmethod: weighted\nweights: [0, 0]": ["blend001.yaml:3: weights: all are 0"],
    "members: [exp001, exp002]\nmethod: mean\nweights: [1, 2]": ["blend001.yaml:3: weights: method mean uses equal weights"],
    "members:\n  - exp001\n  - exp002\n  - exp001\nmethod: mean": ["blend001.yaml:4: members: exp001 is listed twice"],
    "members: [exp001, blend001]\nmethod: mean": ["blend001.yaml:1: members: blend001 is this ensemble itself"],
    "members:\n  - exp001\n  - exp01\n  - exp0O2\nmethod: mean": ["blend001.yaml:3: members: exp01: no such", "blend001.yaml:4: members: exp0O2"],
    "members: [exp001\nmethod: mean": ["blend001.yaml:"],
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_with_file_and_line(project: Project, text: str) -> None:
    lines = lines_of(project, text)
    assert len(lines) == len(MISTAKES[text]), lines
    for wanted in MISTAKES[text]:
        assert any(line.startswith("configs/ensembles/") and wanted in line for line in lines), lines


def test_an_unknown_ensemble_lists_the_nearest(project: Project) -> None:
    declare(project, "blend001", "members: [exp001]\nmethod: mean")
    with pytest.raises(UserError, match="blend001"):
        read("blend01")


def test_an_ensemble_cannot_have_the_name_of_a_run(project: Project) -> None:
    declare(project, "exp001", "members: [exp002]\nmethod: mean")
    with pytest.raises(UserError) as caught:
        blend("exp001")
    assert (caught.value.code, caught.value.where) == ("name-taken", "configs/ensembles/exp001.yaml")


def test_a_key_without_effect_prints_a_warning(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: rank\nspace: probability")
    blend("blend001")
    assert "blend001.yaml:3: space: probability has no effect" in capsys.readouterr().out


def test_members_with_other_folds(empty: Path) -> None:
    before = lay_out(empty)
    member(before, "exp001")
    project = lay_out(empty, shift=1)
    member(project, "exp002")
    lines = lines_of(project, "members:\n  - exp001\n  - exp002\nmethod: mean")
    assert len(lines) == 1
    assert lines[0].startswith(
        "configs/ensembles/blend001.yaml:2: members: runs/exp001/oof.arrow: data/folds.parquet: "
    )


def test_members_that_predict_other_rows(project: Project) -> None:
    stored = load(project, "exp002")
    values = stored.heads["label"].copy()
    values[7:] = np.nan
    bank.write(
        bank.find("exp002", "oof"),
        predictions.PredictionSet(stored.row, stored.fold, {"label": values}, stored.meta),
    )
    (line,) = lines_of(project, "members: [exp001, exp002]\nmethod: mean")
    assert "exp002 and exp001 predict different oof rows (7 and 400)" in line


def test_ensembles_that_contain_each_other(project: Project) -> None:
    declare(project, "blend001", "members: [exp001]\nmethod: mean")
    declare(project, "blend002", "members: [blend001, exp002]\nmethod: mean")
    blend("blend001")
    blend("blend002")
    assert (
        "blend002 is itself an ensemble of blend001"
        in lines_of(project, "members: [blend002]\nmethod: mean")[0]
    )


# --- predictions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_valid_and_the_same_row_by_row(empty: Path, task: str) -> None:
    project = three(lay_out(empty, task))
    head = project.head
    for method in METHODS.values():
        declare(project, "blend001", f"members: [exp001, exp002, exp003]\n{method}")
        blend("blend001")
        recipe = json.loads((bank.folder("blend001") / "apply.json").read_text())
        for kind in bank.KINDS:
            batch = load(project, "blend001", kind)
            p = batch.probability(head)
            assert np.isfinite(p).all()
            if head.spec.space == "logit":
                assert p.min() >= 0 and p.max() <= 1
            if task == "multiclass":
                assert np.allclose(p.sum(axis=1), 1, atol=1e-12)
            members = {
                name: load(project, name, kind).heads["label"] for name in ("exp001", "exp002", "exp003")
            }
            for row in range(0, len(batch.row), 23):
                alone = {name: {"label": values[row : row + 1]} for name, values in members.items()}
                assert (average.apply(recipe, alone)["label"] == batch.heads["label"][row : row + 1]).all()


def test_weighted_mean(project: Project) -> None:
    declare(project, "blend001", "members: [exp001, exp002, exp003]\nmethod: weighted\nweights: [3, 1, 4]")
    blend("blend001")
    parts = [load(project, f"exp00{i}").probability(project.head) for i in (1, 2, 3)]
    wanted = np.average(parts, axis=0, weights=[3, 1, 4])
    assert np.allclose(load(project, "blend001").probability(project.head), wanted, atol=1e-6)


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_method_rank_orders_by_mean_rank_and_predicts_values(empty: Path, task: str) -> None:
    project = three(lay_out(empty, task))
    declare(project, "blend001", "members: [exp001, exp002, exp003]\nmethod: rank\nweights: [2, 1, 1]")
    blend("blend001")
    parts = [load(project, f"exp00{i}").heads["label"][:, 0] for i in (1, 2, 3)]
    mean_rank = np.average([rankdata(part) for part in parts], axis=0, weights=[2, 1, 1])
    stored = load(project, "blend001").heads["label"][:, 0]
    assert (rankdata(np.round(mean_rank, 6)) == rankdata(stored)).all()
    low, high = min(part.min() for part in parts), max(part.max() for part in parts)
    assert low <= stored.min() and stored.max() <= high and stored.std() > 0.5 * parts[0].std()


def test_test_rows_are_ranked_among_oof_values(empty: Path) -> None:
    """Never within a batch: the prediction of a row does not depend on other test rows."""
    project = three(lay_out(empty, "binary"))
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: rank")
    blend("blend001")
    recipe = json.loads((bank.folder("blend001") / "apply.json").read_text())
    far = {name: {"label": np.array([[99.0], [-99.0]], np.float32)} for name in ("exp001", "exp002")}
    top, bottom = average.apply(recipe, far)["label"][:, 0]
    stored = load(project, "blend001").heads["label"]
    assert top >= stored.max() and bottom <= stored.min()


def test_quantile_maps_have_at_most_knots_points() -> None:
    values = np.random.default_rng(0).normal(size=(20_000, 1)).astype(np.float32)
    (quantiles,) = average.quantiles(values)
    assert len(quantiles["value"]) == average.KNOTS
    share = np.interp(values[:, 0], quantiles["value"], quantiles["share"])
    assert np.abs(share - (rankdata(values[:, 0]) - 0.5) / len(values)).max() < 1 / average.KNOTS


def test_a_value_beyond_float32_raises() -> None:
    described = {"name": "label", "task": "regression", "outputs": ["label"], "classes": []}
    recipe = {"space": "probability", "heads": [described], "members": [{"address": "a", "weight": 1.0}]}
    with pytest.raises(UserError, match="not finite"):
        average.apply(recipe, {"a": {"label": np.array([[1e300]])}})


# --- scores, marks, provenance ------------------------------------------------------------------------------


def test_score_of_an_ensemble(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    declare(project, "blend001", "members: [exp001, exp002, exp003]\nmethod: mean")
    record = blend("blend001")
    p = load(project, "blend001").probability(project.head)
    truth = project.samples.truth(project.head, np.arange(TRAIN))
    assert record["oof"] == pytest.approx((p.argmax(axis=1) == truth).mean())
    folds = [(p.argmax(axis=1) == truth)[np.arange(TRAIN) % 5 == k].mean() for k in range(5)]
    assert record["folds"] == pytest.approx(folds) and record["n"] == 5
    assert record["mean"] == pytest.approx(np.mean(folds)) and record["std"] == pytest.approx(
        np.std(folds, ddof=1)
    )
    assert record == artifacts.read_json(artifacts.verified(bank.folder("blend001") / "score.json"))
    for stored in record["members"]:
        own = artifacts.read_json(bank.folder(stored["address"]) / "score.json")
        assert stored["oof"] == own["oof"]
        assert stored["sha256"]["test"] == artifacts.sha256(bank.find(stored["address"], "test"))
    assert record["oof"] > max(stored["oof"] for stored in record["members"])
    out = capsys.readouterr().out
    assert (
        "against the best member exp001 (" in out
        and "recommended: blend001" in out
        and "next: comp submit blend001 --dry-run" in out
    )


def test_cut_points_are_fitted_on_the_other_folds(empty: Path) -> None:
    """On noise, cut points fitted on the rows they are scored on would look better than chance."""
    project = lay_out(empty, "ordinal")
    member(project, "exp001", noise=1e6)
    record = artifacts.read_json(bank.folder("exp001") / "score.json")
    assert len(record["cuts"]["label"]) == 3 and abs(record["oof"]) < 0.15
    member(project, "exp002", noise=0.1)
    assert artifacts.read_json(bank.folder("exp002") / "score.json")["oof"] > 0.95


def test_cut_points_by_time_are_fitted_on_the_past(empty: Path) -> None:
    project = lay_out(empty, "ordinal", rule="earlier")
    member(project, "exp001", noise=0.5)
    stored, metric, rows = load(project, "exp001"), metrics.METRICS["qwk"], np.arange(TRAIN)
    # shrunken, so that fitted cut points are better on every past fold
    value, truth = (
        0.4 * stored.heads["label"][:, 0].astype(np.float64),
        project.samples.truth(project.head, rows),
    )
    fold = rows * 5 // TRAIN
    answers, _ = score.metric_predictions(
        metric, project.head, value[:, None], project.samples, project.folds, rows, fold
    )
    assert (answers[fold == 0] == thresholds.apply_cuts(value[fold == 0], np.array([0.5, 1.5, 2.5]))).all()
    for number in range(1, 5):
        past = fold < number
        cuts = thresholds.fit_cuts(value[past], truth[past], 4, metric)
        assert (answers[fold == number] == thresholds.apply_cuts(value[fold == number], cuts)).all()


def test_marks_of_members_are_kept_and_printed(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    member(project, "exp004", marks=["selected_on_fold"])
    declare(project, "blend001", "members: [exp001, exp004]\nmethod: mean")
    declare(project, "blend002", "members: [blend001, exp002]\nmethod: rank")
    blend("blend001")
    capsys.readouterr()
    assert blend("blend002")["marks"] == ["selected_on_fold"]
    assert "too good" in capsys.readouterr().out
    assert load(project, "blend002", "test").meta["marks"] == ["selected_on_fold"]


def test_ensembles_nest_down_to_the_row(project: Project) -> None:
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: rank")
    declare(project, "blend002", "members: [blend001, exp003]\nmethod: weighted\nweights: [2, 1]")
    blend("blend001")
    blend("blend002")
    recipe = json.loads((bank.folder("blend002") / "apply.json").read_text())
    assert average.leaves(recipe) == ["exp001", "exp002", "exp003"]
    given = {name: {"label": load(project, name, "test").heads["label"]} for name in average.leaves(recipe)}
    stored = load(project, "blend002", "test")
    assert (average.apply(recipe, given)["label"] == stored.heads["label"]).all()
    del given["exp002"]
    with pytest.raises(UserError, match="exp002"):
        average.apply(recipe, given)


def test_a_refit_gets_the_weight_fitted_for_its_run(project: Project) -> None:
    member(project, "exp001:full", kinds=("test",), seed=99)
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: weighted\nweights: [3, 1]")
    declare(project, "blend002", "members: ['exp001:full', exp002]\nmethod: weighted\nweights: [3, 1]")
    blend("blend001")
    blend("blend002")
    cv, refit = load(project, "blend001"), load(project, "blend002")
    assert (cv.heads["label"] == refit.heads["label"]).all()
    parts = [load(project, name, "test").probability(project.head) for name in ("exp001:full", "exp002")]
    wanted = np.average(parts, axis=0, weights=[3, 1])
    assert np.allclose(load(project, "blend002", "test").probability(project.head), wanted, atol=1e-6)
    assert not np.allclose(
        load(project, "blend001", "test").heads["label"], load(project, "blend002", "test").heads["label"]
    )


def test_a_custom_metric_scores_runs_and_ensembles(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp import competition

    def metric(truth: Any, prediction: Any, rows: Any) -> float:
        assert list(rows["id"]) == [f"{i:05d}" for i in range(len(rows))] or (
            len(rows) < TRAIN or rows["id"].duplicated().any()  # a fold, or a bootstrap sample
        )
        return float(np.abs(truth - prediction.argmax(axis=1)).mean())

    metric.direction, metric.needs = "min", "probability"  # type: ignore[attr-defined]
    monkeypatch.setattr(competition, "metric", metric, raising=False)
    project = three(lay_out(empty, metric="metric"))
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: mean")
    record = blend("blend001")
    assert record["direction"] == "min" and 0 < record["oof"] < min(each["oof"] for each in record["members"])


def test_a_metric_of_another_task_is_rejected(empty: Path) -> None:
    project = lay_out(empty, "regression", metric="roc_auc")
    with pytest.raises(UserError, match="not defined for the task regression; use rmse") as caught:
        score.metric_of(project.cfg)
    assert (caught.value.code, caught.value.key) == ("metric-task", "metric")


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_scores_its_tasks(empty: Path, task: str) -> None:
    project = lay_out(empty, task)
    if task == "regression":
        column = project.samples.frame["target.label"]
        project.samples.frame["target.label"] = column.abs()  # rmsle is undefined below 0
    member(project, "exp001", noise=0.001)
    stored, seen = load(project, "exp001"), 0
    stored.heads["label"].setflags(write=False)
    for name, metric in metrics.METRICS.items():
        if task in metric.tasks:
            competition = project.cfg.competition.model_copy(update={"metric": name})
            cfg = project.cfg.model_copy(update={"competition": competition})
            record = score.evaluate(cfg, project.samples, project.folds, stored)
            assert (record["oof"] is None) == bool(record["undefined"]), name
            assert record["oof"] is not None or "from 0 up" in record["undefined"][0], record["undefined"]
            seen += 1
    assert seen >= 5


# --- killed -------------------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from comp.engine.ensemble.blend import blend
left = int(sys.argv[1])
replace = os.replace
def counted(*a):
    global left
    left -= os.path.basename(a[1]) != ".lock"
    if left < 0: os.kill(os.getpid(), signal.SIGKILL)
    replace(*a)
os.replace = counted
blend("blend001")
"""


def test_killed_at_any_rename_the_next_start_gives_the_same_bytes(project: Project) -> None:
    """After a member changed: whatever can be read in between is made from the new one, never a mixture."""
    declare(project, "blend001", "members: [exp001, exp002, exp003]\nmethod: rank")
    folder, names = paths.ensemble_folder("blend001"), [*FILES, artifacts.MANIFEST]

    def made(seed: int) -> dict[str, bytes]:
        member(project, "exp003", seed=seed)
        blend("blend001")
        return {name: (folder / name).read_bytes() for name in names}

    before, whole = made(12), made(13)
    assert all(before[name] != whole[name] for name in names)
    for renames in (1, 4, 7, 10):
        assert made(12) == before
        member(project, "exp003", seed=13)
        command = [sys.executable, "-c", KILLER, str(renames)]
        done = subprocess.run(command, env=os.environ, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        for name in FILES:
            if (entry := artifacts.manifest_entry(folder / name)) is not None and renames >= len(FILES):
                assert (folder / name).read_bytes() == whole[name] and entry["size"] == len(whole[name])
        blend("blend001")
        assert {name: (folder / name).read_bytes() for name in names} == whole
