"""Cut points and thresholds: the exact optimum in-sample, and chance level on random labels in nested
predictions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from metric_cases import case
from test_nested_cv import AUC, F1, QWK, SEEDS, chance, noise

from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.nested_cv import NestedPrediction, nested_predict
from comp.engine.bank.thresholds import apply_cuts, apply_threshold, fit_cuts, fit_threshold, fit_thresholds
from comp.metrics import METRICS


def every_cut(value: Any, num_grades: int) -> Any:
    levels = np.unique(value)
    places = [levels[0], *((levels[:-1] + levels[1:]) / 2), levels[-1] + 1]
    return itertools.combinations_with_replacement(places, num_grades - 1)


@pytest.mark.parametrize("name", ["qwk", "accuracy", "balanced_accuracy"])
@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_optimal(name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    num_grades = 3 + seed % 2
    truth = random.permutation(np.arange(16) % num_grades) * 1.0
    value = (truth * (seed % 3) + random.normal(size=16)).round(1)  # from no skill to some, with ties
    weight = random.integers(1, 4, 16)
    rows = pd.DataFrame({"weight": weight})
    best = max(METRICS[name](truth, apply_cuts(value, cuts), rows) for cuts in every_cut(value, num_grades))
    cuts = fit_cuts(value, truth, num_grades, METRICS[name], rows)
    assert METRICS[name](truth, apply_cuts(value, cuts), rows) == pytest.approx(best, abs=1e-12)
    assert (np.diff(cuts) >= 0).all() and np.isfinite(cuts).all() and len(cuts) == num_grades - 1


def test_cuts_of_separable_values_are_midpoints() -> None:
    value, truth = np.array([0, 1, 10, 11, 20, 21.0]), np.array([0, 0, 1, 1, 2, 2.0])
    for name in ("qwk", "accuracy", "f1_macro"):
        assert fit_cuts(value, truth, 3, METRICS[name]).tolist() == [5.5, 15.5]


def test_a_grade_without_rows_is_never_predicted() -> None:
    value, truth = np.array([0, 1, 10, 11, 20, 21.0]), np.array([0, 0, 1, 1, 3, 3.0])
    assert apply_cuts(value, fit_cuts(value, truth, 5, QWK)).tolist() == [0, 0, 1, 1, 3, 3]


def test_cuts_for_another_metric_are_no_worse_than_rounding() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 4, 300) * 1.0
    value = truth * 0.5 + 1 + random.normal(size=300) * 0.4
    metric = METRICS["f1_macro"]
    score = metric(truth, apply_cuts(value, fit_cuts(value, truth, 4, metric)))
    assert score > metric(truth, np.clip(np.rint(value), 0, 3)) + 0.05


def test_cuts_separate_adjacent_floats() -> None:
    low = 1.0
    value = np.array([low, np.nextafter(low, 2), np.nextafter(np.nextafter(low, 2), 2)])
    assert apply_cuts(value, fit_cuts(value, np.array([0, 1, 2.0]), 3, QWK)).tolist() == [0, 1, 2]
    single = value.astype(np.float32)
    assert (apply_cuts(single, [np.float32(1.0)]) == 1).all()


def test_invalid_input_of_cuts_raises() -> None:
    with pytest.raises(MetricUndefined, match="NaN"):
        apply_cuts(np.array([1, np.nan]), [0.5])
    with pytest.raises(MetricUndefined, match="NaN"):
        fit_cuts(np.array([1, np.nan]), np.array([0, 1]), 2, QWK)
    with pytest.raises(MetricUndefined, match="5 is not a class code from 0 to 2"):
        fit_cuts(np.array([1, 2.0]), np.array([0, 5]), 3, QWK)
    with pytest.raises(MetricUndefined, match="only grade 1"):
        fit_cuts(np.array([1, 2.0]), np.array([1, 1]), 3, QWK)


def nested_cuts(truth: Any, value: Any, fold: Any) -> NestedPrediction:
    return nested_predict(
        fold,
        lambda rows: fit_cuts(value[rows], truth[rows], 5, QWK),
        lambda cuts, rows: apply_cuts(value[rows], cuts),
    )


def test_nested_cuts_are_at_chance_on_random_grades() -> None:
    inside, outside = [], []
    for seed in SEEDS:
        truth, value, fold = noise(seed, 500, 5)
        out = nested_cuts(truth, value, fold)
        inside.append(QWK(truth, apply_cuts(value, out.final)))
        outside.append(QWK(truth, out.prediction))
    assert abs(chance(outside, 0)) < 3
    assert chance(inside, 0) > 6 and np.mean(inside) > 0.03


# Thresholds


@pytest.mark.parametrize(
    "name", ["f1", "f1_macro", "f1_micro", "accuracy", "balanced_accuracy", "mcc", "qwk"]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_threshold_is_optimal(name: str, seed: int) -> None:
    truth, score = case(AUC, "binary", rows=40, seed=seed)
    rows = pd.DataFrame({"weight": np.random.default_rng(seed).integers(1, 4, 40)})
    metric = METRICS[name]
    best = max(metric(truth, score >= cut, rows) for cut in [*np.unique(score), 2.0])
    found = fit_threshold(truth, score, metric, rows)
    assert metric(truth, apply_threshold(score, found), rows) == pytest.approx(best, abs=1e-12)


def test_a_threshold_is_the_midpoint() -> None:
    assert fit_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], F1) == pytest.approx(0.4)


def test_a_threshold_for_a_custom_metric() -> None:
    truth, score = case(AUC, "binary", rows=200)
    mine = Metric(
        "mine",
        lambda t, p, rows: float(np.mean((t == 1) & (p == 1)) - 2 * np.mean((t == 0) & (p == 1))),
        "max",
        "label",
    )
    found = mine(truth, apply_threshold(score, fit_threshold(truth, score, mine)))
    assert found == max(mine(truth, score >= cut) for cut in [*np.unique(score), 2.0])


def test_invalid_input_of_thresholds_raises() -> None:
    with pytest.raises(MetricUndefined, match="both classes"):
        fit_threshold([0, 0], [0.1, 0.2], F1)
    with pytest.raises(MetricUndefined, match="no optimal threshold"):
        fit_threshold([0, 1], [0.1, 0.2], METRICS["recall"])
    with pytest.raises(MetricUndefined, match="NaN"):
        apply_threshold(np.array([0.1, np.nan]), 0.5)
    with pytest.raises(MetricUndefined, match="not a class code"):
        fit_threshold([0, 0.3], [0.1, 0.2], F1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["f1_micro", "f1_macro"])
def test_thresholds_per_column_are_optimal(name: str, seed: int) -> None:
    truth, score = case(AUC, "multilabel", rows=12, seed=seed)
    truth, score = truth[:, :3], score[:, :3].round(1)
    metric = METRICS[name]
    places = [[*np.unique(score[:, column]), 2.0] for column in range(3)]
    best = max(metric(truth, score >= np.array(cuts)) for cuts in itertools.product(*places))
    assert metric(truth, apply_threshold(score, fit_thresholds(truth, score, metric))) == pytest.approx(best)


def test_shared_threshold() -> None:
    truth, score = case(AUC, "multilabel", rows=100)
    for name in ("f1_micro", "f1_samples"):
        metric = METRICS[name]
        shared = fit_thresholds(truth, score, metric, shared=True)
        assert len(shared) == 4 and len(set(shared)) == 1
        best = max(metric(truth, score >= cut) for cut in np.unique(score))
        assert metric(truth, apply_threshold(score, shared)) == pytest.approx(best)


def test_a_column_without_both_classes_keeps_one_half() -> None:
    truth = np.array([[0, 1, 0], [1, 1, 0], [1, 1, 0]])
    score = np.array([[0.1, 0.2, 0.9], [0.3, 0.3, 0.8], [0.4, 0.3, 0.7]])
    assert fit_thresholds(truth, score, METRICS["f1_macro"]).tolist() == pytest.approx([0.2, 0.5, 0.5])


def test_at_least_one_label_is_the_closest_to_its_threshold() -> None:
    score = np.array([[0.1, 0.3], [0.6, 0.1], [0.0, 0.8]])
    assert apply_threshold(score, np.array([0.2, 0.9]), at_least_one=True).tolist() == [
        [1, 0],
        [1, 0],
        [0, 1],
    ]
    assert apply_threshold(score[:1], np.array([0.2, 0.9])).tolist() == [[0, 0]]
    assert apply_threshold(np.array([0.1, 0.5]), 0.5).tolist() == [0, 1]


def nested_thresholds(fit: Any, metric: Metric, truth: Any, score: Any, fold: Any) -> NestedPrediction:
    return nested_predict(
        fold,
        lambda rows: fit(truth[rows], score[rows], metric),
        lambda threshold, rows: apply_threshold(score[rows], threshold),
    )


@pytest.mark.parametrize(("name", "expected"), [("mcc", 0.0), ("balanced_accuracy", 0.5)])
def test_nested_thresholds_are_at_chance_on_random_labels(name: str, expected: float) -> None:
    metric, inside, outside = METRICS[name], [], []
    for seed in SEEDS:
        truth, score, fold = noise(seed, 500)
        out = nested_thresholds(fit_threshold, metric, truth, score, fold)
        inside.append(metric(truth, apply_threshold(score, out.final)))
        outside.append(metric(truth, out.prediction))
    assert abs(chance(outside, expected)) < 3
    assert chance(inside, expected) > 6


@pytest.mark.parametrize("name", ["f1_macro", "f1_micro"])
def test_nested_thresholds_of_several_random_columns(name: str) -> None:
    """The F1 of chance is that of predicting everything positive; in-sample tuning seems to beat it, nested
    does not."""
    metric, inside, outside = METRICS[name], [], []
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        truth, score = (random.random((400, 5)) < 0.2) * 1.0, random.random((400, 5))
        out = nested_thresholds(fit_thresholds, metric, truth, score, np.arange(400) % 5)
        constant = metric(truth, np.ones_like(truth))
        inside.append(metric(truth, apply_threshold(score, out.final)) - constant)
        outside.append(metric(truth, out.prediction) - constant)
    assert min(inside) >= 0 and chance(inside, 0) > 6
    assert chance(outside, 0) < 3 and np.mean(inside) - np.mean(outside) > 0.005


# Nested
