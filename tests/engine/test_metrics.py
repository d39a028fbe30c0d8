"""Every metric against values computed by hand, against scikit-learn, and with invalid input."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from metric_cases import PAIRS, case
from sklearn import metrics as sk

from comp.engine.bank import metric_formulas
from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import TASKS
from comp.metrics import METRICS, better, custom, find, nearest

LN = np.log
NAN = float("nan")

BY_HAND = [
    # three of four right
    ("accuracy", [0, 1, 1, 2], [0, 1, 2, 2], 3 / 4),
    ("accuracy", [[1, 0], [1, 1]], [[1, 0], [1, 0]], 1 / 2),  # a row counts when all of it is right
    ("accuracy", [[0.6, 0.4], [0.2, 0.8]], [0, 0], 1 / 2),  # shares: the likeliest class is the label
    # recalls 1, 1/2, 1
    ("balanced_accuracy", [0, 1, 1, 2], [0, 1, 2, 2], 5 / 6),
    # 2 hits, 1 false alarm, 2 misses
    ("precision", [1, 1, 1, 1, 0], [1, 1, 0, 0, 1], 2 / 3),
    ("recall", [1, 1, 1, 1, 0], [1, 1, 0, 0, 1], 2 / 4),
    ("f1", [1, 1, 1, 1, 0], [1, 1, 0, 0, 1], 4 / 7),
    ("mcc", [1, 1, 1, 1, 0], [1, 1, 0, 0, 1], -2 / 24**0.5),
    ("precision", [1, 0], [0, 0], 0),
    ("mcc", [1, 0], [0, 0], 0),
    ("f1_micro", [0, 1, 1, 2], [0, 1, 2, 2], 3 / 4),
    ("f1_macro", [0, 1, 1, 2], [0, 1, 2, 2], (1 + 2 / 3 + 2 / 3) / 3),
    ("f1_macro", [5, 5, 9], [5, 5, 5], (4 / 5 + 0) / 2),  # only classes that occur
    # columns: 1 of 1 hit and one false alarm; 1 of 2 hit; nothing at all
    ("f1_micro", [[1, 1, 0], [0, 1, 0]], [[1, 1, 0], [1, 0, 0]], 4 / 6),
    ("f1_macro", [[1, 1, 0], [0, 1, 0]], [[1, 1, 0], [1, 0, 0]], (2 / 3 + 2 / 3 + 0) / 3),
    # rows: {0, 1} said {0}; {1} said {0, 1, 2}
    ("f1_samples", [[1, 1, 0], [0, 1, 0]], [[1, 0, 0], [1, 1, 1]], (2 / 3 + 1 / 2) / 2),
    ("f2_samples", [[1, 1, 0], [0, 1, 0]], [[1, 0, 0], [1, 1, 1]], (5 / 9 + 5 / 7) / 2),
    # squared disagreement 2, expected by chance 22 / 4
    ("qwk", [0, 1, 2, 2], [0, 2, 1, 2], 1 - 2 / 5.5),
    ("qwk", [0, 0, 3], [0, 3, 3], 1 - 9 / (9 * (2 * 2 + 1 * 1) / 3)),  # grades 1 and 2 never occur
    ("qwk", [0, 1], [1, 1], 0),
    ("log_loss", [1, 0], [0.8, 0.4], -(LN(0.8) + LN(0.6)) / 2),
    ("log_loss", [0, 2], [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], -(LN(0.7) + LN(0.8)) / 2),
    ("log_loss", [[0.5, 0.5]], [[0.25, 0.75]], -(LN(0.25) + LN(0.75)) / 2),
    ("log_loss", [1, 0], [0, 0], -LN(2.0**-52) / 2),  # clipped in float64
    ("log_loss_rescaled", [0, 1], [[0.5, 1.0], [0.2, 0.2]], -(LN(1 / 3) + LN(1 / 2)) / 2),
    ("mean_column_log_loss", [[1, 0]], [[0.8, 0.4]], -(LN(0.8) + LN(0.6)) / 2),
    ("kl", [[0.5, 0.5]], [[0.25, 0.75]], (LN(2) + LN(2 / 3)) / 2),
    ("kl", [[1, 0, 0]], [[0.5, 0.25, 0.25]], LN(2)),
    ("kl", [0.5], [0.25], (LN(2) + LN(2 / 3)) / 2),
    # 3 of the 4 pairs in order; a tie is half a pair
    ("roc_auc", [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 3 / 4),
    ("roc_auc", [0, 1], [0.5, 0.5], 1 / 2),
    ("roc_auc", [0, 1, 2], [[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.45, 0.35, 0.2]], (1 + 1 + 3 / 4) / 3),
    ("roc_auc", [[0, 1], [1, 0]], [[0.1, 0.2], [0.3, 0.4]], (1 + 0) / 2),
    ("average_precision", [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], (1 + 2 / 3) / 2),
    ("average_precision", [1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], 1 / 4),
    # the first column has 3 of 4 pairs, the second all, the third no positive, the fourth is not graded
    (
        "mean_column_auc",
        [[0, 0, 0, NAN], [0, NAN, 0, NAN], [1, 1, 0, NAN], [1, NAN, 0, NAN]],
        [[0.1, 0.1, 0, 0], [0.4, 0.1, 0, 0], [0.35, 0.9, 0, 0], [0.8, 0.2, 0, 0]],
        (3 / 4 + 1) / 2,
    ),
    # everything tied is the diagonal: bands 0 to 0.4 and 0.4 to 1 hold 0.32 and 0.18 of it
    ("weighted_auc", [0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], (2 * 0.32 + 0.18) / 1.4),
    ("weighted_auc", [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 1),
    # half the positives before all negatives, half after: 0.4 full twice, then 0.1 once
    ("weighted_auc", [1, 0, 0, 1], [0.9, 0.5, 0.4, 0.1], (2 * 0.4 + 0.1) / 1.4),
    ("partial_auc", [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 0.2),
    ("partial_auc", [0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.02),
    # 1.4 of certainty on 2 positives, 1.8 in all
    ("probabilistic_f1", [1, 0, 1], [0.8, 0.4, 0.6], 2.8 / 3.8),
    # row 0: its label comes second; row 1: its labels come second and third
    ("lrap", [[1, 0, 0], [1, 1, 0]], [[0.2, 0.9, 0.1], [0.3, 0.5, 0.9]], (1 / 2 + (1 / 2 + 2 / 3) / 2) / 2),
    ("lwlrap", [[1, 0, 0], [1, 1, 0]], [[0.2, 0.9, 0.1], [0.3, 0.5, 0.9]], (1 / 2 + 1 / 2 + 2 / 3) / 3),
    ("lwlrap", [[1, 0], [0, 0]], [[0.2, 0.9], [0.3, 0.5]], 1 / 2),  # a row without labels adds nothing
    ("map@5", [3, 7], [[1, 3, 0, 4, 2], [7, 1, 2, 3, 4]], (1 / 2 + 1) / 2),
    ("map@5", [3, 3], [[1, 1, 3, -1, -1], [1, 2, 4, 5, 6]], (1 / 3 + 0) / 2),
    ("map@5", [3], [[3, 3, 3, 3, 3]], 1),  # a label listed twice counts once
    ("map@3", [[1, 0, 1, 0]], [[0, 1, 2]], (1 + 2 / 3) / 2),
    ("map@2", [[1, 1, 1, 1]], [[0, 1, 2]], 1),  # no more than k can be found
    ("map@1", [3, 7], [[1, 3], [7, 1]], 1 / 2),
    ("accuracy@5", [3, 7], [[1, 3, 0, 4, 2], [6, 1, 2, 3, 4]], 1 / 2),
    ("accuracy@1", [3, 7], [[1, 3], [7, 1]], 1 / 2),
    ("rmse", [1, 2, 3], [1, 3, 5], (5 / 3) ** 0.5),
    ("rmse", [[0, 0], [0, 0]], [[1, 3], [1, 3]], 2),  # the mean of the columns' errors
    ("mae", [1, 2, 3], [1, 3, 5], 1),
    ("r2", [1, 2, 3], [1, 3, 5], 1 - 5 / 2),
    ("rmsle", [0, np.e - 1], [np.e - 1, np.e - 1], 0.5**0.5),
    ("spearman", [1, 2, 3, 4], [10, 30, 20, 40], 1 - 6 * 2 / (4 * 15)),
    ("spearman", [1, 2, 2], [1, 2, 2], 1),
]

BY_SKLEARN = {
    "accuracy": sk.accuracy_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "precision": sk.precision_score,
    "recall": sk.recall_score,
    "f1": sk.f1_score,
    "f1_micro": partial(sk.f1_score, average="micro"),
    "f1_macro": partial(sk.f1_score, average="macro"),
    "f1_samples": partial(sk.f1_score, average="samples", zero_division=0),
    "f2_samples": partial(sk.fbeta_score, beta=2, average="samples", zero_division=0),
    "mcc": sk.matthews_corrcoef,
    "qwk": partial(sk.cohen_kappa_score, weights="quadratic"),
    "log_loss": sk.log_loss,
    "roc_auc": partial(sk.roc_auc_score, multi_class="ovr"),
    "mean_column_auc": partial(sk.roc_auc_score, multi_class="ovr"),
    "average_precision": sk.average_precision_score,
    "lrap": sk.label_ranking_average_precision_score,
    "rmse": lambda t, p, **w: sk.mean_squared_error(t, p, **w) ** 0.5,
    "mae": sk.mean_absolute_error,
    "rmsle": lambda t, p, **w: sk.mean_squared_log_error(t, p, **w) ** 0.5,
    "r2": sk.r2_score,
}


@pytest.mark.parametrize(("name", "truth", "prediction", "expected"), BY_HAND)
def test_by_hand(name: Any, truth: Any, prediction: Any, expected: Any) -> None:
    assert find(name)(truth, prediction) == pytest.approx(expected, abs=1e-12)


def test_every_metric_has_a_value_by_hand() -> None:
    assert set(METRICS) <= {name for name, *_ in BY_HAND}


@pytest.mark.parametrize(("name", "task"), [pair for pair in PAIRS if pair[0] in BY_SKLEARN])
@pytest.mark.parametrize("seed", range(3))
def test_like_scikit_learn(name: Any, task: Any, seed: Any) -> None:
    truth, prediction = case(METRICS[name], task, rows=211, seed=seed)
    weight = np.random.default_rng(seed).random(len(truth))
    ours, theirs = METRICS[name], BY_SKLEARN[name]
    whole = truth.astype(int) if ours.needs != "value" else truth
    assert ours(truth, prediction) == pytest.approx(theirs(whole, prediction), abs=1e-10)
    weighted = ours(truth, prediction, pd.DataFrame({"weight": weight}))
    assert weighted == pytest.approx(theirs(whole, prediction, sample_weight=weight), abs=1e-10)


def test_spearman_like_pandas() -> None:
    truth, prediction = case(METRICS["spearman"], "regression", rows=300)
    expected = pd.Series(truth).rank().corr(pd.Series(prediction).rank())
    assert METRICS["spearman"](truth, prediction) == pytest.approx(expected, abs=1e-12)


def test_partial_auc_like_its_host() -> None:
    """The host flips the labels, takes scikit-learn's area below 0.2 and undoes its scaling."""
    truth, prediction = case(METRICS["partial_auc"], "binary", rows=3000)
    scaled = sk.roc_auc_score(1 - truth, 1 - prediction, max_fpr=0.2)
    theirs = 0.5 * 0.2**2 + (0.2 - 0.5 * 0.2**2) / 0.5 * (scaled - 0.5)
    assert METRICS["partial_auc"](truth, prediction) == pytest.approx(theirs, abs=1e-12)


