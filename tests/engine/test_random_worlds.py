"""Random labels and random predictions: a score must be at chance, whatever is fitted on the way to it.

The table of all worlds: python -m pytest tests/test_random_worlds.py -m slow -k table -s
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from comp import metrics
from comp.engine.bank import score
from comp.engine.data import folds, samples
from comp.engine.tasks.kinds import Head

WORLDS = 150
GRADES = Head("grade", "ordinal", ("grade",), ("target.grade",), ("0", "1", "2", "3"))
TAGS = Head("tags", "multilabel", tuple("abcde"), tuple(f"target.{each}" for each in "abcde"))
EVEN, UNEVEN = (1, 1, 1, 1, 1), (8, 4, 2, 1, 1)  # sizes of the folds, as shares
CASES = [(GRADES, "qwk"), (GRADES, "accuracy"), (GRADES, "f1_macro"), (TAGS, "f1_macro"), (TAGS, "f1_micro")]


def labels(head: Head, random: np.random.Generator, rows: int) -> Any:
    if head is GRADES:
        return random.integers(0, 4, (rows, 1)) * 1.0
    return (random.random((rows, 5)) < 0.2) * 1.0


def world(
    seed: int, rows: int, head: Head, sizes: tuple[int, ...] = EVEN
) -> tuple[samples.Samples, folds.Folds, Any]:
    """Samples and folds with random labels, and independent predictions."""
    random = np.random.default_rng([seed, rows])
    ids = [f"{i:05d}" for i in range(rows)]
    frame = pd.DataFrame({"id": ids, "weight": 1.0, "source": "train", "row": ids})
    frame[list(head.columns)] = labels(head, random, rows)
    table = samples.Samples(frame, (head,), f"world{seed}")
    fold = random.permutation(np.arange(rows) * sum(sizes) // rows)
    fold = np.repeat(np.arange(len(sizes)), sizes)[fold]
    meta = {"k": len(sizes), "repeats": 1, "rule": "others", "gap": 0.0, "hash": f"world{seed}"}
    lines = pd.DataFrame({"id": ids, "repeat": 0, "fold": fold})
    said = random.uniform(-0.5, 3.5, (rows, 1)) if head is GRADES else random.uniform(0.4, 1, (rows, 5))
    return table, folds.Folds(lines, meta, table), said


def predictions_of(table: samples.Samples, split: folds.Folds, said: Any, name: str) -> Any:
    rows = np.arange(len(said))
    return score.metric_predictions(
        metrics.find(name), table.heads[0], said, table, split, rows, split.assignment[0]
    )[0]


@pytest.mark.parametrize(("head", "name"), CASES, ids=lambda each: getattr(each, "task", each))
def test_labels_of_a_fold_do_not_influence_its_predictions(head: Head, name: str) -> None:
    """Neither its cut points, nor whether fitted ones are used, nor whether every row gets a label."""
    wide = head is TAGS
    for seed in range(3 if wide else 12):
        table, split, said = world(seed, 120, head, UNEVEN)
        if wide:  # no row is without a label but in fold 0
            table.frame["target.e"] = 1.0
            said = said - 0.35
        before, fold = predictions_of(table, split, said, name), split.assignment[0]
        mine = fold == seed % 5
        values = table.frame[list(head.columns)].to_numpy().copy()
        values[mine] = 0.0 if wide else 3 - values[mine]
        table.frame[list(head.columns)] = values
        assert (predictions_of(table, split, said, name)[mine] == before[mine]).all(), seed


def test_a_single_training_fold_is_split_into_parts() -> None:
    """Two folds: shrunken grades need fitted cut points, for others rounding is as good."""
    for shrunk in (0.3, 1.0):
        table, split, _ = world(0, 200, GRADES, (1, 1))
        truth = table.truth(GRADES, np.arange(200))
        value = 1.5 + shrunk * (truth - 1.5) + 0.1 * shrunk * np.random.default_rng(0).normal(size=200)
        right = predictions_of(table, split, value[:, None], "qwk") == truth
        assert right.mean() > 0.95, shrunk


def scored(seed: int, rows: int, head: Head, name: str, sizes: tuple[int, ...] = EVEN) -> tuple[float, float]:
    """(score of the predictions, their chance level: the score against new random labels)"""
    table, split, said = world(seed, rows, head, sizes)
    answers, metric = predictions_of(table, split, said, name), metrics.find(name)
    random = np.random.default_rng([seed, rows, 1])
    anew = [head.spec.encode_target(labels(head, random, rows)) for _ in range(5)]
    truth = table.truth(head, np.arange(rows))
    return metric(truth, answers), float(np.mean([metric(each, answers) for each in anew]))


def line(rows: int, head: Head, name: str, sizes: tuple[int, ...] = EVEN) -> tuple[float, float]:
    """(mean above chance, its standard error) over all worlds; printed for the table."""
    found = np.array([scored(seed, rows, head, name, sizes) for seed in range(WORLDS)])
    above = found[:, 0] - found[:, 1]
    mean, error = float(above.mean()), float(above.std(ddof=1) / WORLDS**0.5)
    kind = "even" if sizes == EVEN else "unequal"
    print(
        f"{head.task:10} {name:9} {rows:5} rows, {kind:7} folds: {found[:, 0].mean():.4f} ± "
        f"{found[:, 0].std(ddof=1) / WORLDS**0.5:.4f}, chance {found[:, 1].mean():.4f}, above it "
        f"{mean:+.4f} ± {error:.4f}"
    )
    return mean, error


def test_grades_of_random_worlds_are_at_chance() -> None:
    found = np.array([scored(seed, 300, GRADES, "qwk")[0] for seed in range(WORLDS)])
    assert found.mean() <= 2 * found.std(ddof=1) / WORLDS**0.5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "unequal"])
@pytest.mark.parametrize("rows", [300, 1000])
@pytest.mark.parametrize(("head", "name"), CASES, ids=lambda each: getattr(each, "task", each))
def test_table_of_random_worlds(head: Head, name: str, rows: int, sizes: tuple[int, ...]) -> None:
    mean, error = line(rows, head, name, sizes)
    assert mean <= 2 * error
