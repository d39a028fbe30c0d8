"""Searches and stackers give the results of naive implementations and of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from banked import lay_out
from sklearn.datasets import make_classification
from sklearn.ensemble import StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, f1_score, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier

from comp import metrics
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data import folds, samples
from comp.engine.ensemble import (
    apply,
    average,
    fast_metrics,
    fit,
    gradients,
    spaces,
    stack,
    weight_search,
)
from comp.engine.ensemble.blend_config import STACKED, Blend
from comp.engine.ensemble.context import Setup
from comp.engine.tasks.kinds import Head, log_softmax, logit, softmax

FIVE = tuple("abcde")
BINARY = Head("t", "binary", ("t",), ("t",), ("0", "1"))
CLASSES = Head("t", "multiclass", FIVE, ("t",), FIVE)
LABELS = Head("t", "multilabel", tuple("abc"), tuple("abc"))
GRADES = Head("t", "ordinal", ("t",), ("t",), FIVE)


def kappa(truth: Any, value: Any) -> float:
    return float(cohen_kappa_score(truth, np.clip(np.rint(value[:, 0]), 0, 4), weights="quadratic"))


def by_column(call: Any) -> Any:
    """The mean over labels of a function of (truth, prediction)."""
    return lambda t, p: float(np.mean([call(t[:, k], p[:, k]) for k in range(t.shape[1])]))


Call = Callable[[Any, Any], float]
NAIVE: dict[str, tuple[Head, str, Call]] = {
    "auc": (BINARY, "roc_auc", lambda t, p: float(roc_auc_score(t, p[:, 0]))),
    "log_loss": (BINARY, "log_loss", lambda t, p: -float(log_loss(t, p[:, 0]))),
    "log_loss_5": (CLASSES, "log_loss", lambda t, p: -float(log_loss(t, p))),
    "auc_5": (CLASSES, "roc_auc", lambda t, p: float(roc_auc_score(t, p, multi_class="ovr"))),
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
    stored = [base + random.normal(size=base.shape) * (0.7 + i % 4 / 3) for i in range(count)]
    return truth.astype(float), [
        (log_softmax(s) if head.task == "multiclass" else s).astype(np.float32) for s in stored
    ]


def naive_greedy(truth: Any, shown: list[Any], call: Call, rounds: int) -> Any:
    """Ensemble selection with every candidate scored by scikit-learn."""
    total, count, best, weights = 0.0, np.zeros(len(shown)), -np.inf, np.zeros(len(shown))
    for size in range(1, rounds + 1):
        scores = np.array([call(truth, (total + each) / size) for each in shown])
        pick = int(np.flatnonzero(scores >= scores.max() - weight_search.TOLERANCE)[0])
        total, reached = total + shown[pick], scores[pick]
        count[pick] += 1
        if reached > best + weight_search.TOLERANCE:
            best, weights = reached, count / size
    return weights


@pytest.mark.parametrize("name", NAIVE)
def test_greedy_picks_the_members_of_a_naive_search(name: str) -> None:
    head, metric, call = NAIVE[name]
    for seed in range(2 if head is LABELS or name == "auc_5" else 6):
        truth, stored = cases(head, 9, 150, seed)
        scorer = fast_metrics.fast_scorer(metrics.find(metric), head, "probability", truth)
        extracted = [scorer.extract(each) for each in stored]
        ours = weight_search.greedy(scorer, extracted, 10, weight_search.unlimited(len(stored)))
        shown = [head.spec.to_probability(each.astype(float)) for each in stored]
        assert ours == pytest.approx(naive_greedy(truth, shown, call, 10), abs=1e-12)
        blended = sum(w * s for w, s in zip(ours, shown, strict=True))
        found = scorer.exact(weight_search.weighted_sum(extracted, ours))
        assert found == pytest.approx(call(truth, blended), abs=1e-6)


@pytest.mark.parametrize("negative", [False, True])
def test_hill_climbing_like_a_naive_loop(negative: bool) -> None:
    for seed in range(3):
        truth, stored = cases(BINARY, 6, 200, seed)
        shown = [BINARY.spec.to_probability(each.astype(float))[:, 0] for each in stored]
        scorer = fast_metrics.fast_scorer(
            metrics.find("roc_auc"), BINARY, "probability", truth, signed=negative
        )
        ours = weight_search.hill(
            scorer,
            [scorer.extract(each) for each in stored],
            0.1,
            negative,
            weight_search.unlimited(len(stored)),
        )
        order = np.argsort([-roc_auc_score(truth, each) for each in shown], kind="stable")
        now, left = shown[order[0]], list(order[1:])
        while left:
            steps = np.arange(-0.5 if negative else 0.1, 0.51, 0.1)
            tried = [(roc_auc_score(truth, (1 - w) * now + w * shown[i]), i, w) for i in left for w in steps]
            best = max(score for score, *_ in tried)
            if best <= roc_auc_score(truth, now) + weight_search.TOLERANCE:
                break
            _, pick, step = next(each for each in tried if each[0] >= best - weight_search.TOLERANCE)
            now = (1 - step) * now + step * shown[pick]
            left.remove(pick)
        assert sum(w * s for w, s in zip(ours, shown, strict=True)) == pytest.approx(now, abs=1e-6)
        assert ours.sum() == pytest.approx(1) and (negative or ours.min() >= 0)


@pytest.mark.parametrize(
    ("head", "space"),
    [(head, space) for head in (BINARY, CLASSES, LABELS) for space in ("probability", "logit")],
)
def test_slsqp_weights_are_those_of_another_solver(head: Head, space: str) -> None:
    """The loss is convex: an independent descent on scikit-learn's loss has the same minimum."""
    from scipy.optimize import minimize

    truth, stored = cases(head, 4, 300, 0)
    ours = weight_search.slsqp(gradients.loss(stored, head, space, truth), 4, negative=False)
    spoken = [spaces.to_space(each, head, space) for each in stored]

    def plain(w: Any) -> float:
        stored = spaces.to_prediction(sum(a * b for a, b in zip(w, spoken, strict=True)), head, space)
        return (
            by_column(log_loss)(truth, stored) if head is LABELS else float(log_loss(truth, stored.squeeze()))
        )

    free = minimize(
        lambda v: plain(softmax(np.append(v, 0)[None])[0]), np.zeros(3), method="BFGS", options={"gtol": 1e-9}
    )
    assert plain(ours) <= free.fun + 1e-9
    assert plain(ours) == pytest.approx(free.fun, abs=1e-6)
    value, slope = gradients.loss(stored, head, space, truth)(ours)
    assert value == pytest.approx(plain(ours), abs=1e-7)
    step = np.array([1e-6, -1e-6, 0, 0])
    assert slope @ step == pytest.approx(plain(ours + step / 2) - plain(ours - step / 2), abs=1e-10)


