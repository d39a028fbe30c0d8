"""comp tta: which test-time views are worth their time, and the space they are averaged in.

Every candidate is predicted once for all OOF rows (tta_views.py). The search is greedy: from the plain view
on it adds the view with the largest gain in score per millisecond, as long as one gains, within a time limit.
It runs once per space, and the space with the best result is taken. The nested score of a fold comes from a
search on the other folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import score
from comp.engine.bank.metric import Metric
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import PredictionSet, average
from comp.engine.config import resolve
from comp.engine.ensemble import comparison
from comp.engine.errors import UserError
from comp.engine.extras import tta_views
from comp.engine.extras.tta_views import PLAIN, Candidates
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Array, Head

SPACES = ("probability", "logit", "geometric")


# --- the search ---------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    space: str
    views: tuple[str, ...]


PLAIN_CHOICE = Choice("probability", (PLAIN,))


@dataclass(frozen=True)
class ViewSearch:
    predictions: Mapping[str, NDArray[Any]]  # view -> (rows, outputs of all heads), as stored
    truths: Sequence[NDArray[Any]]  # of each head
    heads: Sequence[Head]
    metrics: Sequence[Metric]  # of each head
    spaces: Sequence[str]
    ms: Mapping[str, float]  # view -> milliseconds per image
    max_ms: float = float("inf")  # per image, all views together
    frame: Any = None  # what metrics of groups and weights need

    def search(self, at: Any = slice(None)) -> Choice:
        """The best choice on these rows; of equal spaces the first."""
        choices = [self.search_space(space, at) for space in self.spaces]
        scores = [self._score(choice, at) for choice in choices]
        best = max(scores)
        return next(choice for own, choice in zip(scores, choices, strict=True) if own >= best - 1e-12)

    def search_space(self, space: str, at: Any = slice(None)) -> Choice:
        """The plain view, and those that gain when averaged with it in this space."""
        chosen = Choice(space, (PLAIN,))
        reached, spent = self._score(chosen, at), self.ms[PLAIN]
        while True:
            left = [
                name
                for name in self.predictions
                if name not in chosen.views and spent + self.ms[name] <= self.max_ms + 1e-9
            ]
            larger = [Choice(space, (*chosen.views, name)) for name in left]
            gains = [self._score(choice, at) - reached for choice in larger]
            rates = [gain / self.ms[name] for gain, name in zip(gains, left, strict=True)]
            best = int(np.argmax(rates)) if rates else -1
            if best < 0 or not gains[best] > 1e-12:
                return chosen
            chosen, reached, spent = larger[best], reached + gains[best], spent + self.ms[left[best]]

    def average(self, choice: Choice, at: Any = slice(None)) -> Array:
        """(rows, outputs of all heads): the mean over the chosen views."""
        views = [by_head(self.heads, self.predictions[name][at]) for name in choice.views]
        return np.hstack(
            [average([view[i] for view in views], head, choice.space) for i, head in enumerate(self.heads)]
        )

    def _score(self, choice: Choice, at: Any) -> float:
        """sign * score, the mean over heads: more is better."""
        frame = None if self.frame is None else self.frame.iloc[at]
        predictions = by_head(self.heads, self.average(choice, at))
        scores = []
        for head, metric, truth, own in zip(self.heads, self.metrics, self.truths, predictions, strict=True):
            try:
                predicted = score.default_predictions(metric, head, head.spec.to_probability(own))
                value = metric(score.scored_columns(head, truth[at]), predicted, frame)
            except MetricUndefined:
                return -np.inf
            scores.append(metric.sign * value)
        return float(np.mean(scores))


def by_head(heads: Sequence[Head], stored: NDArray[Any]) -> list[NDArray[Any]]:
    """(rows, outputs of all heads) -> (rows, outputs) of each head."""
    return np.split(stored, np.cumsum([len(head.outputs) for head in heads])[:-1], axis=1)


# --- the verb -----------------------------------------------------------------------------------------------


def tta(run: str, max_ms: float | None = None, names: str | None = None) -> dict[str, Any]:
    """`max_ms`: limit per image and checkpoint, all views together. `names`: candidate views, separated by
    commas."""
    cfg = resolve.load(paths.root(), "base").config  # the metric of configs/ now, not of the stored config
    candidates = tta_views.predict_candidates(run, names)
    scorer = Scorer(candidates, cfg)
    search = _view_search(candidates, scorer, max_ms)
    alone = {name: scorer.score(values) for name, values in search.predictions.items()}
    metric, base = search.metrics[0], alone[PLAIN]
    _print_alone(metric, alone, search.ms)
    options = _by_space(search, scorer)
    nested = score.nested_predict(
        scorer.samples, scorer.folds, scorer.rows, scorer.fold, search.search, search.average, PLAIN_CHOICE
    )
    best: Choice = nested.final
    nested_score, in_sample = scorer.score(nested.prediction), scorer.score(search.average(best))
    comparison = scorer.compare(nested.prediction, search.predictions[PLAIN])
    more_ms = sum(search.ms[name] for name in best.views) - search.ms[PLAIN]
    if np.array_equal(nested.prediction, search.predictions[PLAIN]):
        comparison = f"identical: only {PLAIN} was chosen"
    print(
        f"views and space chosen on other folds: nested score {nested_score:.4f}, in-sample "
        f"{in_sample:.4f}, {PLAIN} {base:.4f}: "
        f"{comparison}; {more_ms:.2f} ms more per image"
    )
    better = metric.sign * (nested_score - base) > 0 and len(best.views) > 1
    chosen = {
        "views": list(best.views),
        "space": best.space,
        "nested": nested_score,
        "in_sample": in_sample,
        "text": comparison,
    }
    record = {"plain": base, "alone": alone, "options": options, "chosen": chosen if better else None}
    artifacts.write_json(paths.run_folder(run) / "tta.json", record)
    if better:
        views = ",".join(best.views)
        print(
            f"recommended: {views} in {best.space}\nnext: comp predict {run} --tta {views} --space "
            f"{best.space}"
        )
    else:
        print(
            f"recommended: predict.tta: [{PLAIN}]; no views have a better nested score than {PLAIN} "
            f"({base:.4f})\nnext: comp bank"
        )
    return record


class Scorer:
    """Scores predictions of the rows that have any, with thresholds fitted on other folds."""

    def __init__(self, candidates: Candidates, cfg: Any):
        self.cfg, self.samples, self.folds = cfg, candidates.context.samples, candidates.context.folds
        self.plain = candidates.sets[PLAIN]
        self.predicted = self.plain.predicted
        assert self.plain.fold is not None
        self.rows = self.plain.row[self.predicted].astype(np.int64)
        self.fold = self.plain.fold[self.predicted].astype(np.int64)
        self.scored_rows = score.scored_rows(self.samples, self.rows, self.fold)

    def as_set(self, stored: NDArray[Any]) -> PredictionSet:
        plain, heads = self.plain, self.samples.heads
        assert plain.fold is not None
        parts = by_head(heads, np.asarray(stored, np.float64))
        by_name = {head.name: part for head, part in zip(heads, parts, strict=True)}
        return PredictionSet(plain.row[self.predicted], plain.fold[self.predicted], by_name, plain.meta)

    def score(self, stored: NDArray[Any]) -> float:
        """The mean over heads."""
        found, predictions = [], self.as_set(stored)
        for head in self.samples.heads:
            own = score.metric_input(
                self.cfg, head, predictions.probability(head), self.samples, self.folds, self.scored_rows
            )
            found.append(own.metric(own.truth, own.prediction, own.frame))
        return float(np.mean(found))

    def compare(self, stored: NDArray[Any], plain: NDArray[Any]) -> str:
        """A paired comparison with the plain view, as a sentence."""
        others = {PLAIN: self.as_set(plain)}
        found = comparison.compare(self.cfg, self.samples, self.folds, self.as_set(stored), others)
        if not found["against"]:
            return f"no comparison: {found['undefined_interval']}"
        return str(found["against"][PLAIN]["text"])


def _view_search(candidates: Candidates, scorer: Scorer, max_ms: float | None) -> ViewSearch:
    samples, ms = candidates.context.samples, candidates.ms
    if max_ms is not None and max_ms < ms[PLAIN]:
        raise UserError(
            "time-limit-too-low",
            where=f"--max-ms {max_ms:g}",
            what=f"the view {PLAIN} takes {ms[PLAIN]:.2f} ms per image here",
        )
    heads, rows = samples.heads, scorer.rows
    return ViewSearch(
        {
            name: np.hstack([predictions.heads[head.name][scorer.predicted] for head in heads])
            for name, predictions in candidates.sets.items()
        },
        [samples.truth(head, rows) for head in heads],
        heads,
        [score.metric_of(scorer.cfg, head) for head in heads],
        [space for space in SPACES if all(space in head.spec.spaces for head in heads)],
        ms,
        float("inf") if max_ms is None else max_ms,
        score.metric_frame(samples, rows),
    )


def _by_space(search: ViewSearch, scorer: Scorer) -> list[dict[str, Any]]:
    """The choice of each space on all rows."""
    options = []
    for space in search.spaces:
        chosen = search.search_space(space)
        ms = sum(search.ms[name] for name in chosen.views)
        in_sample = scorer.score(search.average(chosen))
        options.append({"space": space, "views": list(chosen.views), "in_sample": in_sample})
        print(f"{space}: {', '.join(chosen.views)}: in-sample {in_sample:.4f}, {ms:.2f} ms per image")
    return options


def _print_alone(metric: Metric, alone: Mapping[str, float], ms: Mapping[str, float]) -> None:
    base, lines = alone[PLAIN], []
    for name, value in alone.items():
        gain = metric.sign * (value - base)
        lines.append([name, f"{value:.4f}", f"{gain:+.4f}", f"{ms[name]:.2f}"])
    numbers = [metric.name, "gain", "ms per image"]
    print(text_table.render(["view", *numbers], lines, numbers))
