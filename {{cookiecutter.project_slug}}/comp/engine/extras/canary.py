"""The pipeline on coin flips (flips.py): whatever scores above chance there has seen its answers.

1,000 rows of noise as frozen features, heads trained by gradient steps with a snapshot every few epochs, views, weights, stackers,
thresholds, cut points of grades. Two questions are asked. Is the honest score chance? And, sharper, without any statistics: turn the labels of one fold
round (or its features into others), and nothing that is said of this fold's rows may change, at any stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp import metrics
from comp.engine.bank import nested_cv
from comp.engine.ensemble import fast_auc
from comp.engine.extras import flips
from comp.engine.extras.findings import Leak
from comp.engine.extras.flips import FEATURES, HEAD, K, World
from comp.engine.tasks.kinds import Array, sigmoid

EPOCHS, SNAPSHOTS = 20, 2
RATE = 0.1
RECIPES = tuple(
    "abcdef"
)  # each begins with random weights of its own: members that are all alike leave a search nothing to overfit
LIMIT = 3.0  # standard errors that a score on coin flips may lie from chance
# Every two folds meet twice, each teaching the other, so errors of folds go together: the variance over worlds of what is fitted
# on the other folds is twice that of independent rows (measured over 30 worlds: 1.38 times the error, the mean at chance).
MEET_TWICE = 2**0.5


# --- the stages of one fold; each is told who teaches, and the audit asks whether it listened -----------------------------


def statistics(x: Array, y: Array, taught: NDArray[np.int64]) -> tuple[Array, Array]:
    return x[taught].mean(axis=0), x[taught].std(axis=0)


def pseudo(x: Array, y: Array, extra: Array, taught: NDArray[np.int64]) -> Array:
    """Labels of rows without any, by a model that saw the taught rows only."""
    wide = x[taught]
    weight = np.linalg.solve(wide.T @ wide + 10 * np.eye(wide.shape[1]), wide.T @ (y[taught] - 0.5))
    return (extra @ weight > 0).astype(np.float64)


def train(
    x: Array, y: Array, taught: NDArray[np.int64], extra: Array, extra_y: Array, begin: Array
) -> list[Array]:
    """Weights after every epoch."""
    wide, truth = np.vstack([x[taught], extra]), np.concatenate([y[taught], extra_y])
    weight, out = begin, []
    for _ in range(EPOCHS):
        weight = weight - RATE * wide.T @ (sigmoid(wide @ weight) - truth) / len(truth)
        out.append(weight)
    return out


def epoch(
    weights: list[Array], x: Array, y: Array, taught: NDArray[np.int64], scored: NDArray[np.int64]
) -> int:
    """Fixed beforehand: the last."""
    return len(weights) - 1


def assemble(parts: list[tuple[NDArray[np.int64], Array]], rows: int) -> Array:
    out = np.full((rows, 1), np.nan)
    for scored, said in parts:
        out[scored] = said
    return out


def stages(w: World, number: int, y: Array, x: dict[str, Array]) -> dict[str, Any]:
    """What each stage of one fold comes to, given these labels and features."""
    taught, scored = w.folds.split(number)
    mean, std = statistics(x["identity"], y, taught)
    clean = {name: (each - mean) / std for name, each in x.items()}
    extra = (w.extra - mean) / std
    labels = pseudo(clean["identity"], y, extra, taught)
    weights = {}
    for place, recipe in enumerate(RECIPES):
        begin = 0.1 * np.random.default_rng(place).normal(size=FEATURES)
        weights[recipe] = train(clean["identity"], y, taught, extra, labels, begin)
    last = {recipe: epoch(each, clean["identity"], y, taught, scored) for recipe, each in weights.items()}
    return {
        "statistics": (mean, std),
        "pseudo": labels,
        "weights": weights,
        "epoch": last,
        "x": clean,
        "scored": scored,
    }


def members(w: World, made: list[dict[str, Any]]) -> tuple[dict[str, Array], dict[str, Array]]:
    """OOF sets of all snapshots of all recipes, as stored; and the views of all recipes' last weights together."""
    step = EPOCHS // SNAPSHOTS
    found: dict[str, Array] = {}
    for recipe in RECIPES:
        for snapshot in range(SNAPSHOTS):
            at = [
                m["epoch"][recipe] if snapshot == SNAPSHOTS - 1 else (snapshot + 1) * step - 1 for m in made
            ]
            parts = [
                (m["scored"], (m["x"]["identity"][m["scored"]] @ m["weights"][recipe][e])[:, None])
                for m, e in zip(made, at, strict=True)
            ]
            found[f"{recipe}:snap{snapshot + 1}"] = assemble(parts, len(w.y))
    seen = {
        name: assemble(
            [
                (
                    m["scored"],
                    (m["x"][name][m["scored"]] @ sum(m["weights"][r][m["epoch"][r]] for r in RECIPES))[
                        :, None
                    ],
                )
                for m in made
            ],
            len(w.y),
        )
        for name in w.x
    }
    return found, seen


@dataclass(frozen=True)
class Watched:
    """A world once through the pipeline: both questions begin from here."""

    stages: list[dict[str, Any]]  # of every fold
    sets: dict[str, Array]
    methods: dict[str, flips.Ask]
    said: dict[str, tuple[Array, Array]]  # method -> honest and in-sample predictions