def test_weighted_auc_like_its_host() -> None:
    """The host drops the segments of the curve that cross an edge, so both agree for fine curves."""
    random = np.random.default_rng(0)
    truth = (random.random(40_000) < 0.5).astype(float)
    score = truth + random.normal(size=len(truth))
    fpr, tpr, _ = sk.roc_curve(truth, score)
    theirs = 0.0
    for low, high, weight in ((0, 0.4, 2), (0.4, 1, 1)):
        inside = (tpr > low) & (tpr < high)
        x = np.append(fpr[inside], np.linspace(fpr[inside][-1], 1, 100))
        theirs += weight * sk.auc(x, np.append(tpr[inside], [high] * 100) - low) / 1.4
    assert METRICS["weighted_auc"](truth, score) == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_weight_is_a_number_of_copies(name: Any, task: Any) -> None:
    metric = METRICS[name]
    truth, prediction = case(metric, task)
    times = np.random.default_rng(1).integers(0, 4, len(truth))
    copies = metric(np.repeat(truth, times, axis=0), np.repeat(prediction, times, axis=0))
    assert metric(truth, prediction, pd.DataFrame({"weight": times})) == pytest.approx(copies, abs=1e-9)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_range_and_direction_of_every_metric(name: Any, task: Any) -> None:
    metric = METRICS[name]
    truth, skilled = case(metric, task, rows=400, skill=1.0)
    _, unskilled = case(metric, task, rows=400, skill=0.0)
    good, bad = metric(truth, skilled), metric(truth, unskilled)
    assert better(metric, good, bad)
    assert not better(metric, bad, good)
    order = np.random.default_rng(0).permutation(len(truth))
    assert metric(truth[order], skilled[order]) == pytest.approx(good, abs=1e-12)
    if metric.needs != "ranking":
        assert metric(truth.astype(np.float32), skilled.astype(np.float32)) == pytest.approx(good, abs=1e-4)


