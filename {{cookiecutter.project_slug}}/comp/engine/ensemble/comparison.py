"""Bootstrap interval of a score, and paired comparisons with other predictions on the same resamples.

Rows are resampled, or whole groups if the samples have any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples

RESAMPLES = 500
LEVEL = 0.9
Scorer = Callable[[NDArray[np.int64]], float]  # how often each row was drawn -> score


def mean_scorer(
    cfg: Config,
    samples: Samples,
    folds: Folds,
    predictions: PredictionSet,
    predicted: NDArray[np.bool_],
    scored: score.ScoredRows,
) -> Scorer:
    """The mean over heads of their bootstrap scorers. scored: the rows for which `predicted` holds."""
    scorers = []
    for head in samples.heads:
        probability = predictions.probability(head)[predicted]
        inputs = score.metric_input(cfg, head, probability, samples, folds, scored)
        scorers.append(
            nested_cv.bootstrap_scorer(inputs.metric, inputs.truth, inputs.prediction, inputs.frame)
        )
    return lambda counts: float(np.mean([scorer(counts) for scorer in scorers]))


def compare(
    cfg: Config,
    samples: Samples,
    folds: Folds,
    predictions: PredictionSet,
    others: Mapping[str, PredictionSet],
) -> dict[str, Any]:
    """{"interval": of the score of `predictions`, "against": name of another set -> paired comparison}.
    Scored are the rows that all sets predict. Where the score is undefined, the reason is in
    "undefined_interval"."""
    metrics = [score.metric_of(cfg, head) for head in samples.heads]
    sign = metrics[0].sign
    predicted = np.logical_and.reduce(
        [predictions.predicted, *(other.predicted for other in others.values())]
    )
    assert predictions.fold is not None
    scored = score.scored_rows(
        samples, predictions.row[predicted].astype(np.int64), predictions.fold[predicted].astype(np.int64)
    )
    count = len(scored.rows)
    try:
        sets = (predictions, *others.values())
        scorers = [mean_scorer(cfg, samples, folds, each, predicted, scored) for each in sets]
        resampled = _resampled_scores(
            scorers, score.groups_of(samples, scored.rows), count
        )  # (sets, resamples)
        scores = [scorer(np.ones(count, np.int64)) for scorer in scorers]
    except MetricUndefined as error:
        return {"interval": None, "against": {}, "undefined_interval": str(error)}
    interval = _interval(resampled[0])
    test_rows = len(set(samples.frame["row"].to_numpy()[samples.positions("test")]))
    factor = interval_widening(count, test_rows)
    lowest, highest = np.mean([[metric.low, metric.high] for metric in metrics], axis=0)
    interval["on_test"] = {  # clipped to the range of the metric
        "low": max(float(lowest), scores[0] - factor * (scores[0] - interval["low"])),
        "high": min(float(highest), scores[0] + factor * (interval["high"] - scores[0])),
    }
    against = {}
    for name, own, drawn in zip(others, scores[1:], resampled[1:], strict=True):
        pair = _pair(sign * (scores[0] - own), sign * (resampled[0] - drawn))
        against[name] = {
            **{
                key: getattr(pair, key)
                for key in ("difference", "error", "share", "low", "high", "significant")
            },
            "text": str(pair),
        }
    return {"interval": interval, "against": against}


def _interval(resampled: NDArray[np.float64]) -> dict[str, Any]:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high), "level": LEVEL, "error": float(resampled.std(ddof=1))}


def _pair(difference: float, gains: NDArray[np.float64]) -> nested_cv.Paired:
    """gains: of each resample."""
    low, high = (float(q) for q in np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    share = float(np.mean(gains > 0) + np.mean(gains == 0) / 2)
    return nested_cv.Paired(difference, float(gains.std(ddof=1)), share, low, high, len(gains))


def interval_widening(rows: int, test_rows: int) -> float:
    """How much wider the interval of a test score is: the test set is a sample of its own, so variances add
    up."""
    return float(np.sqrt(1 + rows / test_rows)) if test_rows else 1.0


def _resampled_scores(scorers: Sequence[Scorer], groups: Any, rows: int) -> NDArray[np.float64]:
    from tqdm import tqdm

    scores, reason = [], ""
    draws = nested_cv.bootstrap_counts(rows, groups, RESAMPLES, seed=0)
    for counts in tqdm(draws, total=RESAMPLES, desc="resampling", delay=2, disable=None, leave=False):
        try:
            scores.append([scorer(counts) for scorer in scorers])
        except MetricUndefined as error:
            reason = str(error)
    if len(scores) < RESAMPLES / 2:
        raise MetricUndefined(f"too few rows of some class for an interval: {reason}")
    return np.array(scores).T