def watched(w: World) -> Watched:
    made = [stages(w, number, w.y, w.x) for number in range(K)]
    sets, seen = members(w, made)
    asked = flips.methods_of(w, sets, seen)
    said = {}
    for name, ask in asked.items():
        own, taught = ask(w.y, np.arange(len(w.y)))
        assert taught is not None
        said[name] = own, taught
    return Watched(made, sets, asked, said)


# --- the two questions ---------------------------------------------------------------------------------------------------


class Judge(NamedTuple):
    """How what a method says of coin flips is scored."""

    metric: str
    chance: float
    error: Callable[[int], float]  # rows -> standard error of the score of independent rows
    asked: Callable[
        [World, Array], tuple[Array, Array]
    ]  # (a world, what is said) -> (truth, what the metric takes)


AUC = Judge(
    "roc_auc",
    0.5,
    lambda rows: ((rows + 1) / (3 * rows**2)) ** 0.5,
    lambda w, said: (w.y, HEAD.row.probability(said)[:, 0]),
)
JUDGES = {
    "thresholds": Judge(
        "balanced_accuracy",
        0.5,
        lambda rows: 0.5 / rows**0.5,
        lambda w, said: (w.y, HEAD.row.label(HEAD.row.probability(said)).astype(np.float64)),
    ),
    "cut points": Judge(
        "qwk",
        0.0,
        lambda rows: 1 / rows**0.5,
        lambda w, said: (flips.grades(w, w.y).astype(np.float64), said[:, 0]),
    ),
}


def chance(w: World, first: Watched) -> dict[str, dict[str, float]]:
    """method -> honest and in-sample score, and how many of the standard errors that coin flips have it lies above chance."""
    out = {}
    for name, both in first.said.items():
        judge = JUDGES.get(name, AUC)
        # fold by fold: pooled over folds, what differs between their models would count as if rows were ordered by it
        honest_, in_sample = (
            nested_cv.fold_table(metrics.find(judge.metric), *judge.asked(w, said), w.fold).mean
            for said in both
        )
        errors = (honest_ - judge.chance) / (MEET_TWICE * judge.error(len(w.y)))
        out[name] = {"honest": honest_, "in_sample": in_sample, "errors": errors}
    return out


def selection(w: World) -> float:
    """AUC that is not there: the best of so many epochs by the scored fold, where no epoch knows anything."""
    random, gains = np.random.default_rng(0), []
    for number in np.tile(np.arange(K), 10):
        truth = w.y[w.fold == number]
        flips = random.normal(
            size=(EPOCHS, len(truth))
        )  # noise beside noise: which rows are the positive ones is all the same
        gains.append(max(fast_auc.exact_auc(each, int(truth.sum())) for each in flips) - 0.5)
    return float(np.mean(gains))


def leaks(w: World, first: Watched) -> list[Leak]:
    """Every stage that listened to the rows it is scored on. Exact: on a clean pipeline nothing is ever found."""
    by_labels, by_rows = "recomputation on permuted labels", "recomputation on other features"
    found: list[Leak] = []
    for number, here in enumerate(first.stages):
        scored = np.flatnonzero(w.fold == number)
        turned = w.y.copy()
        turned[scored] = 1 - turned[scored]
        other = {name: each.copy() for name, each in w.x.items()}
        for each in other.values():
            each[scored[::2]] = 9.0
        told, moved = stages(w, number, turned, w.x), stages(w, number, w.y, other)
        where = f"fold {number}"
        if not _same(here["statistics"], moved["statistics"]) or not _same(
            here["statistics"], told["statistics"]
        ):
            found.append(Leak("statistics fitted on validation rows", where, by_rows))
        elif not _same(here["pseudo"], told["pseudo"]):
            found.append(Leak("pseudo-labels that saw the fold", where, by_labels))
        elif not _same(list(here["weights"].values()), list(told["weights"].values())):
            found.append(Leak("in-sample base predictions", where, by_labels))
        elif here["epoch"] != told["epoch"]:
            found.append(Leak("best epoch picked on the scored fold", where, by_labels))
    for name, values in first.sets.items():
        recipe, snapshot = name.partition(":")[0], int(name[-1])
        for number, m in enumerate(first.stages):
            rows = np.flatnonzero(w.fold == number)[:20]
            e = m["epoch"][recipe] if snapshot == SNAPSHOTS else snapshot * (EPOCHS // SNAPSHOTS) - 1
            alone = m["x"]["identity"][rows] @ m["weights"][recipe][e]
            if not np.allclose(alone, values[rows, 0], atol=1e-9):
                found.append(Leak("misaligned rows", f"{name}, fold {number}", "re-prediction"))
                break
    if any(leak.name == "misaligned rows" for leak in found):
        return found
    number = 0
    rows = np.flatnonzero(w.fold == number)
    turned = w.y.copy()
    turned[rows] = 1 - turned[rows]
    for name, ask in first.methods.items():
        if not _same(first.said[name][0][rows], ask(turned, rows)[0][rows]):
            found.append(Leak("in-sample meta-model", name, by_labels))
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))
