"""What the fits of an ensemble share: configuration, samples, folds, the predicted rows, and refits of nested
ensembles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv, score
from comp.engine.bank.metric import Metric
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.ensemble.blend_config import Blend
from comp.engine.store import paths
from comp.engine.tasks.kinds import Array, Head

HeadValues = dict[str, NDArray[np.float32]]  # head -> (rows, outputs), as stored
Positions = NDArray[np.int64]
# Of a member that was itself fitted on labels: positions among the OOF rows -> its predictions of these rows
# when they are the only rows it may be fitted on.
Refit = Callable[[Positions], HeadValues]


@dataclass(frozen=True)
class Setup:
    cfg: Config
    samples: samples.Samples
    folds: folds.Folds


def load_setup() -> Setup:
    """Of the current project. The config is base.yaml, not a run's: members may come from several runs, and
    they are scored by the competition's current metric."""
    cfg = resolve.load(paths.root(), "base").config
    table = samples.load()
    return Setup(cfg, table, folds.load(table))


@dataclass(frozen=True)
class Context(Setup):
    """One ensemble while it is fitted. `at` in its methods: positions among `rows`."""

    blend: Blend
    rows: Positions  # of the samples table: the OOF rows that all members predict
    fold: Positions  # of each of these rows
    refits: Mapping[int, Refit]  # place of a member -> its refit

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
        """stored: predictions of the rows `at`."""
        scored = score.scored_rows(self.samples, self.rows[at], self.fold[at])
        probability = head.spec.to_probability(np.asarray(stored, np.float64))
        return score.metric_input(self.cfg, head, probability, self.samples, self.folds, scored), scored

    def nested_predict(
        self, at: Positions, fit: Any, apply: Any, fallback: Any
    ) -> nested_cv.NestedPrediction:
        """Within the rows `at` alone; fit and apply receive positions among these."""
        return score.nested_predict(
            self.samples, self.folds, self.rows[at], self.fold[at], fit, apply, fallback
        )
