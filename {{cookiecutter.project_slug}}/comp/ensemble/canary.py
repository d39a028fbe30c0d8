"""A small world whose labels are coin flips, sent through the pipeline: whatever scores above chance there has seen its answers.

1,000 rows of noise as frozen features, heads trained by gradient steps with a snapshot every few epochs, views, weights, stackers,
thresholds. Two questions are asked. Is the honest score chance? And, sharper, without any statistics: turn the labels of one fold
round (or its features into others), and nothing that is said of this fold's rows may change, at any stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import folds, honest, metrics, samples
from comp.ensemble import after, fast, fitted, fitting, methods, views, worth
from comp.ensemble.declare import Blend
from comp.predictions import PredictionSet
from comp.tasks import Array, Head, sigmoid

ROWS, FEATURES, K, EPOCHS, SNAPSHOTS = 1000, 24, 5, 20, 4
HEAD = Head("label", "binary", ("label",), ("target.label",), ("0", "1"))
METHODS = ("mean", "rank", "greedy", "hill", "slsqp", "logistic", "ridge", "elastic_net", "mlp")
# as much of a config as an ensemble without `after` asks for: its metric
CFG: Any = SimpleNamespace(competition=SimpleNamespace(metric="roc_auc", tasks={"label": "binary"}))
LOWER = 3  # ensembles that the second level is made from
LIMIT = 3.0  # standard errors that a score on coin flips may lie from chance
# Every two folds meet twice, each teaching the other, so errors of folds go together: the variance over worlds of what is fitted
# on the other folds is twice that of independent rows (measured over 30 worlds: 1.38 times the error, the mean at chance).
MEET_TWICE = 2**0.5


@dataclass(frozen=True)
class World:
    samples: samples.Samples
    folds: folds.Folds
    x: dict[str, Array]  # view -> frozen features
    extra: Array  # features of rows without labels, for pseudo-labels
    y: Array

    @property
    def fold(self) -> NDArray[np.int64]:
        return self.folds.of_sample[0]


class Leak(NamedTuple):
    name: str
    where: str
    knew: str  # hash | provenance | recomputation on permuted labels | re-prediction


def world(seed: int, rows: int = ROWS) -> World:
    random = np.random.default_rng([seed, 77])
    ids = [f"{i:05d}" for i in range(rows)]
    y = random.permutation(np.arange(rows) % 2).astype(np.float64)
    frame = pd.DataFrame({"id": ids, "weight": 1.0, "source": "train", "row": ids, "target.label": y})
    table = samples.Samples(frame, (HEAD,), f"canary{seed}")
    number = np.empty(rows, np.int64)
    for label in (
        0,
        1,
    ):  # stratified: else a fold with many positives is taught by few, and its score is below chance
        mine = random.permutation(np.flatnonzero(y == label))
        number[mine] = np.arange(len(mine)) % K
    lines = pd.DataFrame({"id": ids, "repeat": 0, "fold": number})
    meta = {"k": K, "repeats": 1, "rule": "others", "gap": 0.0, "hash": f"canary{seed}"}
    x = random.normal(size=(rows, FEATURES))
    seen = {name: x + 0.5 * random.normal(size=x.shape) for name in ("hflip", "vflip")}
    return World(
        table,
        folds.Folds(lines, meta, table),
        {"identity": x, **seen},
        random.normal(size=(300, FEATURES)),
        y,
    )


# --- the stages of one fold; each is told who teaches, and the audit asks whether it listened -----------------------------


def statistics(x: Array, y: Array, taught: NDArray[np.int64]) -> tuple[Array, Array]:
    return x[taught].mean(axis=0), x[taught].std(axis=0)


def pseudo(x: Array, y: Array, extra: Array, taught: NDArray[np.int64]) -> Array:
    """Labels of rows without any, by a model that saw the taught rows only."""
    wide = x[taught]
    weight = np.linalg.solve(wide.T @ wide + 10 * np.eye(wide.shape[1]), wide.T @ (y[taught] - 0.5))
    return (extra @ weight > 0).astype(np.float64)


def train(
    x: Array, y: Array, taught: NDArray[np.int64], extra: Array, extra_y: Array, rate: float
) -> list[Array]:
    """Weights after every epoch."""
    wide, truth = np.vstack([x[taught], extra]), np.concatenate([y[taught], extra_y])
    weight, out = np.zeros(wide.shape[1]), []
    for _ in range(EPOCHS):
        weight = weight - rate * wide.T @ (sigmoid(wide @ weight) - truth) / len(truth)
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


RATES = (0.3, 1.0, 3.0)


def stages(w: World, number: int, y: Array, x: dict[str, Array]) -> dict[str, Any]:
    """What each stage of one fold comes to, given these labels and features."""
    taught, scored = w.folds.split(number)
    mean, std = statistics(x["identity"], y, taught)
    clean = {name: (each - mean) / std for name, each in x.items()}
    extra = (w.extra - mean) / std
    labels = pseudo(clean["identity"], y, extra, taught)
    weights = {rate: train(clean["identity"], y, taught, extra, labels, rate) for rate in RATES}
    last = {rate: epoch(each, clean["identity"], y, taught, scored) for rate, each in weights.items()}
    return {
        "statistics": (mean, std),
        "pseudo": labels,
        "weights": weights,
        "epoch": last,
        "x": clean,
        "scored": scored,
    }


def members(w: World, made: list[dict[str, Any]]) -> tuple[dict[str, Array], dict[str, Array]]:
    """OOF sets of all snapshots of all recipes, as stored; and the views of the first recipe's last weights."""
    step = EPOCHS // SNAPSHOTS
    found: dict[str, Array] = {}
    for rate in RATES:
        for snapshot in range(SNAPSHOTS):
            at = [m["epoch"][rate] if snapshot == SNAPSHOTS - 1 else (snapshot + 1) * step - 1 for m in made]
            parts = [
                (m["scored"], (m["x"]["identity"][m["scored"]] @ m["weights"][rate][e])[:, None])
                for m, e in zip(made, at, strict=True)
            ]
            found[f"{rate:g}:snap{snapshot + 1}"] = assemble(parts, len(w.y))
    seen = {
        name: assemble(
            [
                (m["scored"], (m["x"][name][m["scored"]] @ m["weights"][1.0][m["epoch"][1.0]])[:, None])
                for m in made
            ],
            len(w.y),
        )
        for name in w.x
    }
    return found, seen