@pytest.mark.parametrize(("name", "task"), PAIRS)
@pytest.mark.parametrize("damage", [NAN, float("inf")])
def test_nan_raises(name: Any, task: Any, damage: Any) -> None:
    metric = METRICS[name]
    truth, prediction = case(metric, task)
    prediction = prediction.astype(float)
    prediction[7] = damage
    with pytest.raises(
        MetricUndefined, match=f"{name}: prediction is NaN or infinite in 1 of 60 rows, first in row 7"
    ):
        metric(truth, prediction)
    truth, prediction = case(metric, task)
    truth[3] = damage
    if metric.skip_undefined and np.isnan(damage):
        assert np.isfinite(metric(truth, prediction))
    else:
        with pytest.raises(MetricUndefined, match="truth is NaN or infinite in 1 of 60 rows, first in row 3"):
            metric(truth, prediction)


UNDEFINED = [
    ("roc_auc", [1, 1], [0.2, 0.3], "column 0 has no negative rows"),
    ("roc_auc", [0, 1], [[0.5, 0.3, 0.2], [0.4, 0.5, 0.1]], "column 2 has no positive rows"),
    ("average_precision", [0, 0], [0.2, 0.3], "column 0 has no positive rows"),
    ("mean_column_auc", [[0, 1], [0, 1]], [[0.1, 0.2], [0.3, 0.4]], "no column has both"),
    ("f1", [0, 0], [0, 0], "truth has no positive rows"),
    ("recall", [0, 0], [1, 0], "truth has no positive rows"),
    ("probabilistic_f1", [0, 0], [0.2, 0.3], "truth has no positive rows"),
    ("mcc", [1, 1], [0, 1], "only class 1"),
    ("balanced_accuracy", [2, 2], [2, 1], "only class 2"),
    ("qwk", [2, 2], [2, 1], "only grade 2"),
    ("r2", [0.1, 0.1, 0.1], [1, 2, 3], "truth is constant (0.1)"),
    ("spearman", [1, 2, 3], [5, 5, 5], "prediction is constant (5)"),
    ("rmsle", [1, 2], [1, -0.5], "prediction contains -0.5"),
    ("lwlrap", [[0, 0]], [[0.1, 0.2]], "truth has no label set"),
    ("f1_micro", [[0, 0]], [[0, 0]], "has a label set"),
    # input for which the formula would score something else
    ("accuracy", [0, 1], [0.2, 0.7], "expected integer labels, got 0.2"),
    ("qwk", [0, 1], [0.2, 0.7], "expected integer labels"),
    ("f1", [0, 2], [0, 2], "expected labels 0 and 1"),
    ("log_loss", [0, 1], [-0.1, 0.5], "ranges from -0.1 to 0.5, expected 0 to 1"),
    ("log_loss", [0, 1], [[0.5, 0.5], [0.9, 0.9]], "row 1 of prediction sums to 1.8"),
    ("log_loss", [[1, 1]], [[0.5, 0.5]], "row 0 of truth sums to 2"),
    ("log_loss", [0, 2], [[0.5, 0.5], [0.5, 0.5]], "2 is not a class code from 0 to 1"),
    ("log_loss_rescaled", [0], [[0, 0]], "sums to 0"),
    ("roc_auc", [0, 3], [0.1, 0.2], "truth ranges from 0 to 3"),
    ("roc_auc", [0, 1], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], "prediction has 3 rows, truth has 2"),
    ("roc_auc", [[0, 1], [1, 0]], [0.1, 0.2], "does not match"),
    ("rmse", [1, 2], [[1, 2], [3, 4]], "does not match"),
    ("map@5", [1, 2], [1, 2], "does not match"),
    ("rmse", [], [], "no rows"),
    ("rmse", ["a"], [1], "truth contains a value that is not a number"),
    ("rmse", [[[1]]], [1], "truth has 3 dimensions"),
    ("f1_macro", [0, -1], [0, 1], "-1 is not a class code"),
]


