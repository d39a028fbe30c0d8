"""Every method end to end: validity, nested scores, time limits, metadata, filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from banked import HEADS, declare, lay_out, load, made, member, recipe_of, three
from tqdm import tqdm

from comp import metrics
from comp.engine.bank import bank
from comp.engine.ensemble import (
    average,
    comparison,
    fit,
    latency,
    member_filter,
    methods,
    weight_search,
)
from comp.engine.ensemble.blend import blend
from comp.engine.ensemble.blend_config import AVERAGES, SEARCHED, STACKED, Blend
from comp.engine.ensemble.context import Context
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

EXTRA = {"weighted": "weights: [3, 1, 2]", "optuna": "trials: 15", "lightgbm": ""}


@pytest.mark.parametrize("task", HEADS)
def test_every_method_is_valid_and_applies_row_by_row(
    empty: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 40)
    project = three(lay_out(empty, task))
    every = [
        *AVERAGES,
        *SEARCHED,
        *(m for m in STACKED if HEADS[task].spec.space == "logit" or m != "logistic"),
    ]
    if not has("lightgbm"):
        every.remove("lightgbm")
    given = {a: load(project, a, "test").heads for a in ("exp001", "exp002", "exp003")}
    for method in every:
        record = made(project, f"method: {method}\n{EXTRA.get(method, '')}")
        recipe, stored = recipe_of("blend001"), load(project, "blend001", "test")
        p = stored.probability(project.head)
        assert np.isfinite(p).all() and p.shape[1] == len(project.head.outputs), method
        if project.head.spec.space == "logit":
            assert p.min() >= 0 and p.max() <= 1
        if task == "multiclass":
            assert np.allclose(p.sum(axis=1), 1, atol=1e-12)
        for row in range(0, len(stored.row), 37):
            alone = {a: {"label": heads["label"][row : row + 1]} for a, heads in given.items()}
            assert (average.apply(recipe, alone)["label"] == stored.heads["label"][row : row + 1]).all(), (
                method
            )
        assert (record["in_sample"] is not None) == (method in SEARCHED + STACKED)
        assert record["interval"]["low"] < record["oof"] < record["interval"]["high"], method


def has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_oof_predictions_of_a_fitted_ensemble_are_nested(empty: Path) -> None:
    """Flip the labels of one fold: the predictions of its rows must not change."""
    project = three(lay_out(empty, "binary", metric="log_loss"))
    for method in ("greedy", "slsqp", "logistic"):
        before = made(project, f"method: {method}")
        nested = load(project, "blend001").heads["label"].copy()
        fold = load(project, "blend001").fold
        frame = project.samples.frame
        truth = frame["target.label"].copy()
        rows = np.flatnonzero(fold == 2)
        frame.loc[frame.index[rows], "target.label"] = 1 - truth.iloc[rows]
        from comp.engine.bank import score
        from comp.engine.ensemble import blend_config, fit, members

        config = blend_config.read("blend001")
        oof, test = (members.predictions(config, kind, project.setup) for kind in bank.KINDS)
        again = fit.fit_ensemble(project.setup, config.blend, oof, test, {}, {})
        assert (again.nested["label"][fold == 2] == nested[fold == 2]).all(), method
        assert (again.nested["label"][fold != 2] != nested[fold != 2]).any(), method
        frame["target.label"] = truth
        assert before["oof"] is not None and score is not None


def test_a_second_level_is_fitted_on_members_refitted_without_the_fold(empty: Path) -> None:
    from comp.engine.ensemble import blend_config, members

    project = three(lay_out(empty, "binary", metric="log_loss"))
    declare(project, "fitted", "members: [exp001, exp002]\nmethod: logistic")
    declare(project, "mean", "members: [fitted, exp003]\nmethod: mean")
    declare(project, "blend001", "members: [mean, fitted, exp003]\nmethod: greedy")
    for name in ("fitted", "mean", "blend001"):
        blend(name)
    refits = members.refits(blend_config.read("blend001"), project.setup)
    assert list(refits) == ["mean", "fitted"]  # members that no label influenced need none
    stored, rows = load(project, "mean"), np.arange(400)
    assert np.allclose(refits["mean"](rows)["label"], stored.heads["label"], atol=1e-6)
    others = np.flatnonzero(stored.fold != 0)
    alone = refits["mean"](others)["label"]
    assert alone.shape == (320, 1) and not np.allclose(alone, stored.heads["label"][others], atol=1e-6)
    declare(project, "fitted", "members: [exp001, exp002]\nmethod: ridge")
    with pytest.raises(UserError, match=r"members: fitted has to be fitted again .*: comp ensemble fitted"):
        blend("blend001")


def test_an_overfitted_search_reports_its_optimism_and_recommends_a_simpler_one(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = lay_out(empty, "binary")
    for i in range(12):
        member(project, f"exp{i:03d}", noise=1e3, seed=i)  # pure noise
    record = made(project, "method: hill\nnegative: true", "['name~exp']")
    assert record["in_sample"] > record["oof"] + 0.02
    out = capsys.readouterr().out
    assert "optimism 0." in out and "recommended: " in out and "recommended: blend001" not in out
    assert len(record["members"]) == 12


@pytest.mark.parametrize("method", ["greedy", "logistic", "ridge"])
def test_two_levels_and_snapshots(empty: Path, method: str) -> None:
    project = three(lay_out(empty, "multiclass", metric="log_loss"))
    for i in range(3):
        member(project, f"exp003:snap{i + 1}", noise=2.0 - i / 3, seed=40 + i)
    made(project, f"method: {method}")
    made(project, "method: slsqp", "['exp003:snapshots']", "blend002")
    made(project, "method: snapshots", "['exp003:snapshots']", "blend003")
    weights = [
        each["weight"] for each in artifacts.read_json(bank.folder("blend003") / "score.json")["members"]
    ]
    assert weights == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    record = made(project, "method: logistic", "[blend001, blend002, exp001]", "blend004")
    assert record["oof"] < 0.8 and set(average.leaves(recipe_of("blend004"))) <= {
        "exp001", "exp002", "exp003", "exp003:snap1", "exp003:snap2", "exp003:snap3"
    }  # fmt: skip
    stored = load(project, "blend004", "test")
    given = {a: load(project, a, "test").heads for a in average.leaves(recipe_of("blend004"))}
    assert (average.apply(recipe_of("blend004"), given)["label"] == stored.heads["label"]).all()


def test_weights_per_class_and_bags(empty: Path) -> None:
    project = three(lay_out(empty, "multiclass", metric="log_loss"))
    for text in (
        "method: slsqp\nper_class: true",
        "method: greedy\nbags: 4",
        "method: greedy\nbags: 3\nbag_of: rows",
        "method: greedy\nbag_of: folds",
    ):
        record = made(project, text)
        assert sum(each["weight"] for each in record["members"]) == pytest.approx(1)
    made(project, "method: slsqp\nper_class: true")
    weights = np.array(recipe_of("blend001")["params"]["label"]["weights"])
    assert (
        weights.shape[1] == 3 and weights.sum(axis=0) == pytest.approx(np.ones(3)) and np.ptp(weights[0]) > 0
    )


def test_max_seconds_restricts_the_search(empty: Path) -> None:
    project = three(lay_out(empty, "binary"))
    with pytest.raises(UserError, match="exp001 has no measured latency"):
        made(project, "method: greedy\nmax_seconds: 5")
    for i, cost in enumerate((0.03, 0.01, 0.002)):
        folder = paths.fold_folder(f"exp00{i + 1}", 0, 0)
        folder.mkdir(parents=True)
        artifacts.write_json(folder / latency.FILE, {"test": cost})
    assert latency.seconds_per_image("exp001") == 0.03
    for method in SEARCHED:
        extra = "trials: 20" if method == "optuna" else ""
        record = made(
            project, f"method: {method}\nmax_seconds: 2.0\n{extra}"
        )  # 150 test rows: 4.5, 1.5 and 0.3 seconds
        used = {each["address"] for each in record["members"] if each["weight"]}
        assert "exp001" not in used and used, method
        assert average.leaves(recipe_of("blend001")) == sorted(used)
    with pytest.raises(UserError, match="no member is fast enough"):
        made(project, "method: greedy\nmax_seconds: 0.01")


@pytest.mark.parametrize("method", SEARCHED)
def test_classes_and_targets_share_one_budget(empty: Path, method: str) -> None:
    """Each class and target has another best member; the budget is two members."""
    seconds = weight_search.Budget([1.0, 1.0, 1.0], 2.0)
    random = np.random.default_rng(0)
    hot = np.eye(3)[random.integers(0, 3, 300)]
    stored = [
        (hot * [[6 if c == i else 0.5 for c in range(3)]]) + random.normal(0, 1, hot.shape) for i in range(3)
    ]
    options: dict[str, Any] = {"members": ["a", "b", "c"], "method": method}
    if method == "optuna":
        options["trials"] = 25
    classes = Head("t", "multiclass", tuple("abc"), ("t",), tuple("abc"))
    metric, fold = metrics.find("log_loss"), np.zeros(300, np.int64)
    frame = pd.DataFrame({"row": range(300)})
    given = methods.TrainingData(classes, metric, "probability", stored, hot.argmax(axis=1), frame, fold)
    free = methods.fit(Blend(**options, per_class=True), given, weight_search.unlimited(3))
    tight = methods.fit(Blend(**options, per_class=True), given, seconds)
    assert methods.used_members(free, 3).all() and 0 < methods.used_members(tight, 3).sum() <= 2

    project = lay_out(empty, "binary", metric="log_loss")
    columns = project.samples.frame["target.label"].to_numpy()
    heads, rows = [], np.arange(400)
    budgets, chosen = weight_search.Budgets(seconds, {}), np.zeros(3, bool)
    for i in range(3):
        project.samples.frame[f"target.{i}"] = columns
        heads.append(Head(str(i), "binary", (str(i),), (f"target.{i}",), ("0", "1")))
    fold = project.folds.assignment[0][rows]
    context = Context(project.cfg, project.samples, project.folds, Blend(**options), rows, fold, {})
    for i, head in enumerate(heads):
        parts = [(2.0 * columns[rows] - 1)[:, None] * (3 if k == i else -1) for k in range(3)]
        parts = [part + random.normal(size=part.shape) for part in parts]
        with tqdm(disable=True) as bar:
            found, *_ = fit.fit_head(context, head, parts, budgets, bar)
        chosen |= methods.used_members(found.params, 3)
    assert 0 < chosen.sum() <= 2
    assert len(budgets.left) == 6  # one for each of five folds and one for all rows


def test_metadata_and_target_encoding(empty: Path) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    frame = project.samples.frame
    random = np.random.default_rng(0)
    helpful = np.where(random.random(len(frame)) < 0.8, frame["target.label"], 1 - frame["target.label"])
    frame["meta.pen"] = np.where(helpful > 0, "fine", "bold")
    frame["meta.ink"] = helpful + random.normal(0, 0.1, len(frame))
    from comp.engine.data import folds, samples

    samples.save(frame, project.samples.heads)
    lines = project.folds.frame
    table = samples.load()
    folds.save(lines, {k: v for k, v in project.folds.meta.items() if k != "hash"} | {"samples": table.hash})
    project = project._replace(samples=table, folds=folds.load(table))
    for i in range(3):
        member(project, f"exp00{i + 1}", noise=4.0, seed=10 + i)
    plain = made(project, "method: logistic")
    for text in ("metadata: [pen]", "metadata: [ink]", "encoded: [pen]"):
        record = made(project, f"method: logistic\n{text}")
        assert record["oof"] < plain["oof"] - 0.05, text
    with pytest.raises(UserError, match=r"no column writer; competition\.metadata lists pen, ink"):
        made(project, "method: ridge\nmetadata: [writer]")


MISTAKES = {
    "members: [exp001]\nmethod: mean\nbags: 3": "bags: no effect with method mean",
    "members: [exp001]\nmethod: greedy\nbag_of: rows": "bag_of: no effect without bags",
    "members: [exp001]\nmethod: greedy\nbags: 2\nbag_of: folds": "bags: no effect with bag_of: folds",
    "members: [exp001]\nmethod: greedy\nimages: 7": "images: no effect without max_seconds",
    "members: [exp001]\nmethod: mean\nspace: rank": "space: rank is for",
    "members: [exp001]\nmethod: ridge\nspace: geometric": "not an input of a stacker",
    "members: ['score>x']\nmethod: mean": "x is not a number",
    "members: ['model~nothing']\nmethod: mean": "no run matches; there are exp001",
    "members: ['exp001:snapshots']\nmethod: mean": "no member matches",
    "members: ['size>3']\nmethod: mean": "no field size",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(empty: Path, text: str) -> None:
    project = lay_out(empty, "binary")
    member(project, "exp001")
    declare(project, "blend001", text)
    with pytest.raises(UserError) as caught:
        blend("blend001")
    assert len(caught.value.lines) == 1 and MISTAKES[text] in caught.value.lines[0], caught.value.lines
    assert caught.value.lines[0].startswith("configs/ensembles/blend001.yaml")


def test_filters_match_runs(empty: Path) -> None:
    project = three(lay_out(empty, "binary"))
    member(project, "exp001:seed1")
    scores = {
        a: artifacts.read_json(bank.folder(a) / "score.json")["oof"] for a in ("exp001", "exp002", "exp003")
    }
    middle = sorted(scores.values())[1]
    assert member_filter.addresses(f"score>={middle}") == [a for a, s in scores.items() if s >= middle]
    assert member_filter.addresses(f"task=binary score<{middle}") == [
        a for a, s in scores.items() if s < middle
    ]
    assert member_filter.addresses("model~res") == list(scores)
    assert member_filter.addresses("exp001:seeds") == ["exp001:seed1"]
    made(project, "method: mean")
    everything = [*scores, "exp001:seed1", "blend001"]
    assert member_filter.matching("task=binary model~res", everything) == everything
    assert member_filter.matching("model~vit", everything) == []
    assert "blend001" not in member_filter.addresses("model~res"), "members of an ensemble are runs"


def test_weights_per_label(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 20)
    project = lay_out(empty, "multilabel")
    for i in range(3):  # each predicts one label well
        member(project, f"exp00{i + 1}", noise=4.0, seed=i)
        for kind in bank.KINDS:
            stored = load(project, f"exp00{i + 1}", kind)
            values = stored.heads["label"].copy()
            values[:, i] += (8 * project.samples.targets(project.head)[stored.row, i] - 4).astype(np.float32)
            fold = None if stored.fold is None else stored.fold.copy()
            bank.write(
                bank.folder(f"exp00{i + 1}") / f"{kind}.arrow",
                type(stored)(stored.row.copy(), fold, {"label": values}, stored.meta),
            )
    table = project.samples.frame
    shared = made(project, "method: greedy")["oof"]
    for method in ("greedy", "slsqp"):
        assert made(project, f"method: {method}\nper_class: true")["oof"] > shared
        weights = np.array(recipe_of("blend001")["params"]["label"]["weights"])
        assert weights.argmax(axis=0).tolist() == [0, 1, 2] and weights.sum(axis=0) == pytest.approx(
            np.ones(3)
        )
    one = methods._one_vs_rest(
        methods.TrainingData(
            project.head, metrics.find("mean_column_auc"), "probability", [np.zeros((4, 3))],
            np.array([[np.nan, 1, 0], [1, 1, 0], [0, 1, 1], [np.nan, 1, 0]]), table.iloc[:4], np.arange(4),
        ), 0, "ant",
    )  # fmt: skip
    assert one.truth.tolist() == [1, 0] and len(one.parts[0]) == 2 and one.fold.tolist() == [1, 2]
