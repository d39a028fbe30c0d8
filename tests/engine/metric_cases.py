"""A random case for every metric and task, as the metric wants it: truth, prediction."""

from __future__ import annotations

from typing import Any

import numpy as np

from comp.engine.bank.metric import Metric
from comp.metrics import METRICS

PAIRS = [(name, task) for name, metric in METRICS.items() for task in metric.tasks]


def case(metric: Metric, task: str, rows: int = 60, seed: int = 0, skill: float = 0.5) -> tuple[Any, Any]:
    """Predictions that follow truth a little, with ties, every class in truth."""
    random = np.random.default_rng(seed)
    noise = random.normal
    if task in ("regression", "ordinal"):
        truth = np.arange(rows) % 5.0 if task == "ordinal" else np.abs(noise(size=rows) * 3)
        value = np.abs(skill * truth + noise(size=rows)).round(1)
        return truth, (np.clip(np.rint(value), 0, 4) if metric.needs == "label" else value)
    if task == "multilabel":
        columns = 9 if metric.needs == "ranking" else 4
        truth = (random.random((rows, columns)) < 0.4).astype(float)
        truth[:2] = [[1] * columns, [0] * columns]
        score = (skill * truth + random.random((rows, columns))).round(2)
    else:
        classes = 2 if task == "binary" else 7
        truth = random.permutation(np.arange(rows) % classes).astype(float)
        score = (skill * np.eye(classes)[truth.astype(int)] + random.random((rows, classes)) + 0.01).round(2)
    if metric.needs == "ranking":
        return truth, np.argsort(-score, axis=1, kind="stable")[:, :5]
    if task == "multilabel":
        return truth, (score > 0.7).astype(int) if metric.needs == "label" else score / 2
    probability = score / score.sum(axis=1, keepdims=True)
    if metric.needs == "label":
        return truth, probability.argmax(axis=1)
    return truth, probability[:, 1].round(2) if task == "binary" else probability
