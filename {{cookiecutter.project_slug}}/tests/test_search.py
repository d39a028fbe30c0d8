"""Searched, stacked and calibrated ensembles: equal to algorithms written out, honest on random labels, the same bytes again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from banked import HEADS, Project, declare, lay_out, member
from sklearn.datasets import make_classification
from sklearn.ensemble import StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, f1_score, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier

from comp import bank, metrics, store
from comp.config import Refused
from comp.ensemble import (
    after,
    average,
    choose,
    fast,
    fitted,
    fitting,
    latency,
    methods,
    search,
    smooth,
    stack,
)
from comp.ensemble.blend import FILES, blend
from comp.ensemble.declare import AVERAGES, SEARCHED, STACKED, Blend
from comp.tasks import Head, log_softmax, logit, softmax

FIVE = tuple("abcde")
BINARY = Head("t", "binary", ("t",), ("t",), ("0", "1"))
CLASSES = Head("t", "multiclass", FIVE, ("t",), FIVE)
LABELS = Head("t", "multilabel", tuple("abc"), tuple("abc"))
GRADES = Head("t", "ordinal", ("t",), ("t",), FIVE)


def kappa(truth: Any, value: Any) -> float:
    return float(cohen_kappa_score(truth, np.clip(np.rint(value[:, 0]), 0, 4), weights="quadratic"))


def by_column(call: Any) -> Any:
    """The mean over labels of a function of (truth, answer)."""
    return lambda t, p: float(np.mean([call(t[:, k], p[:, k]) for k in range(t.shape[1])]))


Call = Callable[[Any, Any], float]
NAIVE: dict[str, tuple[Head, str, Call]] = {
    "auc": (BINARY, "roc_auc", lambda t, p: float(roc_auc_score(t, p[:, 0]))),
    "log_loss": (BINARY, "log_loss", lambda t, p: -float(log_loss(t, p[:, 0]))),
    "log_loss_5": (CLASSES, "log_loss", lambda t, p: -float(log_loss(t, p))),
    "auc_labels": (LABELS, "mean_column_auc", by_column(roc_auc_score)),
    "log_loss_labels": (LABELS, "mean_column_log_loss", lambda t, p: -by_column(log_loss)(t, p)),
    "accuracy_5": (CLASSES, "accuracy", lambda t, p: float((p.argmax(axis=1) == t).mean())),
    "f1": (BINARY, "f1", lambda t, p: float(f1_score(t, p[:, 0] >= 0.5))),
    "f1_macro_5": (CLASSES, "f1_macro", lambda t, p: float(f1_score(t, p.argmax(axis=1), average="macro"))),
    "qwk": (GRADES, "qwk", kappa),
    "rmse": (GRADES, "rmse", lambda t, p: -float(np.sqrt(((p[:, 0] - t) ** 2).mean()))),
}


def cases(head: Head, count: int, rows: int, seed: int) -> tuple[Any, list[Any]]:
    random = np.random.default_rng(seed)
    if head.task == "multilabel":
        truth = random.integers(0, 2, (rows, 3)).astype(float)
        noise = [random.normal(size=truth.shape) * (0.7 + i % 4 / 3) for i in range(count)]
        return truth, [(2 * truth - 1 + each).astype(np.float32) for each in noise]
    truth = random.integers(0, 2 if head.task == "binary" else 5, rows)
    base = (
        np.eye(5)[truth] * 1.5
        if head.task == "multiclass"
        else (truth * (2.0 if head.task == "binary" else 1.0))[:, None]
    )
    base = base - (1.0 if head.task == "binary" else 0.0)
    said = [base + random.normal(size=base.shape) * (0.7 + i % 4 / 3) for i in range(count)]
    return truth.astype(float), [
        (log_softmax(s) if head.task == "multiclass" else s).astype(np.float32) for s in said
    ]


def naive_greedy(truth: Any, shown: list[Any], call: Call, rounds: int) -> Any:
    """Caruana's selection as one would write it down: every candidate by scikit-learn."""
    total, count, best, weights = 0.0, np.zeros(len(shown)), -np.inf, np.zeros(len(shown))
    for size in range(1, rounds + 1):
        scores = np.array([call(truth, (total + each) / size) for each in shown])
        pick = int(np.flatnonzero(scores >= scores.max() - search.EQUAL)[0])
        total, reached = total + shown[pick], scores[pick]
        count[pick] += 1
        if reached > best + search.EQUAL:
            best, weights = reached, count / size
    return weights


