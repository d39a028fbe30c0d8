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

from comp import score
from comp.metrics import Metric, MetricUndefined
from comp.predictions import average
from comp.tasks import Array, Head

PLAIN = "identity"
Views = Mapping[str, NDArray[Any]]  # view -> (rows, outputs), as stored


class Choice(NamedTuple):
    space: str
    views: tuple[str, ...]


PLAIN_CHOICE = Choice("probability", (PLAIN,))


@dataclass(frozen=True)
class Question:
    views: Views
    truth: NDArray[Any]
    head: Head
    metric: Metric
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
        return average([self.views[name][at] for name in choice.views], self.head, choice.space)

    def _reached(self, choice: Choice, at: Any) -> float:
        """sign * score: more is better."""
        answer = score.plain(self.metric, self.head, self.head.row.probability(self.said(choice, at)))
        truth = score.graded_only(self.head, self.truth[at])
        try:
            return self.metric.sign * self.metric(
                truth, answer, None if self.frame is None else self.frame.iloc[at]
            )
        except MetricUndefined:
            return -np.inf
