"""Heads on frozen features, for comp features: scikit-learn fits them, frozen_heads.py stores their numbers
and predicts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from comp.engine.bank import bank, predictions, score
from comp.engine.config import resolve
from comp.engine.errors import UserError
from comp.engine.extras import extract_features
from comp.engine.run import frozen_heads
from comp.engine.run.context import Context
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

Array = NDArray[np.float64]
Numbers = dict[str, NDArray[Any]]


def fit_member(context: Context, run: str, name: str, features: NDArray[np.float32]) -> None:
    """Fit a head fold by fold, save each fold's head like a checkpoint, and write the member run:name. Its
    test predictions are the mean over folds, as for any run."""
    table, folds = context.samples, context.folds
    began = time.perf_counter()
    facts = {
        "run": run,
        "member": name,
        "config": artifacts.digest(resolve.result_knobs(context.cfg)),
        "tta": ["identity"],
        "space": context.cfg.predict.averaging_space,
    }
    sets: dict[str, list[predictions.PredictionSet]] = {"oof": [], "test": []}
    for fold in range(folds.count):
        for kind, part in _fit_fold(context, run, name, fold, features, facts).items():
            sets[kind].append(part)
    folder = paths.member_folder(run, name)
    for kind, parts in sets.items():
        merged = predictions.merge(parts, table, folds, context.cfg.predict.averaging_space, facts=facts)
        bank.write(folder / f"{kind}.arrow", merged)
    record = score.write(folder, context.cfg, table, folds, bank.read(folder / "oof.arrow", table, folds))
    print(f"{run}:{name}: {score.summary(record)}, {time.perf_counter() - began:.1f} s")


def _fit_fold(
    context: Context, run: str, name: str, fold: int, features: NDArray[np.float32], facts: dict[str, Any]
) -> dict[str, predictions.PredictionSet]:
    """OOF and test predictions of one fold."""
    table, folds, seed = context.samples, context.folds, context.cfg.train.seeds[0]
    backbone = artifacts.manifest_entry(frozen_heads.backbone_of(run))
    assert backbone is not None
    train_rows, valid_rows = folds.split(fold)
    train_rows = np.unique(train_rows)
    test_rows = table.positions("test")
    folder = paths.fold_folder(run, seed, fold) / name
    x = features[train_rows]
    numbers: Numbers = {"middle": x.mean(0), "spread": x.std(0) + 1e-6}
    for head in table.heads:
        scaled = frozen_heads.standardized(numbers, x)
        numbers |= fit(name, head, scaled, table.targets(head)[train_rows])
    # A k-nearest-neighbor head stores the positions of its training rows, and finds their features in the
    # run's file.
    stored = {"rows": train_rows.astype(np.int64)} if name == "knn" else {}
    frozen_heads.write(folder / bank.WEIGHTS, name, numbers | stored, backbone["sha256"])
    began = time.perf_counter()
    numbers |= {"near": x} if name == "knn" else {}
    sets = {}
    for kind, rows in (("oof", valid_rows), ("test", test_rows)):
        values = {
            head.name: head.spec.from_probability(frozen_heads.outputs(head, numbers, features[rows])).astype(
                np.float32
            )
            for head in table.heads
        }
        of_fold = np.full(len(rows), fold, np.int16) if kind == "oof" else None
        own = facts | {"seed": seed, "weights": bank.weights_of(folder), "damaged": 0}
        meta = predictions.build_meta(kind, table, folds, own)
        part = predictions.PredictionSet(rows.astype(np.int32), of_fold, values, meta)
        sets[kind] = bank.read(bank.write(folder / f"{kind}.arrow", part), table, folds)
    took = (time.perf_counter() - began) / max(1, len(valid_rows) + len(test_rows))
    seconds = extract_features.seconds(run) + took
    artifacts.write_json(folder / extract_features.SPEED, dict.fromkeys(("oof", "test"), seconds))
    return sets


def predictor(name: str, head: Head, x: Array, target: Array) -> Callable[[Array], Array]:
    """Fits a head on unscaled features; returns (rows, features) -> (rows, outputs) as the task's `store`
    takes them."""
    numbers = fit(name, head, x, target) | {"middle": np.zeros(1), "spread": np.ones(1)}
    numbers |= {"near": x} if name == "knn" else {}
    return lambda rows: frozen_heads.outputs(head, numbers, rows)


def fit(name: str, head: Head, x: Array, target: Array) -> Numbers:
    """The arrays that frozen_heads.py predicts with, each under the name of its head."""
    if head.spec.space != "logit":
        mean, std = target.mean(0), target.std(0) + 1e-12
        numbers = {"shift": mean, "scale": std}
        y = (target - mean) / std
        numbers |= {"y": y.astype(np.float32)} if name == "knn" else _layers(VALUES[name](), x, y)
        return _under(head.name, numbers)
    if head.task in ("multilabel", "binary"):
        columns = [(target[:, k] >= 0.5).astype(np.int64) for k in range(target.shape[1])]
        labels = [_under(f"{head.name}/{k}", _fit_classes(name, x, codes)) for k, codes in enumerate(columns)]
        return {key: value for numbers in labels for key, value in numbers.items()}
    codes = target.argmax(1) if target.shape[1] > 1 else target[:, 0].astype(np.int64)
    return _under(head.name, _fit_classes(name, x, codes))


def _under(name: str, numbers: Numbers) -> Numbers:
    return {f"{name}/{key}": value for key, value in numbers.items()}


def _fit_classes(name: str, x: Array, codes: NDArray[np.int64]) -> Numbers:
    """Of the classes that the training rows have."""
    present, place = np.unique(codes, return_inverse=True)
    numbers: Numbers = {"present": present.astype(np.int64)}
    if len(present) == 1:
        return numbers
    if name == "knn":
        return numbers | {"y": np.eye(len(present), dtype=np.float32)[place]}
    return numbers | _layers(HEADS[name](), x, codes)


def _layers(estimator: Any, x: Array, y: NDArray[Any]) -> Numbers:
    """Fits the estimator; weight matrices and biases, from features to decision values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is scored out of fold, converged or not
        estimator.fit(x, y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)
    weights = getattr(estimator, "coefs_", None) or [np.atleast_2d(estimator.coef_).T]
    biases = getattr(estimator, "intercepts_", None) or [np.atleast_1d(estimator.intercept_)]
    numbers: Numbers = {}
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        numbers |= {f"weight{layer}": np.asarray(weight), f"bias{layer}": np.asarray(bias)}
    return numbers


def _lda() -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, max_iter=500)


def _mlp() -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(
        hidden_layer_sizes=(256,), alpha=1e-2, learning_rate_init=3e-3, max_iter=200, random_state=0
    )


def _knn() -> Any:
    raise AssertionError("its numbers are the training rows")


HEADS: dict[str, Callable[[], Any]] = {"linear": _lda, "logistic": _logistic, "mlp": _mlp, "knn": _knn}


def _ridge() -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-1, 4, 12))


def _mlp_value() -> Any:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(
        hidden_layer_sizes=(256,), alpha=1e-2, learning_rate_init=3e-3, max_iter=200, random_state=0
    )


def _no_value() -> Any:
    raise UserError(
        "head-unsuitable",
        where="--heads",
        key="logistic",
        what="predicts classes, and the target is a value",
        remedy="leave it out: linear, mlp, knn",
    )


VALUES: dict[str, Callable[[], Any]] = {
    "linear": _ridge,
    "logistic": _no_value,
    "mlp": _mlp_value,
    "knn": _knn,
}