def methods_of(
    w: World, found: dict[str, Array], seen: dict[str, Array]
) -> dict[str, Callable[[Array], tuple[Array, Array]]]:
    """name -> labels -> (honest, in-sample) predictions, by the same code that ensembles are made with."""
    parts, rows = list(found.values()), np.arange(len(w.y))
    auc, even_handed = metrics.find("roc_auc"), metrics.find("balanced_accuracy")
    names = list(found)

    def nest(fit: Any, apply: Any, first: Any) -> Any:
        return worth.nested(w.samples, w.folds, rows, w.fold, fit, apply, first)

    def blended(method: str) -> Callable[[Array], tuple[Array, Array]]:
        blend = Blend.model_validate({"members": names, "method": method})
        space = "logit" if method in ("logistic", "ridge", "elastic_net", "mlp") else "probability"

        def run(y: Array) -> tuple[Array, Array]:
            given = methods.Teaching(HEAD, auc, space, parts, y, w.samples.frame, w.fold)

            def apply(params: Any, at: NDArray[np.int64]) -> Array:
                return fitted.predict(params, [part[at] for part in parts], HEAD, space)

            out = nest(lambda at: methods.fit(blend, given.at(at)), apply, methods.even(blend, len(parts)))
            return out.prediction, apply(out.final, rows)

        return run

    def later(step: str) -> Callable[[Array], tuple[Array, Array]]:
        base = parts[-1]

        def run(y: Array) -> tuple[Array, Array]:
            out = nest(
                lambda at: after.fit(step, base[at], y[at], HEAD, even_handed, None),
                lambda params, at: after.apply(params, base[at], HEAD),
                {"kind": "scaled", "slope": 1.0, "shift": [0.0]},
            )
            return out.prediction, after.apply(out.final, base, HEAD)

        return run

    def tta(y: Array) -> tuple[Array, Array]:
        chosen, said = views.honest(seen, y, HEAD, auc, "probability", 3, nest)
        return said, views.said(seen, chosen, HEAD, "probability")

    def two_levels(y: Array) -> tuple[Array, Array]:
        """A stack of stacks: the members are dealt to LOWER of them."""
        table = w.samples.frame.assign(**{"target.label": y})
        told = samples.Samples(table, w.samples.heads, w.samples.hash)
        split = folds.Folds(w.folds.frame, w.folds.meta, told)
        refits: dict[str, fitting.Refit] = {}
        below = []
        for i in range(LOWER):
            names_, own = names[i::LOWER], [as_set(found[name]) for name in names[i::LOWER]]
            blend = Blend.model_validate({"members": names_, "method": "logistic"})
            below.append(as_set(fitting.make(CFG, blend, told, split, own, (), {}, {}).honest["label"]))
            refits[f"level1-{i}"] = partial(fitting.refit, CFG, blend, told, split, own, {})
        blend = Blend.model_validate({"members": list(refits), "method": "logistic"})
        made = fitting.make(CFG, blend, told, split, below, (), {}, refits)
        assert made.in_sample is not None
        return made.honest["label"].astype(np.float64), made.in_sample["label"].astype(np.float64)

    def as_set(stored: NDArray[Any]) -> PredictionSet:
        return PredictionSet(rows.astype(np.int32), w.fold.astype(np.int16), {"label": stored}, {})

    return (
        {method: blended(method) for method in METHODS if method != "rank"}
        | {step: later(step) for step in ("temperature", "isotonic", "thresholds")}
        | {"TTA choice": tta, "two levels": two_levels}
    )


