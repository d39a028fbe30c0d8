"""What an ensemble is worth: every fold predicted with parameters from the other folds, beside the score of the rows that taught.

In-sample, honest, the gap between them; where the score would lie on other rows; and whether it really beats the best member
and the plain mean. A metric is resampled over rows, or over whole groups where there are any.
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


Scorer = Callable[[NDArray[np.int64]], float]


def mean_scorer(
    cfg: Config,
    samples: Samples,
    folds: Folds,
    said: PredictionSet,
    kept: NDArray[np.bool_],
    here: score.ScoredRows,
) -> Scorer:
    """times -> score, the mean over heads, of the rows drawn so often."""
    each = []
    for head in samples.heads:
        ask = score.metric_input(cfg, head, said.probability(head)[kept], samples, folds, here)
        each.append(nested_cv.bootstrap_scorer(ask.metric, ask.truth, ask.prediction, ask.frame))
    return lambda times: float(np.mean([one(times) for one in each]))


def compare(
    cfg: Config,
    samples: Samples,
    folds: Folds,
    said: PredictionSet,
    others: Mapping[str, PredictionSet],
) -> dict[str, Any]:
    """The interval of a score, and the paired comparison with others on the same draws, as plain numbers and a sentence."""
    metrics = [score.metric_of(cfg, head) for head in samples.heads]
    sign = metrics[0].sign
    kept = np.logical_and.reduce([said.predicted, *(each.predicted for each in others.values())])
    assert said.fold is not None
    here = score.scored_rows(samples, said.row[kept].astype(np.int64), said.fold[kept].astype(np.int64))
    count = len(here.rows)
    try:
        scorers = [mean_scorer(cfg, samples, folds, each, kept, here) for each in (said, *others.values())]
        scores = _draws(scorers, score.groups_of(samples, here.rows), count)
        whole = [one(np.ones(count, np.int64)) for one in scorers]
    except MetricUndefined as fault:
        return {"interval": None, "against": {}, "undefined_interval": str(fault)}
    low, high = np.quantile(scores[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    against = {}
    for name, own, drawn in zip(others, whole[1:], scores[1:], strict=True):
        gains = sign * (scores[0] - drawn)
        low_gain, high_gain = (float(q) for q in np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        pair = nested_cv.Paired(
            sign * (whole[0] - own),
            float(gains.std(ddof=1)),
            float(np.mean(gains > 0) + np.mean(gains == 0) / 2),
            low_gain,
            high_gain,
            len(gains),
        )
        against[name] = {
            "difference": pair.difference, "error": pair.error, "share": pair.share, "low": pair.low, "high": pair.high,
            "significant": pair.significant, "text": str(pair),
        }  # fmt: skip
    wide = test_interval_factor(count, len(set(samples.frame["row"].to_numpy()[samples.positions("test")])))
    lowest, highest = np.mean([[metric.low, metric.high] for metric in metrics], axis=0)
    on_test = {  # no further than a score can go
        "low": max(float(lowest), whole[0] - wide * (whole[0] - float(low))),
        "high": min(float(highest), whole[0] + wide * (float(high) - whole[0])),
    }
    interval = {
        "on_test": on_test,
        "low": float(low),
        "high": float(high),
        "level": LEVEL,
        "error": float(scores[0].std(ddof=1)),
    }
    return {"interval": interval, "against": against}


def test_interval_factor(rows: int, test_rows: int) -> float:
    """How much wider an interval must be to hold the score on a test set: that one is a draw of its own, of so many rows."""
    return float(np.sqrt(1 + rows / test_rows)) if test_rows else 1.0


def _draws(scorers: Sequence[Scorer], groups: Any, rows: int) -> NDArray[np.float64]:
    from tqdm import tqdm

    found, why = [], ""
    draws = nested_cv.bootstrap_counts(rows, groups, RESAMPLES, seed=0)
    for times in tqdm(draws, total=RESAMPLES, desc="resampling", delay=2, disable=None, leave=False):
        try:
            found.append([one(times) for one in scorers])
        except MetricUndefined as fault:
            why = str(fault)
    if len(found) < RESAMPLES / 2:
        raise MetricUndefined(f"too few rows of a kind for an interval: {why}")
    return np.array(found).T


def summary_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """Honest beside in-sample, against the best member and the plain mean, and the simpler thing where it is as good."""
    if record["oof"] is None:
        return [score.summary(record)]
    sign = 1 if record["direction"] == "max" else -1
    lines = []
    if record["in_sample"] is not None:
        gap = sign * (record["in_sample"] - record["oof"])
        lines.append(
            f"honest {record['oof']:.4f}, in-sample {record['in_sample']:.4f}: {abs(gap):.4f} "
            f"{'of it was not there' if gap > 0 else 'the other way'}"
        )
    if record["interval"]:
        low, high = record["interval"]["low"], record["interval"]["high"]
        far = record["interval"]["on_test"]
        lines.append(
            f"on other rows of this kind, as many: {low:.4f} to {high:.4f} in {100 * LEVEL:.0f} % of cases; "
            f"on the test rows, a draw of their own: {far['low']:.4f} to {far['high']:.4f}"
        )
    elif why := record.get("undefined_interval"):
        lines.append(f"no interval and no comparison: {why}")
    for other, pair in record["against"].items():
        lines.append(f"against {other} ({pair['score']:.4f}): {pair['text']}")
    lines.append(recommendation(name, record))
    return lines


def recommendation(name: str, record: Mapping[str, Any]) -> str:
    """The ensemble, unless something simpler scores as well."""
    sign = 1 if record["direction"] == "max" else -1
    simpler = {other: pair["score"] for other, pair in record["against"].items()} or _simpler(record)
    pairs = record["against"]

    def as_good(other: str) -> bool:
        gain = sign * (record["oof"] - simpler[other])
        return gain <= 0 or (other in pairs and not pairs[other]["significant"])

    better = [other for other in simpler if as_good(other)]
    if not better:
        return f"recommended: {name}"
    best = max(better, key=lambda other: sign * simpler[other])
    if sign * (record["oof"] - simpler[best]) > 0:
        return f"recommended: {best}; within noise: it is simpler and as good as {name}"
    return f"recommended: {best}, which is simpler and scores {simpler[best]:.4f}, not less than {name}"


def _simpler(record: Mapping[str, Any]) -> dict[str, float]:
    """Scores of the best member and the plain mean, where no comparison could be drawn."""
    sign = 1 if record["direction"] == "max" else -1
    alone = [member for member in record["members"] if member["oof"] is not None]
    found = {}
    if alone:
        best = max(alone, key=lambda member: sign * member["oof"])
        found[f"the best member {best['address']}"] = best["oof"]
    if (record["method"], record["space"]) != ("mean", "probability") and record["plain_mean"][
        "oof"
    ] is not None:
        found["the plain mean"] = record["plain_mean"]["oof"]
    return found