@pytest.mark.parametrize("name", NAIVE)
def test_greedy_picks_what_the_naive_search_picks(name: str) -> None:
    head, metric, call = NAIVE[name]
    for seed in range(2 if head is LABELS else 6):
        truth, said = cases(head, 9, 150, seed)
        lens = fast.lens(metrics.find(metric), head, "probability", truth)
        taken = [lens.take(each) for each in said]
        ours = search.greedy(lens, taken, 10, search.free(len(said)))
        shown = [head.row.probability(each.astype(float)) for each in said]
        assert ours == pytest.approx(naive_greedy(truth, shown, call, 10), abs=1e-12)
        blended = sum(w * s for w, s in zip(ours, shown, strict=True))
        found = lens.exact(search._sum(taken, ours))
        assert found == pytest.approx(call(truth, blended), abs=1e-6)


@pytest.mark.parametrize("negative", [False, True])
def test_hill_climbing_as_written_out(negative: bool) -> None:
    for seed in range(3):
        truth, said = cases(BINARY, 6, 200, seed)
        shown = [BINARY.row.probability(each.astype(float))[:, 0] for each in said]
        lens = fast.lens(metrics.find("roc_auc"), BINARY, "probability", truth, signed=negative)
        ours = search.hill(lens, [lens.take(each) for each in said], 0.1, negative, search.free(len(said)))
        order = np.argsort([-roc_auc_score(truth, each) for each in shown], kind="stable")
        now, left = shown[order[0]], list(order[1:])
        while left:
            steps = np.arange(-0.5 if negative else 0.1, 0.51, 0.1)
            tried = [(roc_auc_score(truth, (1 - w) * now + w * shown[i]), i, w) for i in left for w in steps]
            best = max(score for score, *_ in tried)
            if best <= roc_auc_score(truth, now) + search.EQUAL:
                break
            _, pick, step = next(each for each in tried if each[0] >= best - search.EQUAL)
            now = (1 - step) * now + step * shown[pick]
            left.remove(pick)
        assert sum(w * s for w, s in zip(ours, shown, strict=True)) == pytest.approx(now, abs=1e-6)
        assert ours.sum() == pytest.approx(1) and (negative or ours.min() >= 0)


@pytest.mark.parametrize(
    ("head", "space"),
    [(head, space) for head in (BINARY, CLASSES, LABELS) for space in ("probability", "logit")],
)
def test_continuous_weights_are_those_of_a_plain_solver(head: Head, space: str) -> None:
    """The loss is convex: an independent descent on numbers of scikit-learn's loss ends in the same place."""
    from scipy.optimize import minimize

    truth, said = cases(head, 4, 300, 0)
    ours = search.slsqp(smooth.loss(said, head, space, truth), 4, negative=False)
    spoken = [fast.moved(each, head, space) for each in said]

    def plain(w: Any) -> float:
        said = fast.shown(sum(a * b for a, b in zip(w, spoken, strict=True)), head, space)
        return by_column(log_loss)(truth, said) if head is LABELS else float(log_loss(truth, said.squeeze()))

    free = minimize(
        lambda v: plain(softmax(np.append(v, 0)[None])[0]), np.zeros(3), method="BFGS", options={"gtol": 1e-9}
    )
    assert plain(ours) <= free.fun + 1e-9
    assert plain(ours) == pytest.approx(free.fun, abs=1e-6)
    value, slope = smooth.loss(said, head, space, truth)(ours)
    assert value == pytest.approx(plain(ours), abs=1e-7)
    step = np.array([1e-6, -1e-6, 0, 0])
    assert slope @ step == pytest.approx(plain(ours + step / 2) - plain(ours - step / 2), abs=1e-10)


