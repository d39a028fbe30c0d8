"""Folds against what others take: a million rows in 20,000 groups beside scikit-learn's StratifiedGroupKFold, 100,000 rows of 20
labels beside iterative-stratification's MultilabelStratifiedKFold. Time, and how far folds are from the whole.

    .venv/bin/uv pip install iterative-stratification
    .venv/bin/python benchmarks/folds.py

Interleaved, medians of three, JSON. `off` is the mean over folds and labels of |rows of the label in the fold - its fifth|, as a
share of that fifth; `size` the same of the rows. Bars: groups at most twice scikit-learn's time, labels at most
iterative-stratification's, neither further off.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"))

import numpy as np
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from comp.engine.data import fold_schemes

K, TIMES = 5, 3
Fold = NDArray[np.int64]


def grouped(rows: int = 1_000_000, groups: int = 20_000, classes: int = 5) -> tuple[Fold, Fold]:
    """Groups of very different sizes, each with its own mixture of classes."""
    random = np.random.default_rng(0)
    group = random.choice(groups, rows, p=random.dirichlet(np.full(groups, 2.0)))
    mixture = random.dirichlet(np.geomspace(2.0, 0.05, classes), groups).cumsum(axis=1)
    label = (random.random(rows)[:, None] > mixture[group]).sum(axis=1).clip(max=classes - 1)
    return np.unique(group, return_inverse=True)[1], label


def several(rows: int = 100_000, labels: int = 20) -> Fold:
    random = np.random.default_rng(1)
    return (random.random((rows, labels)) < np.geomspace(0.4, 0.001, labels)).astype(np.int64)


def ours_grouped(group: Fold, label: Fold) -> Fold:
    key = fold_schemes.sort_keys(np.arange(group.max() + 1).astype(np.uint64), 0)
    return fold_schemes.balance_groups(fold_schemes.count_labels(group, label), K, key)[group]


def sklearn_grouped(group: Fold, label: Fold) -> Fold:
    return _folds(
        StratifiedGroupKFold(K, shuffle=True, random_state=0).split(label, label, group), len(label)
    )


def ours_several(labels: Fold) -> Fold:
    key = fold_schemes.sort_keys(np.arange(len(labels)).astype(np.uint64), 0)
    return fold_schemes.balance_groups(fold_schemes.count_labels(np.arange(len(labels)), labels), K, key)


def iterative(labels: Fold) -> Fold:
    split = MultilabelStratifiedKFold(K, shuffle=True, random_state=0).split(labels, labels)
    return _folds(split, len(labels))


def _folds(splits: Iterable[tuple[Any, Any]], rows: int) -> Fold:
    fold = np.empty(rows, np.int64)
    for number, (_, scored) in enumerate(splits):
        fold[scored] = number
    return fold


def off(fold: Fold, labels: Fold) -> float:
    wide = labels if labels.ndim == 2 else np.eye(labels.max() + 1, dtype=np.int64)[labels]
    there = np.stack([wide[fold == number].sum(axis=0) for number in range(K)])
    fair = wide.sum(axis=0) / K
    return float((np.abs(there - fair) / fair).mean())


def compared(
    ways: dict[str, Callable[..., Fold]], data: tuple[Fold, ...], labels: Fold
) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    folds: dict[str, Fold] = {}
    for _ in range(TIMES):
        for name, way in ways.items():
            began = time.process_time()
            folds[name] = way(*data)
            seconds[name].append(time.process_time() - began)
    return {
        name: {
            "seconds": round(float(np.median(seconds[name])), 3),
            "off": round(off(fold, labels), 6),
            "size": round(off(fold, np.zeros(len(fold), np.int64)), 6),
        }
        for name, fold in folds.items()
    }


if __name__ == "__main__":
    group, label = grouped()
    labels = several()
    said = {
        "1,000,000 rows in 20,000 groups": compared(
            {"ours": ours_grouped, "scikit-learn": sklearn_grouped}, (group, label), label
        ),
        "100,000 rows of 20 labels": compared(
            {"ours": ours_several, "iterative-stratification": iterative}, (labels,), labels
        ),
    }
    print(json.dumps(said, indent=1))