def lone(rows: int) -> pd.DataFrame:
    """A table without groups."""
    return pd.DataFrame({"row": np.arange(rows)})


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
        "logistic", head, stored, y.astype(float), lone(len(y)), np.zeros(len(y), np.int64), space="probability", strength=1.0
    )  # fmt: skip
    assert np.ravel(np.transpose(params["coef"])) == pytest.approx(
        np.ravel(theirs.final_estimator_.coef_), abs=1e-5
    )
    whole = [model.predict_proba(x) for model in theirs.estimators_]
    again = [
        np.log(np.clip(p, 1e-300, None)) if classes > 2 else logit(np.clip(p[:, 1:], 1e-15, 1 - 1e-15))
        for p in whole
    ]
    ours = head.spec.to_probability(apply.predict(params, again, head, "probability"))
    wanted = theirs.predict_proba(x)
    assert np.abs(ours - (wanted[:, 1:] if classes == 2 else wanted)).max() < 1e-6


@pytest.mark.parametrize("method", [m for m in STACKED if m != "lightgbm"])
def test_a_stacker_of_labels_is_one_model_per_label(method: str) -> None:
    """Each label is fitted alone on the rows where it is known; a label without positive rows gets a small
    probability."""
    truth, stored = cases(LABELS, 3, 200, 0)
    truth[::7, 1], truth[:, 2] = np.nan, 0.0
    fold = np.zeros(200, np.int64)
    params = stack.fit(method, LABELS, stored, truth, lone(200), fold, strength=1e-3)
    p = LABELS.spec.to_probability(apply.predict(params, stored, LABELS, "logit"))
    assert p.shape == truth.shape and p[:, 2].max() < 0.01
    known = ~np.isnan(truth[:, 1])
    again = stack.fit(
        method,
        LABELS,
        [s[known] for s in stored],
        truth[known],
        lone(known.sum()),
        fold[known],
        strength=1e-3,
    )
    theirs = LABELS.spec.to_probability(apply.predict(again, stored, LABELS, "logit"))
    assert p[:, 1] == pytest.approx(theirs[:, 1], abs=0.05 if method == "mlp" else 1e-3)
    for k in (0, 1):
        assert roc_auc_score(truth[known, k], p[known, k]) > 0.97
        assert log_loss(truth[known, k], p[known, k]) < 0.3
    if method == "logistic":
        x = np.concatenate(stored, axis=1).astype(float)
        model = LogisticRegression(C=1e3, max_iter=5000, tol=1e-8).fit(x, truth[:, 0])
        assert p[:, 0] == pytest.approx(np.clip(model.predict_proba(x)[:, 1], 1e-6, 1 - 1e-6), abs=1e-6)