@pytest.mark.parametrize("classes", [2, 3])
def test_stacking_equals_scikit_learns_on_the_same_splits(classes: int) -> None:
    x, y = make_classification(240, 8, n_informative=5, n_classes=classes, random_state=0)
    splits = list(StratifiedKFold(4, shuffle=True, random_state=0).split(x, y))
    bases = [("nb", GaussianNB()), ("tree", DecisionTreeClassifier(max_depth=3, random_state=0))]
    theirs = StackingClassifier(bases, LogisticRegression(C=1.0, max_iter=5000, tol=1e-8), cv=splits).fit(
        x, y
    )
    names = FIVE[:classes]
    head = (
        Head("t", "binary", ("t",), ("t",), names)
        if classes == 2
        else Head("t", "multiclass", names, ("t",), names)
    )
    oof = [cross_val_predict(model, x, y, cv=splits, method="predict_proba") for _, model in bases]
    stored = [
        np.log(np.clip(p, 1e-300, None)) if classes > 2 else logit(np.clip(p[:, 1:], 1e-15, 1 - 1e-15))
        for p in oof
    ]
    params = stack.fit(
        "logistic", head, stored, y.astype(float), None, np.zeros(len(y), np.int64), space="probability"
    )
    assert np.ravel(np.transpose(params["coef"])) == pytest.approx(
        np.ravel(theirs.final_estimator_.coef_), abs=1e-5
    )
    whole = [model.predict_proba(x) for model in theirs.estimators_]
    again = [
        np.log(np.clip(p, 1e-300, None)) if classes > 2 else logit(np.clip(p[:, 1:], 1e-15, 1 - 1e-15))
        for p in whole
    ]
    ours = head.row.probability(fitted.predict(params, again, head, "probability"))
    wanted = theirs.predict_proba(x)
    assert np.abs(ours - (wanted[:, 1:] if classes == 2 else wanted)).max() < 1e-6


@pytest.mark.parametrize("method", [m for m in STACKED if m != "lightgbm"])
def test_a_stacker_of_labels_is_one_of_each(method: str) -> None:
    """Every label as if it were alone, taught by the rows where it is known; one that no row has gets a small share."""
    truth, said = cases(LABELS, 3, 200, 0)
    truth[::7, 1], truth[:, 2] = np.nan, 0.0
    fold = np.zeros(200, np.int64)
    params = stack.fit(method, LABELS, said, truth, None, fold, strength=1e-3)
    p = LABELS.row.probability(fitted.predict(params, said, LABELS, "logit"))
    assert p.shape == truth.shape and p[:, 2].max() < 0.01
    known = ~np.isnan(truth[:, 1])
    again = stack.fit(
        method, LABELS, [s[known] for s in said], truth[known], None, fold[known], strength=1e-3
    )
    theirs = LABELS.row.probability(fitted.predict(again, said, LABELS, "logit"))
    assert p[:, 1] == pytest.approx(theirs[:, 1], abs=0.05 if method == "mlp" else 1e-3)
    for k in (0, 1):
        assert roc_auc_score(truth[known, k], p[known, k]) > 0.97
        assert log_loss(truth[known, k], p[known, k]) < 0.3
    if method == "logistic":
        x = np.concatenate(said, axis=1).astype(float)
        model = LogisticRegression(C=1e3, max_iter=5000, tol=1e-8).fit(x, truth[:, 0])
        assert p[:, 0] == pytest.approx(np.clip(model.predict_proba(x)[:, 1], 1e-6, 1 - 1e-6), abs=1e-6)


def test_exact_auc_with_ties_and_signs() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        truth = random.integers(0, 2, 60)
        truth[:2] = 0, 1
        value = random.integers(-4, 5, 60) / 3.0
        order = np.argsort(-truth, kind="stable")
        assert fast.exact_auc(value[order], int(truth.sum())) == pytest.approx(
            roc_auc_score(truth, value), abs=1e-12
        )