# --- the two questions ---------------------------------------------------------------------------------------------------


def chance(w: World) -> dict[str, dict[str, float]]:
    """method -> honest and in-sample AUC (balanced accuracy of thresholds), with the standard error that coin flips have."""
    made = [stages(w, number, w.y, w.x) for number in range(K)]
    found, seen = members(w, made)
    out = {}
    for name, run in methods_of(w, found, seen).items():
        own, taught = run(w.y)
        label = name == "thresholds"
        metric = metrics.find("balanced_accuracy" if label else "roc_auc")
        error = MEET_TWICE * (
            0.5 / np.sqrt(len(w.y)) if label else np.sqrt((len(w.y) + 1) / (3 * len(w.y) ** 2))
        )
        # fold by fold: pooled over folds, what differs between their models would count as if rows were ordered by it
        score = honest.fold_table(metric, w.y, _said(own, label), w.fold).mean
        out[name] = {
            "honest": score,
            "in_sample": honest.fold_table(metric, w.y, _said(taught, label), w.fold).mean,
            "errors": (score - 0.5) / error,
        }
    return out


def _said(stored: Array, label: bool) -> Array:
    p = HEAD.row.probability(stored)
    return HEAD.row.label(p).astype(np.float64) if label else p[:, 0]


def selection(w: World) -> float:
    """AUC that is not there: the best of so many epochs by the scored fold, where no epoch knows anything."""
    random, gains = np.random.default_rng(0), []
    for number in np.tile(np.arange(K), 10):
        truth = w.y[w.fold == number]
        flips = random.normal(
            size=(EPOCHS, len(truth))
        )  # noise beside noise: which rows are the positive ones is all the same
        gains.append(max(fast.exact_auc(each, int(truth.sum())) for each in flips) - 0.5)
    return float(np.mean(gains))


def leaks(w: World) -> list[Leak]:
    """Every stage that listened to the rows it is scored on. Exact: on a clean pipeline nothing is ever found."""
    by_labels, by_rows = "recomputation on permuted labels", "recomputation on other features"
    found: list[Leak] = []
    made = []
    for number in range(K):
        here = stages(w, number, w.y, w.x)
        made.append(here)
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
    sets, seen = members(w, made)
    for name, values in sets.items():
        rate, snapshot = float(name.partition(":")[0]), int(name[-1])
        for number, m in enumerate(made):
            rows = np.flatnonzero(w.fold == number)[:20]
            e = m["epoch"][rate] if snapshot == SNAPSHOTS else snapshot * (EPOCHS // SNAPSHOTS) - 1
            alone = m["x"]["identity"][rows] @ m["weights"][rate][e]
            if not np.allclose(alone, values[rows, 0], atol=1e-9):
                found.append(Leak("misaligned rows", f"{name}, fold {number}", "re-prediction"))
                break
    if any(leak.name == "misaligned rows" for leak in found):
        return found
    number = 0
    rows = np.flatnonzero(w.fold == number)
    turned = w.y.copy()
    turned[rows] = 1 - turned[rows]
    for name, run in methods_of(w, sets, seen).items():
        if not _same(run(w.y)[0][rows], run(turned)[0][rows]):
            found.append(Leak("in-sample meta-model", name, by_labels))
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))