@pytest.mark.parametrize(("name", "truth", "prediction", "why"), UNDEFINED)
def test_undefined_scores_raise_with_the_reason(name: Any, truth: Any, prediction: Any, why: Any) -> None:
    with pytest.raises(MetricUndefined) as fault:
        METRICS[name](truth, prediction)
    assert str(fault.value).startswith(f"{name}: ") and why in str(fault.value)
    assert "\n" not in str(fault.value)
    assert isinstance(fault.value, UserError) and isinstance(fault.value, ValueError)


@pytest.mark.parametrize("weight", [[1, -1], [0, 0], [1, NAN]])
def test_invalid_weights_raise(weight: Any) -> None:
    with pytest.raises(MetricUndefined, match="weight"):
        METRICS["mae"]([1, 2], [1, 2], pd.DataFrame({"weight": weight}))


@pytest.mark.parametrize("name", ["balanced_accuracy", "mcc", "qwk", "f1", "roc_auc", "r2", "spearman"])
def test_rows_of_weight_0_do_not_count(name: str) -> None:
    """Even if they are the only ones of a class."""
    with pytest.raises(MetricUndefined):
        METRICS[name]([0, 0, 1], [0, 1, 1], pd.DataFrame({"weight": [1, 1, 0]}))


def test_one_column_is_a_vector() -> None:
    truth, prediction = case(METRICS["roc_auc"], "binary")
    flat = METRICS["roc_auc"](truth, prediction)
    assert METRICS["roc_auc"](truth[:, None], prediction[:, None]) == flat
    assert METRICS["roc_auc"](pd.Series(truth), pd.DataFrame({"p": prediction})) == flat