def test_memory_of_a_search_is_less_than_twice_the_predictions() -> None:
    import tracemalloc

    for name in ("auc", "log_loss", "f1_macro_5", "qwk"):
        head, metric, _ = NAIVE[name]
        truth, said = cases(head, 60, 20_000, 0)
        tracemalloc.start()
        lens = fast.lens(metrics.find(metric), head, "probability", truth)
        search.greedy(lens, [lens.take(each) for each in said], 2, search.free(60))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * sum(each.nbytes for each in said), name


# --- whole ensembles -----------------------------------------------------------------------------------------------------

EXTRA = {"weighted": "weights: [3, 1, 2]", "optuna": "trials: 15", "lightgbm": ""}


def three(project: Project) -> Project:
    for i, noise in enumerate((1.2, 1.5, 2.0)):
        member(project, f"exp00{i + 1}", noise=noise, seed=10 + i)
    return project


def made(
    project: Project, text: str, members: str = "[exp001, exp002, exp003]", name: str = "blend001"
) -> dict[str, Any]:
    declare(project, name, f"members: {members}\n{text}")
    return blend(name)


def load(project: Project, address: str, kind: str = "oof") -> Any:
    return bank.load(address, kind, project.samples, project.folds)


def recipe_of(name: str) -> dict[str, Any]:
    return json.loads((store.ensemble_folder(name) / "apply.json").read_text())


@pytest.mark.parametrize("task", HEADS)
def test_every_method_leaves_what_is_valid_and_applies_row_by_row(empty: Path, task: str) -> None:
    project = three(lay_out(empty, task))
    every = [
        *AVERAGES,
        *SEARCHED,
        *(m for m in STACKED if HEADS[task].row.space == "logit" or m != "logistic"),
    ]
    if not has("lightgbm"):
        every.remove("lightgbm")
    given = {a: load(project, a, "test").heads for a in ("exp001", "exp002", "exp003")}
    for method in every:
        record = made(project, f"method: {method}\n{EXTRA.get(method, '')}")
        recipe, said = recipe_of("blend001"), load(project, "blend001", "test")
        p = said.probability(project.head)
        assert np.isfinite(p).all() and p.shape[1] == len(project.head.outputs), method
        if project.head.row.space == "logit":
            assert p.min() >= 0 and p.max() <= 1
        if task == "multiclass":
            assert np.allclose(p.sum(axis=1), 1, atol=1e-12)
        for row in range(0, len(said.row), 37):
            alone = {a: {"label": heads["label"][row : row + 1]} for a, heads in given.items()}
            assert (average.apply(recipe, alone)["label"] == said.heads["label"][row : row + 1]).all(), method
        assert (record["in_sample"] is not None) == (method in SEARCHED + STACKED)
        assert record["interval"]["low"] < record["oof"] < record["interval"]["high"], method


def has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_the_oof_predictions_of_a_fitted_ensemble_are_those_of_other_folds(empty: Path) -> None:
    """Change the labels of one fold: what is said of its own rows must not move."""
    project = three(lay_out(empty, "binary", metric="log_loss"))
    for method in ("greedy", "slsqp", "logistic"):
        before = made(project, f"method: {method}")
        honest = load(project, "blend001").heads["label"].copy()
        fold = load(project, "blend001").fold
        frame = project.samples.frame
        truth = frame["target.label"].copy()
        rows = np.flatnonzero(fold == 2)
        frame.loc[frame.index[rows], "target.label"] = 1 - truth.iloc[rows]
        from comp import config, score
        from comp.ensemble import declare as declared_
        from comp.ensemble import fitting
        from comp.ensemble.blend import sets

        declared = declared_.read("blend001")
        cfg = config.load(store.root(), "base").config
        oof = sets(declared, "oof", project.samples, project.folds)
        test = sets(declared, "test", project.samples, project.folds)
        again = fitting.make(cfg, declared.blend, project.samples, project.folds, oof, test, {}, {})
        assert (again.honest["label"][fold == 2] == honest[fold == 2]).all(), method
        assert (again.honest["label"][fold != 2] != honest[fold != 2]).any(), method
        frame["target.label"] = truth
        assert before["oof"] is not None and score is not None


