"""A small world whose labels are coin flips, and every way of making an ensemble asked about it, by the code that comp ensemble
runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import metrics
from comp.engine.bank import score, thresholds
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data import folds, samples
from comp.engine.ensemble import average, calibration, fit, methods, stack
from comp.engine.ensemble.blend_config import AVERAGES, SEARCHED, STACKED, Blend
from comp.engine.extras import view_search
from comp.engine.tasks.kinds import Array, Head

ROWS, FEATURES, K = 1000, 24, 5
HEAD = Head("label", "binary", ("label",), ("target.label",), ("0", "1"))
GRADES = Head("grade", "ordinal", ("grade",), ("target.grade",), ("0", "1", "2", "3"))
METHODS = tuple(
    m
    for m in (*AVERAGES, *SEARCHED, *STACKED)
    if m != "lightgbm" or importlib.util.find_spec("lightgbm") is not None
)
STEPS = ("temperature", "platt", "isotonic", "thresholds")
# Fewer rounds and trials than 50 and 200: what a search overfits it overfits early, and there are 120 of each in twenty worlds.
# Stackers with their weakest penalty, so that they overfit; one more chooses it.
OPTIONS: dict[str, dict[str, Any]] = {"greedy": {"rounds": 15}, "optuna": {"trials": 25}} | {
    method: {"strength": stack.STRENGTHS[method][0]} for method in STACKED
}
# as much of a config as an ensemble without `after` asks for: its metric
CFG: Any = SimpleNamespace(competition=SimpleNamespace(metric="roc_auc", tasks={"label": "binary"}))
LOWER = 3  # ensembles that the second level is made from

Ask = Callable[[Array, NDArray[np.int64]], tuple[Array, Array | None]]


@dataclass(frozen=True)
class World:
    samples: samples.Samples
    folds: folds.Folds
    x: dict[str, Array]  # view -> frozen features
    extra: Array  # features of rows without labels, for pseudo-labels
    y: Array
    coin: Array  # the second of two, which make a grade

    @property
    def fold(self) -> NDArray[np.int64]:
        return self.folds.assignment[0]


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
        random.integers(0, 2, rows).astype(np.float64),
    )


def grades(w: World, y: Array) -> NDArray[np.int64]:
    return (2 * y + w.coin).astype(np.int64)


def fits(name: str) -> bool:
    """Whether a method has something to overfit with. A temperature is fitted too, but moves no order."""
    return name not in (*AVERAGES, "temperature", "platt")


class _Later:
    """Parameters that are fitted when they are first asked for: whoever wants the rows of one fold pays for one fit."""

    def __init__(self, fit: Callable[[NDArray[np.int64]], Any], at: NDArray[np.int64]):
        self.fit, self.at = fit, at

    @cached_property
    def params(self) -> Any:
        return self.fit(self.at)


def methods_of(w: World, found: dict[str, Array], seen: dict[str, Array]) -> dict[str, Ask]:
    """name -> (labels, rows that are asked for) -> honest predictions, and in-sample ones where all rows are asked for."""
    parts, names, rows = list(found.values()), list(found), np.arange(len(w.y))
    auc, even_handed = metrics.find("roc_auc"), metrics.find("balanced_accuracy")

    def asked(fit: Any, apply: Any, first: Any, wanted: NDArray[np.int64]) -> tuple[Array, Array | None]:
        def said(later: _Later, at: NDArray[np.int64]) -> Array:
            return apply(later.params, at) if np.isin(at, wanted).any() else np.zeros((len(at), 1))

        out = score.nested_predict(
            w.samples, w.folds, rows, w.fold, partial(_Later, fit), said, _Later(lambda _: first, rows)
        )
        return out.prediction, apply(out.final.params, rows) if len(wanted) == len(rows) else None

    def blended(method: str, options: dict[str, Any]) -> Ask:
        if method == "weighted":
            options = {"weights": [1.0 + i for i in range(len(names))]}
        blend = Blend.model_validate({"members": names, "method": method, **options})
        space = blend.merge_space
        maps = [average.quantiles(part) for part in parts] if space == "rank" else None
        spoken = parts if maps is None else [average.ranks(p, m) for p, m in zip(parts, maps, strict=True)]

        def run(y: Array, wanted: NDArray[np.int64]) -> tuple[Array, Array | None]:
            given = methods.TrainingData(HEAD, auc, space, spoken, y, w.samples.frame, w.fold)

            def apply(params: Any, at: NDArray[np.int64]) -> Array:
                return average.combine(params, [part[at] for part in parts], maps, HEAD, space, None)

            if not methods.uses_labels(blend):
                own = apply(methods.fit(blend, given), rows)
                return own, own
            return asked(
                lambda at: methods.fit(blend, given.at(at)),
                apply,
                methods.equal_weights(blend, len(parts)),
                wanted,
            )

        return run

    def later(step: str) -> Ask:
        base = parts[-1]

        def run(y: Array, wanted: NDArray[np.int64]) -> tuple[Array, Array | None]:
            return asked(
                lambda at: calibration.fit(step, base[at], y[at], HEAD, even_handed, None),
                lambda params, at: calibration.apply(params, base[at], HEAD),
                {"kind": "scaled", "slope": 1.0, "shift": [0.0]},
                wanted,
            )

        return run

    def tta(y: Array, wanted: NDArray[np.int64]) -> tuple[Array, Array | None]:
        question = view_search.Question(
            seen, (y,), (HEAD,), (auc,), ("probability", "logit"), dict.fromkeys(seen, 1.0)
        )
        return asked(question.choose, question.said, view_search.PLAIN_CHOICE, wanted)

    def cut_points(y: Array, wanted: NDArray[np.int64]) -> tuple[Array, Array | None]:
        """Whether to fit them is a choice too, and score.answers makes it for every fold."""
        truth, qwk = grades(w, y), metrics.find("qwk")
        table = w.samples.frame.assign(**{"target.grade": truth * 1.0})
        told = samples.Samples(table, (GRADES,), w.samples.hash)
        split = folds.Folds(w.folds.frame, w.folds.meta, told)
        value = 1.5 + parts[-1] / parts[-1].std()
        own, _ = score.metric_predictions(qwk, GRADES, value, told, split, rows, w.fold)
        taught = thresholds.apply_cuts(
            value[:, 0], thresholds.fit_cuts(value[:, 0], truth, len(GRADES.classes), qwk)
        )
        return own[:, None].astype(np.float64), taught[:, None].astype(np.float64)

    def two_levels(y: Array, wanted: NDArray[np.int64]) -> tuple[Array, Array | None]:
        """A stack of stacks: the members are dealt to LOWER of them."""
        table = w.samples.frame.assign(**{"target.label": y})
        told = samples.Samples(table, w.samples.heads, w.samples.hash)
        split = folds.Folds(w.folds.frame, w.folds.meta, told)
        refits: dict[str, fit.Refit] = {}
        below = []
        for i in range(LOWER):
            own = [as_set(found[name]) for name in names[i::LOWER]]
            blend = Blend.model_validate({"members": names[i::LOWER], "method": "ridge"})
            below.append(as_set(fit.fit_ensemble(CFG, blend, told, split, own, (), {}, {}).nested["label"]))
            refits[f"level1-{i}"] = partial(fit.refit, CFG, blend, told, split, own, {})
        blend = Blend.model_validate({"members": list(refits), "method": "ridge"})
        made = fit.fit_ensemble(CFG, blend, told, split, below, (), {}, refits)
        assert made.in_sample is not None
        return made.nested["label"].astype(np.float64), made.in_sample["label"].astype(np.float64)

    def as_set(stored: NDArray[Any]) -> PredictionSet:
        return PredictionSet(rows.astype(np.int32), w.fold.astype(np.int16), {"label": stored}, {})

    return (
        {method: blended(method, OPTIONS.get(method, {})) for method in METHODS}
        | {"chosen strength": blended("logistic", {})}
        | {step: later(step) for step in STEPS}
        | {"cut points": cut_points, "TTA choice": tta, "two levels": two_levels}
    )
