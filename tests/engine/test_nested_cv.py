"""Nested predictions, intervals, comparisons and fold tables: known values, chance level on random labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from metric_cases import PAIRS, case

from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.nested_cv import (
    bootstrap,
    bootstrap_counts,
    bootstrap_scorer,
    fold_table,
    group_codes,
    nested_predict,
    paired,
)
from comp.metrics import METRICS

AUC, QWK, RMSE, LOSS, F1 = (METRICS[name] for name in ("roc_auc", "qwk", "rmse", "log_loss", "f1"))
SEEDS = range(20)


def noise(seed: int, rows: int = 1000, classes: int = 2) -> tuple[Any, Any, Any]:
    """(random labels, independent predictions, folds)"""
    random = np.random.default_rng(seed)
    return random.integers(0, classes, rows) * 1.0, random.random(rows), np.arange(rows) % 5


def chance(scores: list[float], expected: float) -> float:
    """How many standard errors the mean of scores is away from the expected score."""
    return float((np.mean(scores) - expected) / (np.std(scores, ddof=1) / len(scores) ** 0.5))


# Cut points


def test_nested_fits_each_fold_on_the_other_rows_only() -> None:
    fold = np.array([0, 1, 2, 0, 1, 2, -1, -2])
    shown: list[set[int]] = []

    def fit(rows: Any) -> set[int]:
        shown.append(set(rows.tolist()))
        return shown[-1]

    def apply(parameters: set[int], rows: Any) -> Any:
        assert not parameters & set(rows.tolist())
        return rows * 10

    out = nested_predict(fold, fit, apply)
    assert out.parameters == {0: {1, 2, 4, 5}, 1: {0, 2, 3, 5}, 2: {0, 1, 3, 4}}
    assert out.final == {0, 1, 2, 3, 4, 5} and shown[-1] == out.final and out.unfitted == ()
    assert out.prediction[:6].tolist() == [0, 10, 20, 30, 40, 50] and np.isnan(out.prediction[6:]).all()


def test_nested_predictions_may_be_matrices() -> None:
    out = nested_predict(
        np.array([0, 1, 1]), lambda rows: rows.mean(), lambda mean, rows: np.full((len(rows), 2), mean)
    )
    assert out.prediction.tolist() == [[1.5, 1.5], [0, 0], [0, 0]]


def test_nested_by_time_fits_on_the_past_only() -> None:
    fold = np.repeat([0, 1, 2], 3)
    arguments: Any = (
        fold,
        lambda rows: set(fold[rows]),
        lambda taught, rows: np.full(len(rows), len(taught)),
    )
    out = nested_predict(*arguments, train_mask=lambda number: fold < number)
    assert out.parameters == {1: {0}, 2: {0, 1}} and out.unfitted == (0,)
    assert np.isnan(out.prediction[:3]).all() and out.prediction[3:].tolist() == [1, 1, 1, 2, 2, 2]
    with_first = nested_predict(*arguments, train_mask=lambda number: fold < number, fallback={7, 8, 9})
    assert with_first.prediction[:3].tolist() == [3, 3, 3] and with_first.unfitted == (0,)


def test_nested_excludes_groups_of_the_fold() -> None:
    fold = np.array([0, 1, 1, 0])
    groups = np.array(["a", "a", "b", None], dtype=object)
    out = nested_predict(fold, lambda rows: rows.tolist(), lambda taught, rows: rows, groups=groups)
    assert out.parameters == {0: [2], 1: [3]}


def test_nested_asserts_that_a_train_mask_does_not_leak() -> None:
    fold = np.array([0, 1, 1])
    with pytest.raises(AssertionError, match="rows of fold 0"):
        nested_predict(
            fold, lambda rows: 0, lambda taught, rows: rows, train_mask=lambda number: np.ones(3, dtype=bool)
        )
    with pytest.raises(AssertionError, match="returned 1 rows for 2"):
        nested_predict(fold, lambda rows: 0, lambda taught, rows: rows[:1])
    with pytest.raises(MetricUndefined, match="no fold has training rows"):
        nested_predict(np.zeros(3), lambda rows: 0, lambda taught, rows: rows)


def test_nested_is_at_chance_for_a_memorising_model() -> None:
    """A model that memorises training rows is perfect in-sample and at chance level in nested predictions."""
    scores = []
    for seed in SEEDS:
        truth, value, fold = noise(seed, 400)

        def fit(rows: Any, truth: Any = truth, value: Any = value) -> Any:
            return value[rows], truth[rows]

        def apply(known: Any, rows: Any, value: Any = value) -> Any:
            return known[1][np.abs(value[rows, None] - known[0]).argmin(axis=1)]

        out = nested_predict(fold, fit, apply)
        scores.append(AUC(truth, out.prediction))
        assert AUC(truth, apply(out.final, np.arange(400))) == 1
    assert abs(chance(scores, 0.5)) < 3


# Intervals


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_bootstrap_scorer_scores_the_drawn_rows(name: str, task: str) -> None:
    metric = METRICS[name]
    truth, prediction = case(metric, task)
    rows = pd.DataFrame({"weight": np.random.default_rng(5).random(len(truth)) + 0.1})
    if metric.skip_undefined and task == "multilabel":
        truth[::7, 1], truth[:, 2] = np.nan, np.nan
    score = bootstrap_scorer(metric, truth, prediction, rows)
    for times in bootstrap_counts(len(truth), np.arange(len(truth)) // 2, 5, seed=3):
        picked = np.repeat(np.arange(len(truth)), times)
        assert score(times) == pytest.approx(
            metric(truth[picked], prediction[picked], rows.iloc[picked]), abs=1e-9
        )


def test_bootstrap_scorer_passes_rows_to_a_custom_metric() -> None:
    mine = Metric("mine", lambda truth, prediction, rows: float(rows["year"].mean()), "max", "value")
    rows = pd.DataFrame({"year": [1.0, 2.0, 4.0]})
    assert bootstrap_scorer(mine, np.zeros(3), np.zeros(3), rows)(np.array([0, 2, 1])) == pytest.approx(8 / 3)
    plain = Metric("plain", lambda truth, prediction, rows: float(truth.sum()), "max", "value")
    assert bootstrap_scorer(plain, np.arange(3), np.zeros(3))(np.array([0, 2, 1])) == 4


def test_bootstrap_draws_whole_groups() -> None:
    groups = np.array(["a", "b", "a", None, None, "b"], dtype=object)
    assert group_codes(groups).tolist() == [0, 1, 0, 2, 3, 1]
    assert group_codes(np.array([3.0, np.nan, 3.0, np.nan])).tolist() == [0, 1, 0, 2]
    drawn = list(bootstrap_counts(6, groups, 50, seed=0))
    for times in drawn:
        assert times[0] == times[2] and times[1] == times[5]
        assert times[0] + times[1] + times[3] + times[4] == 4  # four groups drawn out of four
    assert len({tuple(times) for times in drawn}) > 20
    with pytest.raises(MetricUndefined, match="only one group"):
        list(bootstrap_counts(3, ["a", "a", "a"], 5, seed=0))


def test_bootstrap_is_reproducible_and_has_the_right_width() -> None:
    """The standard error of a mean of 400 numbers is known."""
    random = np.random.default_rng(0)
    truth, prediction = np.zeros(400), random.normal(size=400)
    mae = METRICS["mae"]
    first, again, other = (bootstrap(mae, truth, prediction, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    expected = np.abs(prediction).std(ddof=1) / 20
    assert first.error == pytest.approx(expected, rel=0.1)
    assert first.high - first.low == pytest.approx(2 * 1.645 * expected, rel=0.1)
    assert first.low < first.score < first.high and first.n == 1000 and first.failed == 0
    assert str(first) == f"{first.score:.4f} ({first.low:.4f} to {first.high:.4f})"


def test_groups_widen_the_interval() -> None:
    """A hundred groups of ten equal rows are a hundred rows."""
    random = np.random.default_rng(0)
    prediction, groups = np.repeat(random.normal(size=100), 10), np.repeat(np.arange(100), 10)
    rows = bootstrap(RMSE, np.zeros(1000), prediction)
    grouped = bootstrap(RMSE, np.zeros(1000), prediction, groups)
    assert grouped.error / rows.error == pytest.approx(10**0.5, rel=0.15)


def test_bootstrap_covers_chance_on_random_labels() -> None:
    covered = 0
    for seed in range(100):
        truth, score, _ = noise(seed, 200)
        found = bootstrap(AUC, truth, score, n=200, seed=seed)
        covered += found.low <= 0.5 <= found.high
    assert 82 <= covered <= 97  # 90 are expected


def test_bootstrap_raises_when_a_class_is_too_rare() -> None:
    truth, score = np.zeros(200), np.random.default_rng(0).random(200)
    truth[:3] = 1
    found = bootstrap(AUC, truth, score, n=300)
    assert 0 < found.failed < 60 and found.n == 300 - found.failed
    truth[1:3] = 0
    assert bootstrap(AUC, truth, score, n=300).failed > 60
    with pytest.raises(MetricUndefined, match=r"of 300 resamples have no score .*(has no|truth has)"):
        bootstrap(AUC, truth, score, groups=np.append([0], np.full(199, 1)), n=300)


# Comparison


def test_paired_finds_a_planted_difference_whatever_the_direction() -> None:
    random = np.random.default_rng(0)
    truth = (random.random(2000) < 0.5) * 1.0
    worse = np.clip(0.3 + 0.4 * truth + 0.3 * random.normal(size=2000), 0.01, 0.99)
    good = np.clip(worse + 0.1 * (truth - 0.5), 0.01, 0.99)
    for metric in (AUC, LOSS):
        forward, back = paired(metric, truth, good, worse), paired(metric, truth, worse, good)
        assert forward.difference > 0 and forward.significant and forward.share > 0.99
        assert str(forward).startswith("better by 0.") and str(forward).endswith(", P(better) > 99 %")
        assert back.difference == -forward.difference and back.share == pytest.approx(1 - forward.share)
        assert str(back).startswith("worse by 0.")
        assert forward.low > 0


def test_pairing_removes_the_common_variance() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=500)
    a = truth + random.normal(size=500)
    b = a + 0.05 * random.normal(size=500)
    assert paired(RMSE, truth, a, b).error < bootstrap(RMSE, truth, a).error / 5


def test_equal_predictions_are_within_noise() -> None:
    truth, score, _ = noise(0)
    same = paired(AUC, truth, score, score)
    assert same.difference == 0 and same.share == 0.5 and not same.significant
    assert str(same) == "identical scores"


def test_paired_counts_groups_not_rows() -> None:
    """A gain on one of six groups is no evidence, however many rows that group has."""
    truth = np.zeros(600)
    a, b = np.ones(600), np.ones(600)
    a[:100] = 0.2
    groups = np.repeat(np.arange(6), 100)
    assert paired(METRICS["mae"], truth, a, b).significant
    assert not paired(METRICS["mae"], truth, a, b, groups).significant


def test_paired_is_rarely_significant_on_random_labels() -> None:
    decided = 0
    for seed in range(100):
        truth, score, _ = noise(seed, 200)
        other = np.random.default_rng(seed + 1000).random(200)
        decided += paired(AUC, truth, score, other, n=200, seed=seed).significant
    assert 3 <= decided <= 18  # one in ten is expected: 5 % on either side


def test_small_errors_are_printed_with_enough_digits() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=300)
    found = paired(
        RMSE, truth, truth + 1e-5 * random.normal(size=300), truth + 2e-5 * random.normal(size=300)
    )
    assert "0.0000 " not in str(found) and "e-" not in str(found)


# Folds


def test_fold_table() -> None:
    truth = np.array([0, 1, 0, 1, 0, 1, 0, 1.0])
    score = np.array([0.1, 0.9, 0.9, 0.1, 0.2, 0.8, 0.5, 0.5])
    table = fold_table(AUC, truth, score, np.array([0, 0, 1, 1, 2, 2, -1, -1]))
    assert table.folds == ((0, 2, 1.0), (1, 2, 0.0), (2, 2, 1.0))
    assert table.mean == pytest.approx(2 / 3) and table.std == pytest.approx(3**-0.5) and table.n == 3
    assert str(table) == "0.6667 ± 0.5774 (3 folds)"
    assert str(fold_table(AUC, truth, score, np.zeros(8))) == "0.5938 (1 fold)"


def test_a_fold_without_a_score_is_named() -> None:
    truth, score = np.array([0, 1, 1, 1, 0, 1.0]), np.array([0.1, 0.9, 0.9, 0.1, np.nan, np.nan])
    table = fold_table(AUC, truth, score, np.array([0, 0, 1, 1, 2, 2]))
    assert table.folds == ((0, 2, 1.0), (1, 2, None), (2, 2, None)) and table.std is None and table.n == 1
    assert "fold 1: roc_auc: column 0 has no negative rows" in table.undefined[0]
    assert "fold 2: roc_auc: prediction is NaN" in table.undefined[1]
    assert str(table) == "1.0000 (1 fold, 2 undefined)"
    with pytest.raises(MetricUndefined, match="fold 0"):
        fold_table(AUC, np.ones(4), np.ones(4), np.array([0, 0, 1, 1]))
    with pytest.raises(MetricUndefined, match="no row belongs to a fold"):
        fold_table(AUC, truth, score, np.full(6, -1))


def test_fold_table_is_at_chance_on_random_labels() -> None:
    means = []
    for seed in SEEDS:
        truth, score, fold = noise(seed)
        means.append(fold_table(AUC, truth, score, fold, pd.DataFrame({"weight": np.ones(1000)})).mean)
    assert abs(chance(means, 0.5)) < 3
