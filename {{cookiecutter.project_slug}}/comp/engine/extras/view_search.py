"""Views for test-time augmentation, and the space they are averaged in, chosen by evidence: most OOF score per millisecond, under a
ceiling of time, scored on folds that chose neither.

The choice is a greedy one: from the plain picture on, the view that gains most for its time, as long as one gains. So it goes in
every space, and the space whose views end up best is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.bank.predictions import average
from comp.engine.tasks.kinds import Array, Head
from comp.metrics import Metric

PLAIN = "identity"
Views = Mapping[str, NDArray[Any]]  # view -> (rows, outputs of all heads side by side), as stored


class Choice(NamedTuple):
    space: str
    views: tuple[str, ...]


PLAIN_CHOICE = Choice("probability", (PLAIN,))


@dataclass(frozen=True)
class Question:
    views: Views
    truths: Sequence[NDArray[Any]]  # of each head
    heads: Sequence[Head]
    metrics: Sequence[Metric]
    spaces: Sequence[str]
    cost: Mapping[str, float]  # ms an image, each view a pass through the network
    ceiling: float = float("inf")  # ms an image, all views together
    frame: Any = None

    def choose(self, at: Any = slice(None)) -> Choice:
        """By these rows alone; of equal spaces the first."""
        found = [(self._reached(choice, at), choice) for choice in (self.within(s, at) for s in self.spaces)]
        best = max(reached for reached, _ in found)
        return next(choice for reached, choice in found if reached >= best - 1e-12)

    def within(self, space: str, at: Any = slice(None)) -> Choice:
        """The plain view, and those that gain beside it in this space."""
        chosen = Choice(space, (PLAIN,))
        reached, spent = self._reached(chosen, at), self.cost[PLAIN]
        while True:
            left = [
                n for n in self.views if n not in chosen.views and spent + self.cost[n] <= self.ceiling + 1e-9
            ]
            larger = [Choice(space, (*chosen.views, name)) for name in left]
            gains = [self._reached(each, at) - reached for each in larger]
            worth = [gain / self.cost[name] for gain, name in zip(gains, left, strict=True)]
            best = int(np.argmax(worth)) if worth else -1
            if best < 0 or not gains[best] > 1e-12:
                return chosen
            chosen, reached, spent = larger[best], reached + gains[best], spent + self.cost[left[best]]

    def said(self, choice: Choice, at: Any = slice(None)) -> Array:
        seen = [by_head(self.heads, self.views[name][at]) for name in choice.views]
        return np.hstack(
            [average([view[i] for view in seen], head, choice.space) for i, head in enumerate(self.heads)]
        )

    def _reached(self, choice: Choice, at: Any) -> float:
        """sign * score, the mean over heads: more is better."""
        frame = None if self.frame is None else self.frame.iloc[at]
        said = by_head(self.heads, self.said(choice, at))
        try:
            return float(np.mean([
                metric.sign * metric(score.scored_columns(head, truth[at]), score.default_predictions(metric, head, head.row.probability(one)), frame)
                for head, metric, truth, one in zip(self.heads, self.metrics, self.truths, said, strict=True)
            ]))  # fmt: skip
        except MetricUndefined:
            return -np.inf


def by_head(heads: Sequence[Head], stored: NDArray[Any]) -> list[NDArray[Any]]:
    """(rows, outputs of all heads) -> one of (rows, outputs) a head."""
    return np.split(stored, np.cumsum([len(head.outputs) for head in heads])[:-1], axis=1)
