"""A self-test of the engine: the whole pipeline on data whose labels are coin flips, by the code that comp
ensemble runs.

1,000 rows of noise stand for frozen features. Heads are trained on them by gradient descent with snapshots,
then come views, weights, stackers, thresholds and cut points of grades. Two questions:

1. Is every nested score at chance level? (`chance_scores`)
2. Sharper, and without statistics: flip the labels of one fold, or change its features. Nothing that is
   computed for the rows of this fold may change, at any stage. (`leaks`)

test_coin_flips.py asks both, and plants leaks that `leaks` must name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import metrics
from comp.engine.bank import nested_cv, score, thresholds
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data import folds, samples
from comp.engine.ensemble import average, calibration, fast_metrics, fit, methods, stack
from comp.engine.ensemble.blend_config import AVERAGES, SEARCHED, STACKED, Blend
from comp.engine.ensemble.context import Setup
from comp.engine.extras import tta_search
from comp.engine.extras.findings import Leak
from comp.engine.tasks.kinds import Array, Head, sigmoid

ROWS, FEATURES, K = 1000, 24, 5
EPOCHS, SNAPSHOTS = 20, 2
LEARNING_RATE = 0.1
# Every recipe starts from random weights of its own: with identical members a search would have nothing to
# overfit.
RECIPES = tuple("abcdef")
HEAD = Head("label", "binary", ("label",), ("target.label",), ("0", "1"))
GRADES = Head("grade", "ordinal", ("grade",), ("target.grade",), ("0", "1", "2", "3"))
METHODS = tuple(
    m
    for m in (*AVERAGES, *SEARCHED, *STACKED)
    if m != "lightgbm" or importlib.util.find_spec("lightgbm") is not None
)
CALIBRATIONS = ("temperature", "platt", "isotonic", "thresholds")
# Fewer rounds and trials than the defaults of 50 and 200: a search overfits early, and twenty seeds run 120
# of each. Stackers have their weakest penalty, so that they overfit; "chosen strength" lets it be chosen.
OPTIONS: dict[str, dict[str, Any]] = {"greedy": {"rounds": 15}, "optuna": {"trials": 25}} | {
    method: {"strength": stack.STRENGTHS[method][0]} for method in STACKED
}
# The part of a config that an ensemble without post-processing reads: its metric.
CFG: Any = SimpleNamespace(competition=SimpleNamespace(metric="roc_auc", tasks={"label": "binary"}))
LOWER_ENSEMBLES = 3  # what the second level is stacked from
LIMIT = 3.0  # standard errors that a score on coin flips may be away from chance
# Any two folds meet twice, each in the training part of the other, so errors of folds are correlated: over
# data sets the variance of what is fitted on other folds is twice that of independent rows (measured over 30
# of them: 1.38 times the error, mean at chance).
SHARED_FOLDS = 2**0.5

Rows = NDArray[np.int64]
# (labels, rows that are needed) -> nested predictions, and in-sample ones if all rows are needed
Method = Callable[[Array, Rows], tuple[Array, Array | None]]


@dataclass(frozen=True)
class World:
    """A data set of noise."""

    samples: samples.Samples
    folds: folds.Folds
    x: dict[str, Array]  # view -> (rows, features)
    extra: Array  # features of rows without labels, which pseudo-labels are made for
    y: Array
    coin: Array  # a second coin; both together make a grade

    @property
    def fold(self) -> Rows:
        return self.folds.assignment[0]


def world(seed: int, rows: int = ROWS) -> World:
    random = np.random.default_rng([seed, 77])
    ids = [f"{i:05d}" for i in range(rows)]
    y = random.permutation(np.arange(rows) % 2).astype(np.float64)
    frame = pd.DataFrame({"id": ids, "weight": 1.0, "source": "train", "row": ids, "target.label": y})
    table = samples.Samples(frame, (HEAD,), f"coin_flips{seed}")
    fold = np.empty(rows, np.int64)
    # Stratified: a fold with many positives would be trained on few of them, and its score would lie below
    # chance.
    for label in (0, 1):
        members_ = random.permutation(np.flatnonzero(y == label))
        fold[members_] = np.arange(len(members_)) % K
    lines = pd.DataFrame({"id": ids, "repeat": 0, "fold": fold})
    meta = {"k": K, "repeats": 1, "rule": "others", "gap": 0.0, "hash": f"coin_flips{seed}"}
    x = random.normal(size=(rows, FEATURES))
    views = {name: x + 0.5 * random.normal(size=x.shape) for name in ("hflip", "vflip")}
    return World(
        table,
        folds.Folds(lines, meta, table),
        {"identity": x, **views},
        random.normal(size=(300, FEATURES)),
        y,
        random.integers(0, 2, rows).astype(np.float64),
    )


def grades(w: World, y: Array) -> Rows:
    return (2 * y + w.coin).astype(np.int64)


# --- the stages of one fold, each a function that a test can replace by a leaking version ----------


def statistics(x: Array, y: Array, train_rows: Rows) -> tuple[Array, Array]:
    return x[train_rows].mean(axis=0), x[train_rows].std(axis=0)


def pseudo(x: Array, y: Array, extra: Array, train_rows: Rows) -> Array:
    """Labels of unlabelled rows, by a model of the training rows alone."""
    own = x[train_rows]
    weight = np.linalg.solve(own.T @ own + 10 * np.eye(own.shape[1]), own.T @ (y[train_rows] - 0.5))
    return (extra @ weight > 0).astype(np.float64)


def train(x: Array, y: Array, train_rows: Rows, extra: Array, extra_y: Array, weight: Array) -> list[Array]:
    """Weights after every epoch."""
    features, truth = np.vstack([x[train_rows], extra]), np.concatenate([y[train_rows], extra_y])
    out = []
    for _ in range(EPOCHS):
        weight = weight - LEARNING_RATE * features.T @ (sigmoid(features @ weight) - truth) / len(truth)
        out.append(weight)
    return out


def select_epoch(weights: list[Array], x: Array, y: Array, train_rows: Rows, valid_rows: Rows) -> int:
    """Fixed beforehand: the last."""
    return len(weights) - 1


def assemble(parts: list[tuple[Rows, Array]], rows: int) -> Array:
    """Out-of-fold predictions from those of each fold's validation rows."""
    out = np.full((rows, 1), np.nan)
    for valid_rows, values in parts:
        out[valid_rows] = values
    return out