def test_order_metrics_take_logits_and_extremes() -> None:
    """Only the order counts, down to differences that a float32 probability would lose."""
    assert METRICS["roc_auc"]([0, 1], [-1e30, -1e-30]) == 1
    assert METRICS["roc_auc"]([1, 0], [1 - 1e-16, 1 - 2e-16]) == 1


def late(truth: Any, prediction: Any, rows: Any) -> float:
    return float(np.mean((truth == prediction)[rows["year"] > 2000]))


def with_attributes(function: Any, **attributes: Any) -> Any:
    function.__dict__.clear()
    function.__dict__.update(attributes)
    return function


def test_custom_metric() -> None:
    metric = custom(with_attributes(late, direction="max", needs="label"))
    rows = pd.DataFrame({"year": [1990, 2010, 2020]})
    assert metric([0, 1, 1], [1, 1, 0], rows) == 0.5
    assert metric.name == "late" and metric.sign == 1
    assert custom(metric) is metric
    with pytest.raises(MetricUndefined, match="rows has 3 lines, truth has 2"):
        metric([0, 1], [1, 1], rows)
    with pytest.raises(UserError) as caught:
        custom(with_attributes(late, direction="up", needs="label"))
    assert (caught.value.where, caught.value.key) == ("comp/competition.py", "metric.direction")
    with pytest.raises(UserError) as caught:
        custom(with_attributes(late, direction="min"))
    assert (caught.value.code, caught.value.key) == ("metric-attribute", "metric.needs")