@pytest.mark.parametrize("head", [BINARY, CLASSES, LABELS], ids=lambda head: head.task)
def test_fast_auc_equals_the_metric(head: Head) -> None:
    """In every space, with negative weights, unknown labels, and a class without rows."""
    truth, stored = cases(head, 3, 400, 0)
    if head is LABELS:
        truth[::5, 1], truth[:, 2] = np.nan, 0.0
    if head is CLASSES:
        truth[truth == 3] = 4
    weights = np.array([0.7, 0.5, -0.2])
    for space in ("probability", "logit", "geometric"):
        for signed in (False, True):
            metric = metrics.find("mean_column_auc")
            scorer = fast_metrics.fast_scorer(metric, head, space, truth, signed=signed)
            slow = fast_metrics.any_metric(metric, head, space, truth, None, np.array([]))
            shares = weights if signed else np.abs(weights) / np.abs(weights).sum()
            ours, theirs = (
                weight_search.weighted_sum([each_scorer.extract(each) for each in stored], shares)
                for each_scorer in (scorer, slow)
            )
            assert scorer.exact(ours) == pytest.approx(slow.exact(theirs), abs=1e-9), (space, signed)
            assert scorer.approximate(ours.astype(np.float32)) == pytest.approx(scorer.exact(ours), abs=1e-4)
    if head is not BINARY:
        strict = fast_metrics.fast_scorer(metrics.find("roc_auc"), head, "probability", truth)
        assert strict.exact(strict.extract(stored[0]).astype(float)) == -np.inf, (
            "one column has no area at all"
        )


def test_exact_auc_with_ties_and_signs() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        truth = random.integers(0, 2, 60)
        truth[:2] = 0, 1
        value = random.integers(-4, 5, 60) / 3.0
        order = np.argsort(-truth, kind="stable")
        assert fast_metrics.exact_auc(value[order], int(truth.sum())) == pytest.approx(
            roc_auc_score(truth, value), abs=1e-12
        )


def test_memory_of_a_search_is_less_than_twice_the_predictions() -> None:
    import tracemalloc

    for name in ("auc", "auc_5", "log_loss", "f1_macro_5", "qwk"):
        head, metric, _ = NAIVE[name]
        truth, stored = cases(head, 60, 20_000, 0)
        tracemalloc.start()
        scorer = fast_metrics.fast_scorer(metrics.find(metric), head, "probability", truth)
        weight_search.greedy(
            scorer, [scorer.extract(each) for each in stored], 2, weight_search.unlimited(60)
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * sum(each.nbytes for each in stored), name


@pytest.mark.parametrize("method", ["greedy", "trimmed"])
def test_memory_of_a_whole_ensemble_is_less_than_twice_the_predictions(empty: Path, method: str) -> None:
    """Including the fits of each fold, nested and in-sample predictions, and those of test rows."""
    import tracemalloc

    project = lay_out(empty, "binary")
    truth, stored = cases(BINARY, 60, 20_000, 0)
    ids = [str(i) for i in range(len(truth))]
    frame = pd.DataFrame({"id": ids, "row": ids, "weight": 1.0, "source": "train", "target.label": truth})
    table = samples.Samples(frame, project.samples.heads, "s")
    fold = np.arange(len(truth)) % 5
    split = folds.Folds(pd.DataFrame({"id": ids, "repeat": 0, "fold": fold}), project.folds.meta, table)
    at = np.arange(len(truth), dtype=np.int32)
    oof = [PredictionSet(at, fold.astype(np.int16), {"label": each}, {}) for each in stored]
    names = [f"m{i}" for i in range(len(stored))]
    options = {"rounds": 2} if method == "greedy" else {}
    blend = Blend.model_validate({"members": names, "method": method, **options})
    tracemalloc.start()
    recipe = fit.fit_ensemble(Setup(project.cfg, table, split), blend, oof, (), {}, {}).recipe
    average.apply(recipe, {name: {"label": each} for name, each in zip(names, stored, strict=True)}, frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * sum(each.nbytes for each in stored), peak / sum(each.nbytes for each in stored)