class Stages(NamedTuple):
    """The result of every stage of one fold."""

    statistics: tuple[Array, Array]
    pseudo: Array
    weights: dict[str, list[Array]]  # recipe -> weights after every epoch
    epoch: dict[str, int]  # recipe -> the selected one
    x: dict[str, Array]  # view -> normalized features of all rows
    valid_rows: Rows


def run_stages(w: World, fold: int, y: Array, x: dict[str, Array]) -> Stages:
    train_rows, valid_rows = w.folds.split(fold)
    mean, std = statistics(x["identity"], y, train_rows)
    normalized = {name: (view - mean) / std for name, view in x.items()}
    extra = (w.extra - mean) / std
    labels = pseudo(normalized["identity"], y, extra, train_rows)
    weights = {}
    for seed, recipe in enumerate(RECIPES):
        initial = 0.1 * np.random.default_rng(seed).normal(size=FEATURES)
        weights[recipe] = train(normalized["identity"], y, train_rows, extra, labels, initial)
    epoch = {
        recipe: select_epoch(by_epoch, normalized["identity"], y, train_rows, valid_rows)
        for recipe, by_epoch in weights.items()
    }
    return Stages((mean, std), labels, weights, epoch, normalized, valid_rows)


def member_predictions(w: World, stages: list[Stages]) -> dict[str, Array]:
    """Out-of-fold predictions of every snapshot of every recipe."""
    found: dict[str, Array] = {}
    for recipe in RECIPES:
        for snapshot in range(1, SNAPSHOTS + 1):
            parts = []
            for s in stages:
                weight = s.weights[recipe][snapshot_epoch(s, recipe, snapshot)]
                parts.append((s.valid_rows, (s.x["identity"][s.valid_rows] @ weight)[:, None]))
            found[f"{recipe}:snap{snapshot}"] = assemble(parts, len(w.y))
    return found