def test_a_second_level_learns_from_members_that_are_fitted_again_without_the_fold(empty: Path) -> None:
    from comp import config
    from comp.ensemble import blend as blending
    from comp.ensemble import declare as declared_

    project = three(lay_out(empty, "binary", metric="log_loss"))
    declare(project, "fitted", "members: [exp001, exp002]\nmethod: logistic\nafter: [temperature]")
    declare(project, "mean", "members: [fitted, exp003]\nmethod: mean")
    declare(project, "blend001", "members: [mean, fitted, exp003]\nmethod: greedy")
    for name in ("fitted", "mean", "blend001"):
        blend(name)
    cfg, declared = config.load(store.root(), "base").config, declared_.read("blend001")
    refits = blending.refits(cfg, declared, project.samples, project.folds)
    assert list(refits) == ["mean", "fitted"]  # what no label had a hand in stays as it is
    stored, rows = load(project, "mean"), np.arange(400)
    assert np.allclose(refits["mean"](rows)["label"], stored.heads["label"], atol=1e-6)
    others = np.flatnonzero(stored.fold != 0)
    alone = refits["mean"](others)["label"]
    assert alone.shape == (320, 1) and not np.allclose(alone, stored.heads["label"][others], atol=1e-6)
    declare(project, "fitted", "members: [exp001, exp002]\nmethod: ridge")
    with pytest.raises(Refused, match=r"members: fitted is fitted again .*: comp ensemble fitted"):
        blend("blend001")