@pytest.mark.parametrize("value", [NAN, float("inf"), 2.0])
def test_the_return_value_of_a_custom_metric_is_validated(value: float) -> None:
    metric = Metric("mine", lambda truth, prediction, rows: value, "max", "value", 0, 1)
    with pytest.raises(MetricUndefined, match=r"mine: .* is outside 0 to 1"):
        metric([0, 1], [0, 1])


def test_custom_bands_of_the_roc_curve() -> None:
    """The lower half of the curve alone."""
    lower = partial(metric_formulas.banded_auc, edges=(0.0, 0.5), weights=(1.0,), total=0.5)
    metric = Metric("lower", lower, "max", "probability", 0, 1, kind="curve")
    assert metric([1, 0, 1], [0.9, 0.5, 0.1]) == pytest.approx(1)
    assert metric([0, 1, 1], [0.9, 0.5, 0.1]) == pytest.approx(0)


def test_better() -> None:
    auc, loss = METRICS["roc_auc"], METRICS["log_loss"]
    assert better(auc, 0.9, 0.8) and not better(auc, 0.8, 0.8) and not better(auc, 0.7, 0.8)
    assert better(loss, 0.1, 0.2) and not better(loss, 0.2, 0.1)
    assert (auc.sign, loss.sign) == (1, -1)
    assert better(auc, 0.1, NAN) and not better(auc, NAN, 0.1) and not better(auc, NAN, NAN)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("auc", "roc_auc"),
        ("logloss", "log_loss"),
        ("rocauc", "roc_auc"),
        ("F1", "f1"),
        ("kapa", "qwk"),
        ("pAUC", "partial_auc"),
    ],
)
def test_nearest(wrong: Any, right: Any) -> None:
    assert right in nearest(wrong) and len(nearest(wrong)) <= 3
    with pytest.raises(UserError, match=f"nearest: .*{right}") as caught:
        find(wrong)
    assert (caught.value.code, caught.value.key) == ("metric-unknown", wrong)


def test_a_name_similar_to_none_lists_all() -> None:
    with pytest.raises(UserError, match=r"one of accuracy, .*spearman"):
        find("§§§")


@pytest.mark.parametrize("wrong", ["map@", "map@0", "map@-1", "map@x", "map@99999999", "roc_auc@3"])
def test_k_is_a_number(wrong: Any) -> None:
    with pytest.raises(UserError):
        find(wrong)


def test_the_table_is_complete() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name and metric.low < metric.high and metric.tasks
        assert metric.kind != "custom", f"{name} needs the kind of its function"
    for task, row in TASKS.items():
        assert task in METRICS[row.metric].tasks, f"the default metric of {task} must fit it"


def test_importing_metrics_is_cheap() -> None:
    heavy = "{'sklearn', 'scipy', 'pandas', 'torch', 'matplotlib'}"
    code = (
        "import sys, comp.metrics, comp.engine.bank.nested_cv, comp.engine.bank.thresholds; "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