def snapshot_epoch(stages: Stages, recipe: str, snapshot: int) -> int:
    return stages.epoch[recipe] if snapshot == SNAPSHOTS else snapshot * (EPOCHS // SNAPSHOTS) - 1


def view_predictions(w: World, stages: list[Stages]) -> dict[str, Array]:
    """Out-of-fold predictions of every view, by the selected weights of all recipes together."""
    found = {}
    for name in w.x:
        parts = []
        for s in stages:
            weight = sum(s.weights[recipe][s.epoch[recipe]] for recipe in RECIPES)
            parts.append((s.valid_rows, (s.x[name][s.valid_rows] @ weight)[:, None]))
        found[name] = assemble(parts, len(w.y))
    return found


# --- every method of an ensemble ----------------------------------------------------------------------------


class _Fit:
    """Parameters that are fitted when they are first read, so that the rows of one fold cost one fit."""

    def __init__(self, fit: Callable[[Rows], Any], rows: Rows):
        self.fit, self.rows = fit, rows

    @cached_property
    def params(self) -> Any:
        return self.fit(self.rows)


def fits(name: str) -> bool:
    """Whether a method has something to overfit. A temperature is fitted too, but changes no order."""
    return name not in (*AVERAGES, "temperature", "platt")


class Methods:
    """Each method runs the engine's own nested cross-validation on the members or views of a world."""

    def __init__(self, w: World, members: dict[str, Array], views: dict[str, Array]):
        self.w, self.members, self.views = w, members, views
        self.rows = np.arange(len(w.y))

    def all(self) -> dict[str, Method]:
        return (
            {method: self.blend(method, OPTIONS.get(method, {})) for method in METHODS}
            | {"chosen strength": self.blend("logistic", {})}
            | {step: partial(self.calibrate, step) for step in CALIBRATIONS}
            | {"cut points": self.cut_points, "TTA choice": self.tta, "two levels": self.two_levels}
        )

    def nested(self, fit: Any, apply: Any, default: Any, needed: Rows) -> tuple[Array, Array | None]:
        def applied(fitted: _Fit, at: Rows) -> Array:
            return apply(fitted.params, at) if np.isin(at, needed).any() else np.zeros((len(at), 1))

        w, rows = self.w, self.rows
        out = score.nested_predict(
            w.samples, w.folds, rows, w.fold, partial(_Fit, fit), applied, _Fit(lambda _: default, rows)
        )
        return out.prediction, apply(out.final.params, rows) if len(needed) == len(rows) else None

    def blend(self, method: str, options: dict[str, Any]) -> Method:
        names, parts, rows = list(self.members), list(self.members.values()), self.rows
        if method == "weighted":
            options = {"weights": [1.0 + i for i in range(len(names))]}
        blend = Blend.model_validate({"members": names, "method": method, **options})
        space = blend.merge_space
        maps = [average.quantiles(part) for part in parts] if space == "rank" else None
        inputs = parts if maps is None else [average.ranks(p, m) for p, m in zip(parts, maps, strict=True)]

        def run(y: Array, needed: Rows) -> tuple[Array, Array | None]:
            given = methods.TrainingData(
                HEAD, metrics.find("roc_auc"), space, inputs, y, self.w.samples.frame, self.w.fold
            )

            def apply(params: Any, at: Rows) -> Array:
                return average.combine(params, [part[at] for part in parts], maps, HEAD, space, None)

            if not methods.uses_labels(blend):
                own = apply(methods.fit(blend, given), rows)
                return own, own
            default = methods.equal_weights(blend, len(parts))
            return self.nested(lambda at: methods.fit(blend, given.at(at)), apply, default, needed)

        return run

    def calibrate(self, step: str, y: Array, needed: Rows) -> tuple[Array, Array | None]:
        base, metric = list(self.members.values())[-1], metrics.find("balanced_accuracy")
        return self.nested(
            lambda at: calibration.fit(step, base[at], y[at], HEAD, metric, None),
            lambda params, at: calibration.apply(params, base[at], HEAD),
            {"kind": "scaled", "slope": 1.0, "shift": [0.0]},
            needed,
        )

    def tta(self, y: Array, needed: Rows) -> tuple[Array, Array | None]:
        search = tta_search.ViewSearch(
            self.views, (y,), (HEAD,), (metrics.find("roc_auc"),), ("probability", "logit"),
            dict.fromkeys(self.views, 1.0),
        )  # fmt: skip
        return self.nested(search.search, search.average, tta_search.PLAIN_CHOICE, needed)

    def cut_points(self, y: Array, needed: Rows) -> tuple[Array, Array | None]:
        """Whether cut points are fitted at all is a choice too, and score.metric_predictions makes it for
        every fold."""
        w, truth, qwk = self.w, grades(self.w, y), metrics.find("qwk")
        table = samples.Samples(
            w.samples.frame.assign(**{"target.grade": truth * 1.0}), (GRADES,), w.samples.hash
        )
        split = folds.Folds(w.folds.frame, w.folds.meta, table)
        base = list(self.members.values())[-1]
        value = 1.5 + base / base.std()
        own, _ = score.metric_predictions(qwk, GRADES, value, table, split, self.rows, w.fold)
        cuts = thresholds.fit_cuts(value[:, 0], truth, len(GRADES.classes), qwk)
        in_sample = thresholds.apply_cuts(value[:, 0], cuts)
        return own[:, None].astype(np.float64), in_sample[:, None].astype(np.float64)

    def two_levels(self, y: Array, needed: Rows) -> tuple[Array, Array | None]:
        """A stack of stacks, each of every third member."""
        w, names = self.w, list(self.members)
        table = samples.Samples(
            w.samples.frame.assign(**{"target.label": y}), w.samples.heads, w.samples.hash
        )
        split = folds.Folds(w.folds.frame, w.folds.meta, table)
        setup = Setup(CFG, table, split)
        refits: dict[str, fit.Refit] = {}
        lower = []
        for i in range(LOWER_ENSEMBLES):
            own = [self.as_set(self.members[name]) for name in names[i::LOWER_ENSEMBLES]]
            blend = Blend.model_validate({"members": names[i::LOWER_ENSEMBLES], "method": "ridge"})
            lower.append(self.as_set(fit.fit_ensemble(setup, blend, own, (), {}, {}).nested["label"]))
            refits[f"level1-{i}"] = partial(fit.refit, setup, blend, own, {})
        blend = Blend.model_validate({"members": list(refits), "method": "ridge"})
        made = fit.fit_ensemble(setup, blend, lower, (), {}, refits)
        assert made.in_sample is not None
        return made.nested["label"].astype(np.float64), made.in_sample["label"].astype(np.float64)

    def as_set(self, values: NDArray[Any]) -> PredictionSet:
        return PredictionSet(self.rows.astype(np.int32), self.w.fold.astype(np.int16), {"label": values}, {})


@dataclass(frozen=True)
class Pipeline:
    """One pass through everything, with the true labels: the baseline of both questions."""

    stages: list[Stages]  # of every fold
    members: dict[str, Array]
    methods: dict[str, Method]
    predictions: dict[str, tuple[Array, Array]]  # method -> nested and in-sample


def run_pipeline(w: World) -> Pipeline:
    stages = [run_stages(w, fold, w.y, w.x) for fold in range(K)]
    members = member_predictions(w, stages)
    every = Methods(w, members, view_predictions(w, stages)).all()
    predictions = {}
    for name, method in every.items():
        nested, in_sample = method(w.y, np.arange(len(w.y)))
        assert in_sample is not None
        predictions[name] = nested, in_sample
    return Pipeline(stages, members, every, predictions)


# --- the two questions --------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    metric: str
    chance: float
    error: Callable[[int], float]  # number of rows -> standard error of the score if rows are independent
    inputs: Callable[[World, Array], tuple[Array, Array]]  # (world, predictions) -> what the metric takes


AUC = Scoring(
    "roc_auc",
    0.5,
    lambda rows: ((rows + 1) / (3 * rows**2)) ** 0.5,
    lambda w, values: (w.y, HEAD.spec.to_probability(values)[:, 0]),
)
SCORING = {
    "thresholds": Scoring(
        "balanced_accuracy",
        0.5,
        lambda rows: 0.5 / rows**0.5,
        lambda w, values: (w.y, HEAD.spec.to_label(HEAD.spec.to_probability(values)).astype(np.float64)),
    ),
    "cut points": Scoring(
        "qwk",
        0.0,
        lambda rows: 1 / rows**0.5,
        lambda w, values: (grades(w, w.y).astype(np.float64), values[:, 0]),
    ),
}


class Chance(NamedTuple):
    nested: float
    in_sample: float
    errors: float  # standard errors that the nested score lies above chance


def chance_scores(w: World, pipeline: Pipeline) -> dict[str, Chance]:
    out = {}
    for name, both in pipeline.predictions.items():
        scoring = SCORING.get(name, AUC)
        # Fold by fold: pooled over folds, a difference of level between their models would count as an order
        # of the rows.
        nested, in_sample = (
            nested_cv.fold_table(metrics.find(scoring.metric), *scoring.inputs(w, values), w.fold).mean
            for values in both
        )
        errors = (nested - scoring.chance) / (SHARED_FOLDS * scoring.error(len(w.y)))
        out[name] = Chance(nested, in_sample, errors)
    return out


def selection_optimism(w: World) -> float:
    """AUC above chance that selecting the best of EPOCHS epochs on the scored fold shows, where no epoch
    predicts anything."""
    random, gains = np.random.default_rng(0), []
    for fold in np.tile(np.arange(K), 10):
        truth = w.y[w.fold == fold]
        # Independent noise has no order, so it does not matter which rows are the positives.
        epochs = random.normal(size=(EPOCHS, len(truth)))
        gains.append(max(fast_metrics.exact_auc(values, int(truth.sum())) for values in epochs) - 0.5)
    return float(np.mean(gains))


def leaks(w: World, pipeline: Pipeline) -> list[Leak]:
    """Every stage whose result depends on the rows it is scored on. Exact: a clean pipeline has none."""
    found = [leak for fold in range(K) if (leak := stage_leak(w, pipeline.stages[fold], fold)) is not None]
    moved = misaligned(w, pipeline)
    return found + moved if moved else found + method_leaks(w, pipeline)


def stage_leak(w: World, before: Stages, fold: int) -> Leak | None:
    """The first stage of a fold that other labels or features of its validation rows change."""
    by_labels, by_features = "recomputation on flipped labels", "recomputation on other features"
    valid_rows = np.flatnonzero(w.fold == fold)
    other = {name: view.copy() for name, view in w.x.items()}
    for view in other.values():
        view[valid_rows[::2]] = 9.0
    labels = run_stages(w, fold, flipped(w, valid_rows), w.x)
    features = run_stages(w, fold, w.y, other)
    where = f"fold {fold}"
    if not _same(before.statistics, features.statistics) or not _same(before.statistics, labels.statistics):
        return Leak("statistics fitted on validation rows", where, by_features)
    if not _same(before.pseudo, labels.pseudo):
        return Leak("pseudo-labels from models trained on the fold", where, by_labels)
    if not _same(list(before.weights.values()), list(labels.weights.values())):
        return Leak("in-sample base predictions", where, by_labels)
    if before.epoch != labels.epoch:
        return Leak("best epoch picked on the scored fold", where, by_labels)
    return None


def misaligned(w: World, pipeline: Pipeline) -> list[Leak]:
    """Members whose stored rows are not what the fold's weights predict for them."""
    found = []
    for name, values in pipeline.members.items():
        recipe, snapshot = name.partition(":")[0], int(name[-1])
        for fold, s in enumerate(pipeline.stages):
            rows = np.flatnonzero(w.fold == fold)[:20]
            again = s.x["identity"][rows] @ s.weights[recipe][snapshot_epoch(s, recipe, snapshot)]
            if not np.allclose(again, values[rows, 0], atol=1e-9):
                found.append(Leak("misaligned rows", f"{name}, fold {fold}", "re-prediction"))
                break
    return found


def method_leaks(w: World, pipeline: Pipeline) -> list[Leak]:
    """Methods whose nested predictions of fold 0 depend on the labels of fold 0."""
    rows = np.flatnonzero(w.fold == 0)
    labels = flipped(w, rows)
    return [
        Leak("in-sample meta-model", name, "recomputation on flipped labels")
        for name, method in pipeline.methods.items()
        if not _same(pipeline.predictions[name][0][rows], method(labels, rows)[0][rows])
    ]


def flipped(w: World, rows: Rows) -> Array:
    y = w.y.copy()
    y[rows] = 1 - y[rows]
    return y


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))