def test_a_search_that_overfits_says_so_and_recommends_the_simpler(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = lay_out(empty, "binary")
    for i in range(12):
        member(project, f"exp{i:03d}", noise=1e3, seed=i)  # nobody knows anything
    record = made(project, "method: hill\nnegative: true", "['name~exp']")
    assert record["in_sample"] > record["oof"] + 0.02
    out = capsys.readouterr().out
    assert "of it was not there" in out and "recommended: " in out and "recommended: blend001" not in out
    assert len(record["members"]) == 12


@pytest.mark.parametrize("method", ["greedy", "logistic", "ridge"])
def test_two_levels_and_snapshots(empty: Path, method: str) -> None:
    project = three(lay_out(empty, "multiclass", metric="log_loss"))
    for i in range(3):
        member(project, f"exp003:snap{i + 1}", noise=2.0 - i / 3, seed=40 + i)
    made(project, f"method: {method}")
    made(project, "method: slsqp", "['exp003:snapshots']", "blend002")
    made(project, "method: snapshots", "['exp003:snapshots']", "blend003")
    weights = [each["weight"] for each in store.read_json(bank.folder("blend003") / "score.json")["members"]]
    assert weights == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    record = made(project, "method: logistic", "[blend001, blend002, exp001]", "blend004")
    assert record["oof"] < 0.8 and set(average.leaves(recipe_of("blend004"))) <= {
        "exp001", "exp002", "exp003", "exp003:snap1", "exp003:snap2", "exp003:snap3"
    }  # fmt: skip
    said = load(project, "blend004", "test")
    given = {a: load(project, a, "test").heads for a in average.leaves(recipe_of("blend004"))}
    assert (average.apply(recipe_of("blend004"), given)["label"] == said.heads["label"]).all()


def test_weights_per_class_and_bags(empty: Path) -> None:
    project = three(lay_out(empty, "multiclass", metric="log_loss"))
    for text in (
        "method: slsqp\nper_class: true",
        "method: greedy\nbags: 4",
        "method: greedy\nbags: 3\nbag_of: rows",
    ):
        record = made(project, text)
        assert sum(each["weight"] for each in record["members"]) == pytest.approx(1)
    made(project, "method: slsqp\nper_class: true")
    weights = np.array(recipe_of("blend001")["params"]["label"]["weights"])
    assert (
        weights.shape[1] == 3 and weights.sum(axis=0) == pytest.approx(np.ones(3)) and np.ptp(weights[0]) > 0
    )


def test_a_ceiling_on_time_acts_inside_the_search(empty: Path) -> None:
    project = three(lay_out(empty, "binary"))
    with pytest.raises(Refused, match="exp001 has no measured latency"):
        made(project, "method: greedy\nmax_seconds: 5")
    for i, cost in enumerate((0.03, 0.01, 0.002)):
        folder = store.fold_folder(f"exp00{i + 1}", 0, 0)
        folder.mkdir(parents=True)
        store.write_json(folder / latency.FILE, {"test": cost})
    assert latency.of("exp001") == 0.03
    for method in SEARCHED:
        extra = "trials: 20" if method == "optuna" else ""
        record = made(
            project, f"method: {method}\nmax_seconds: 2.0\n{extra}"
        )  # 150 test rows: 4.5, 1.5 and 0.3 seconds
        used = {each["address"] for each in record["members"] if each["weight"]}
        assert "exp001" not in used and used, method
        assert average.leaves(recipe_of("blend001")) == sorted(used)
    with pytest.raises(Refused, match="not even one member fits"):
        made(project, "method: greedy\nmax_seconds: 0.01")


@pytest.mark.parametrize("method", SEARCHED)
def test_classes_and_targets_share_one_ceiling(empty: Path, method: str) -> None:
    """Each class, and each target, has a best member of its own; there is time for two."""
    seconds = search.Budget([1.0, 1.0, 1.0], 2.0)
    random = np.random.default_rng(0)
    hot = np.eye(3)[random.integers(0, 3, 300)]
    said = [
        (hot * [[6 if c == i else 0.5 for c in range(3)]]) + random.normal(0, 1, hot.shape) for i in range(3)
    ]
    options: dict[str, Any] = {"members": ["a", "b", "c"], "method": method}
    if method == "optuna":
        options["trials"] = 25
    classes = Head("t", "multiclass", FIVE[:3], ("t",), FIVE[:3])
    metric, fold = metrics.find("log_loss"), np.zeros(300, np.int64)
    frame = pd.DataFrame({"row": range(300)})
    given = methods.Teaching(classes, metric, "probability", said, hot.argmax(axis=1), frame, fold)
    free = methods.fit(Blend(**options, per_class=True), given, search.free(3))
    tight = methods.fit(Blend(**options, per_class=True), given, seconds)
    assert methods.used(free, 3).all() and 0 < methods.used(tight, 3).sum() <= 2

    project = lay_out(empty, "binary", metric="log_loss")
    columns = project.samples.frame["target.label"].to_numpy()
    heads, rows = [], np.arange(400)
    budgets, chosen = search.Budgets(seconds, {}), np.zeros(3, bool)
    for i in range(3):
        project.samples.frame[f"target.{i}"] = columns
        heads.append(Head(str(i), "binary", (str(i),), (f"target.{i}",), ("0", "1")))
    ground = fitting.Ground(
        project.cfg,
        Blend(**options),
        project.samples,
        project.folds,
        rows,
        project.folds.of_sample[0][rows],
        {},
    )
    for i, head in enumerate(heads):
        parts = [(2.0 * columns[rows] - 1)[:, None] * (3 if k == i else -1) for k in range(3)]
        parts = [part + random.normal(size=part.shape) for part in parts]
        params, *_ = fitting._fitted(ground, head, parts, budgets)
        chosen |= methods.used(params, 3)
    assert 0 < chosen.sum() <= 2
    assert len(budgets.left) == 6  # of five folds and of all rows, each its own


def test_metadata_and_target_means(empty: Path) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    frame = project.samples.frame
    random = np.random.default_rng(0)
    helpful = np.where(random.random(len(frame)) < 0.8, frame["target.label"], 1 - frame["target.label"])
    frame["meta.pen"] = np.where(helpful > 0, "fine", "bold")
    frame["meta.ink"] = helpful + random.normal(0, 0.1, len(frame))
    from comp import folds, samples

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
    with pytest.raises(Refused, match=r"no column writer; competition\.metadata names pen, ink"):
        made(project, "method: ridge\nmetadata: [writer]")


def test_calibration_is_kept_only_where_it_gains(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    member(project, "exp001", noise=2.0)
    folder = bank.folder("exp001")
    for kind in bank.KINDS:  # five times too sure
        said = load(project, "exp001", kind)
        loud = {"label": said.heads["label"] * 5}
        bank.write(
            folder / f"{kind}.arrow",
            type(said)(said.row.copy(), None if said.fold is None else said.fold.copy(), loud, said.meta),
        )
    sure = made(project, "method: mean", "[exp001]")["oof"]
    calm = {}
    for step in ("temperature", "platt", "isotonic"):
        calm[step] = made(project, f"method: mean\nafter: [{step}]", "[exp001]")["oof"]
        assert calm[step] < sure - 0.1, step
        assert recipe_of("blend001")["after"]["label"]
    made(project, "method: mean\nafter: [temperature, isotonic]", "[exp001]")
    out = capsys.readouterr().out
    assert "isotonic: left out, log_loss" in out and "temperature: kept, log_loss" in out
    assert len(recipe_of("blend001")["after"]["label"]) == 1


@pytest.mark.parametrize(("task", "metric"), [("binary", "f1"), ("multiclass", "f1_macro")])
def test_thresholds_move_labels_where_it_gains(empty: Path, task: str, metric: str) -> None:
    project = lay_out(empty, task, metric=metric)
    member(project, "exp001", noise=1.5)
    folder = bank.folder("exp001")
    for kind in bank.KINDS:  # one class is never said
        said = load(project, "exp001", kind)
        shifted = said.heads["label"].copy()
        shifted[:, 0] -= 3.0
        bank.write(
            folder / f"{kind}.arrow",
            type(said)(
                said.row.copy(),
                None if said.fold is None else said.fold.copy(),
                {"label": shifted},
                said.meta,
            ),
        )
    before = made(project, "method: mean", "[exp001]")["oof"]
    assert made(project, "method: mean\nafter: [thresholds]", "[exp001]")["oof"] > before + 0.1


def test_prior_correction_finds_the_shift_of_test(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    truth = (random.random(4000) < 0.8).astype(float)
    own = (truth * 2 - 1 + random.normal(size=4000))[:, None] * 2  # calibrated where both are as frequent
    step = after.prior(own, np.array([0.5, 0.5]), BINARY)
    assert step["shares"][1] == pytest.approx(0.8, abs=0.03)
    corrected = after.apply(step, own, BINARY)
    assert log_loss(truth, BINARY.row.probability(corrected)[:, 0]) < log_loss(
        truth, BINARY.row.probability(own)[:, 0]
    )
    project = three(lay_out(empty, "binary", metric="log_loss"))
    for kind in ("prior", "rank"):
        plain = made(project, "method: mean")["oof"]
        assert made(project, f"method: mean\ncorrect: {kind}")["oof"] == plain, "OOF rows go without"
        assert f"correct: {kind}" in capsys.readouterr().out


MISTAKES = {
    "members: [exp001]\nmethod: mean\nbags: 3": "bags: has no effect with method: mean",
    "members: [exp001]\nmethod: greedy\nbag_of: rows": "bag_of: has no effect without bags",
    "members: [exp001]\nmethod: greedy\nimages: 7": "images: has no effect without max_seconds",
    "members: [exp001]\nmethod: mean\nspace: rank": "space: rank is for",
    "members: [exp001]\nmethod: ridge\nspace: geometric": "no input of a stacker",
    "members: ['score>x']\nmethod: mean": "x is no number",
    "members: ['model~nothing']\nmethod: mean": "no run is like that; there are exp001",
    "members: ['exp001:snapshots']\nmethod: mean": "there are none",
    "members: ['size>3']\nmethod: mean": "there is no field size",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(empty: Path, text: str) -> None:
    project = lay_out(empty, "binary")
    member(project, "exp001")
    declare(project, "blend001", text)
    with pytest.raises(Refused) as caught:
        blend("blend001")
    assert len(caught.value.lines) == 1 and MISTAKES[text] in caught.value.lines[0], caught.value.lines
    assert caught.value.lines[0].startswith("configs/ensembles/blend001.yaml")


def test_filters_choose_runs(empty: Path) -> None:
    project = three(lay_out(empty, "binary"))
    member(project, "exp001:seed1")
    scores = {
        a: store.read_json(bank.folder(a) / "score.json")["oof"] for a in ("exp001", "exp002", "exp003")
    }
    middle = sorted(scores.values())[1]
    assert choose.addresses(f"score>={middle}") == [a for a, s in scores.items() if s >= middle]
    assert choose.addresses(f"task=binary score<{middle}") == [a for a, s in scores.items() if s < middle]
    assert choose.addresses("model~res") == list(scores)
    assert choose.addresses("exp001:seeds") == ["exp001:seed1"]


# --- killed --------------------------------------------------------------------------------------------------------------


def killed_or_done(work: Callable[[], object], event: int) -> int:
    """In a process of its own, which kills itself at its n-th rename; 0: it got through."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, [event]

        def counted(*names: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = counted  # type: ignore[assignment]
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    "text", ["method: greedy\nafter: [temperature]", "method: mlp", "method: optuna\ntrials: 10"]
)
def test_killed_at_any_rename_a_fitted_ensemble_ends_in_the_same_bytes(empty: Path, text: str) -> None:
    project = three(lay_out(empty, "binary", metric="log_loss"))
    made(project, text)
    folder = store.ensemble_folder("blend001")
    names = [*FILES, store.MANIFEST]
    whole = {name: (folder / name).read_bytes() for name in names}
    kills = 0
    for event in range(0, 12, 3 if text.startswith("method: greedy") else 7):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        kills += killed_or_done(lambda: made(project, text) and None, event) == signal.SIGKILL
        made(project, text)
        assert {name: (folder / name).read_bytes() for name in names} == whole, event
    assert kills >= 2


@pytest.mark.slow
def test_killed_at_twenty_random_moments(empty: Path) -> None:
    """Any time, not only at renames: the child is killed after a random share of what the whole command takes."""
    import random
    import time

    project = three(lay_out(empty, "binary", metric="log_loss"))
    chance, folder, names, kills = (
        random.Random(0),
        store.ensemble_folder("blend001"),
        [*FILES, store.MANIFEST],
        0,
    )
    for text in (
        "method: greedy\nbags: 3",
        "method: logistic\nafter: [platt]",
        "method: slsqp",
        "method: rank",
    ):
        began = time.perf_counter()
        made(project, text)
        spent = time.perf_counter() - began
        whole = {name: (folder / name).read_bytes() for name in names}
        for _ in range(5):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            child = os.fork()
            if child == 0:
                made(project, text)
                os._exit(0)
            time.sleep(chance.random() * spent)
            os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] == signal.SIGKILL
            made(project, text)
            assert {name: (folder / name).read_bytes() for name in names} == whole, text
    assert kills >= 12


def test_cut_points_are_kept_only_where_they_gain(empty: Path) -> None:
    """Values that are shrunken to the middle need cuts of their own; values with the right spread are as well rounded."""
    from comp import score

    project = lay_out(empty, "ordinal")
    truth = project.samples.truth(project.head, np.arange(400)).astype(float)
    rows, fold = np.arange(400), np.arange(400) % 5
    metric = metrics.find("qwk")
    for shrunk, fitted_ in ((0.3, True), (1.0, False)):
        value = (1.5 + shrunk * (truth - 1.5) + np.random.default_rng(0).normal(0, 0.1 * shrunk, 400))[
            :, None
        ]
        _, cuts = score.answers(metric, project.head, value, project.samples, project.folds, rows, fold)
        assert cuts is not None and (np.abs(cuts - [0.5, 1.5, 2.5]).max() > 0.1) == fitted_
