"""What every head of an ensemble stands on while it is fitted: rows, folds, metric, and who may teach whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv, score
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble.blend_config import Blend
from comp.engine.tasks.kinds import Array, Head
from comp.metrics import Metric

Stored = dict[str, NDArray[np.float32]]
Positions = NDArray[np.int64]
# Of a member that labels had a hand in: positions among the OOF rows -> what it says of them where only they taught it.
Refit = Callable[[Positions], Stored]


@dataclass(frozen=True)
class Context:
    cfg: Config
    blend: Blend
    samples: Samples
    folds: Folds
    rows: Positions  # predicted OOF rows
    fold: Positions
    refits: Mapping[int, Refit]  # member -> asked with positions among `rows`

    @property
    def frame(self) -> Any:
        return self.samples.frame.iloc[self.rows]

    @property
    def all_rows(self) -> Positions:
        return np.arange(len(self.rows))

    def metric(self, head: Head) -> Metric:
        return score.metric_of(self.cfg, head)

    def metric_input(
        self, head: Head, stored: Array, at: Positions
    ) -> tuple[score.MetricInput, score.ScoredRows]:
        """at: places among `rows`, and stored what is said of these."""
        here = score.scored_rows(self.samples, self.rows[at], self.fold[at])
        said = head.spec.to_probability(np.asarray(stored, np.float64))
        return score.metric_input(self.cfg, head, said, self.samples, self.folds, here), here

    def nested_predict(self, at: Positions, fit: Any, apply: Any, first: Any) -> nested_cv.NestedPrediction:
        """As if there were no other rows than `at`; fit and apply are asked with places among these."""
        return score.nested_predict(self.samples, self.folds, self.rows[at], self.fold[at], fit, apply, first)
