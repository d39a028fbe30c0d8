"""Stackers: models whose inputs are the members' predictions. Fitted with scikit-learn (or LightGBM, if
installed) and stored as numbers that apply.py uses.

    logistic, ridge, elastic_net    one weight per output of a member
    mlp                             one hidden layer
    lightgbm                        100 small trees; pip install lightgbm

Exclusive classes share one model; each label and each value has its own, fitted on the rows where it is
known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import nested_cv
from comp.engine.ensemble import apply
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array, Head

# Grids of the penalty, weakest first. Networks and trees are slow, so theirs are short.
STRENGTHS = {
    "logistic": (1.0, 10.0, 100.0, 1e3, 1e4),
    "ridge": (1.0, 10.0, 100.0, 1e3, 1e4),
    "elastic_net": (1e-3, 1e-2, 0.1),
    "mlp": (1.0, 10.0, 100.0),
    "lightgbm": (1.0, 10.0, 100.0),
}
INNER_FOLDS = 5  # at most, to choose the strength within the training rows
HIDDEN = 16
TREES = 100
ABSENT_CLASS_INTERCEPT = -30.0  # of a class without training rows


def fit(
    method: str,
    head: Head,
    parts: Sequence[NDArray[Any]],
    truth: NDArray[Any],
    frame: Any,
    fold: NDArray[np.int64],
    *,
    space: str = "logit",
    strength: float | None = None,
    metadata: Sequence[str] = (),
    encoded: Sequence[str] = (),
) -> dict[str, Any]:
    """The parameters for apply.json, fitted on all given rows. fold: for target encoding out of fold, and to
    choose the strength if none is given."""

    def make_inputs(at: NDArray[np.int64]) -> Inputs:
        rows = [part[at] for part in parts]
        return _inputs(method, head, rows, truth[at], frame.iloc[at], fold[at], space, metadata, encoded)

    if strength is None:
        strength = _choose_strength(
            method, head, parts, truth, frame, _inner_folds(fold, frame), space, make_inputs
        )
    inputs = make_inputs(np.arange(len(truth)))
    found = FITS[method](inputs.x, truth, inputs.target, head, strength)
    return {"strength": strength} | inputs.spec | found


class Inputs(NamedTuple):
    x: Array  # (rows, features), standardized
    target: Array  # (rows, outputs)
    spec: dict[str, Any]  # from which apply.inputs makes x


def _inputs(
    method: str,
    head: Head,
    parts: Sequence[NDArray[Any]],
    truth: NDArray[Any],
    frame: Any,
    fold: NDArray[np.int64],
    space: str,
    metadata: Sequence[str],
    encoded: Sequence[str],
) -> Inputs:
    columns = [_column_spec(f"meta.{name}", frame) for name in metadata]
    blocks = [
        apply.stacker_inputs(parts, head, space),
        *(apply.metadata_features(spec, frame[spec["name"]]) for spec in columns),
    ]
    target = class_shares(truth, head)
    for name in encoded:
        spec, values = _target_encoding(f"meta.{name}", frame, target, fold)
        columns.append(spec)
        blocks.append(values)
    x = np.concatenate(blocks, axis=1)
    mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    # A network needs all inputs standardized, the others only the metadata.
    first = 0 if method == "mlp" else blocks[0].shape[1]
    mean[first:] = x[:, first:].mean(axis=0)
    spread = x[:, first:].std(axis=0)
    scale[first:] = np.where(spread > 0, spread, 1.0)
    spec = {"space": space, "columns": columns, "mean": mean.tolist(), "scale": scale.tolist()}
    return Inputs((x - mean) / scale, target, spec)


def _inner_folds(fold: NDArray[np.int64], frame: Any) -> NDArray[np.int64]:
    """Of every training row its inner fold: by its fold; if there is only one, by its group or scored row."""
    codes = np.unique(fold, return_inverse=True)[1]
    if not codes.any():
        codes = nested_cv.group_codes(frame["group" if "group" in frame else "row"].to_numpy())
    return np.asarray(codes % INNER_FOLDS, np.int64)


def _choose_strength(
    method: str,
    head: Head,
    parts: Sequence[NDArray[Any]],
    truth: NDArray[Any],
    frame: Any,
    inner: NDArray[np.int64],
    space: str,
    make_inputs: Callable[[NDArray[np.int64]], Inputs],
) -> float:
    """The strength with the lowest cross-validated loss: log loss if the model fits it, else squared error.
    Of equal ones the strongest; so too with a single inner fold."""
    grid, target = STRENGTHS[method], class_shares(truth, head)
    losses = np.zeros(len(grid))
    for k in np.unique(inner):
        valid, train = np.flatnonzero(inner == k), np.flatnonzero(inner != k)
        if not len(train):
            continue
        inputs, valid_parts = make_inputs(train), [part[valid] for part in parts]
        for i, strength in enumerate(grid):
            found = inputs.spec | LOOSE_FITS[method](inputs.x, truth[train], inputs.target, head, strength)
            values = apply.predict(found, valid_parts, head, space, frame.iloc[valid])
            losses[i] += _loss(values, target[valid], head, found["link"])
    return float(grid[len(grid) - 1 - int(losses[::-1].argmin())])


def _loss(stored: Array, target: Array, head: Head, link: str) -> float:
    known = ~np.isnan(target)
    target = np.where(known, target, 0.0)
    if head.spec.space == "value" or link == "identity":
        return float((((head.spec.to_probability(stored) - target) ** 2) * known).sum())
    if head.exclusive:
        return float(-(target * stored).sum())
    return float(((np.logaddexp(0.0, stored) - target * stored) * known).sum())


def class_shares(truth: NDArray[Any], head: Head) -> Array:
    """(rows, outputs): one-hot labels; soft labels and values unchanged."""
    if head.exclusive and truth.ndim == 1:
        return np.eye(len(head.outputs))[truth.astype(np.int64)]
    return truth.reshape(len(truth), -1).astype(np.float64)


# --- metadata -----------------------------------------------------------------------------------------------


def _column_spec(name: str, frame: Any) -> dict[str, Any]:
    import pandas as pd

    if name not in frame:
        known = [column.removeprefix("meta.") for column in frame if column.startswith("meta.")]
        raise UserError(
            "column-missing",
            key="metadata",
            what=f"the samples have no column {name.removeprefix('meta.')}",
            remedy=f"competition.metadata lists {', '.join(known) or 'none'}",
        )
    if pd.api.types.is_numeric_dtype(frame[name]):
        mean = float(frame[name].mean())
        return {"name": name, "kind": "number", "mean": mean if np.isfinite(mean) else 0.0}
    return {"name": name, "kind": "classes", "classes": sorted(set(_text(frame[name])))}


def _text(values: Any) -> NDArray[Any]:
    return np.asarray(values.astype(object).where(values.notna(), "").astype(str).to_numpy(object))


def _target_encoding(
    name: str, frame: Any, target: Array, fold: NDArray[np.int64]
) -> tuple[dict[str, Any], Array]:
    """Target means by value, smoothed with 10 rows of the overall mean; for the training rows those of the
    other folds, so that no row contains its own label."""
    _column_spec(name, frame)
    text = _text(frame[name])

    def table(rows: NDArray[np.int64]) -> dict[str, Any]:
        labels, value = target[rows], text[rows]
        known = ~np.isnan(labels)
        mean = np.nansum(labels, axis=0) / np.maximum(known.sum(axis=0), 1)
        means = {}
        for v in sorted(set(value)):
            at = value == v
            total, count = np.nansum(labels[at], axis=0), known[at].sum(axis=0)
            means[str(v)] = ((total + 10 * mean) / (count + 10)).tolist()
        return {"name": name, "kind": "encoded", "table": means, "else": mean.tolist()}

    values = np.zeros((len(text), target.shape[1]))
    for k in np.unique(fold):
        others, in_fold = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        spec = table(others if len(others) else in_fold)
        values[in_fold] = apply.metadata_features(spec, frame[name].iloc[in_fold])
    return table(np.arange(len(text))), values


# --- models -------------------------------------------------------------------------------------------------


def _logistic(
    x: Array, truth: NDArray[Any], target: Array, head: Head, strength: float, tol: float = 1e-8
) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    if head.spec.space == "value":
        raise UserError(
            "method-task",
            key="method",
            what="logistic is for classes",
            remedy="use ridge, elastic_net, mlp or lightgbm",
        )

    def one(x: Array, shares: Array) -> Any:
        codes, weight, x = _class_codes(x, shares)
        return LogisticRegression(C=1 / strength, max_iter=5000, tol=tol).fit(x, codes, weight)

    if head.exclusive:
        model = one(x, target)
        coef, intercept = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn has one row for two classes
            coef, intercept = np.vstack([-coef / 2, coef / 2]), np.append(-intercept / 2, intercept / 2)
        coef, intercept = _all_classes(coef, intercept, model.classes_, len(head.outputs))
    else:
        coef, intercept = np.zeros((target.shape[1], x.shape[1])), np.zeros(target.shape[1])
        for at, (known, label) in enumerate(_labels(target)):
            if _has_both_classes(label):
                model = one(x[known], np.stack([1 - label, label], axis=1))
                coef[at], intercept[at] = model.coef_[0], model.intercept_[0]
            else:
                intercept[at] = _constant(label)
    return {"kind": "linear", "link": "logistic", "coef": coef.T.tolist(), "intercept": intercept.tolist()}


def _labels(target: Array) -> list[tuple[NDArray[np.bool_], Array]]:
    """Of each output: (mask of the rows where it is known, its labels there)."""
    known = ~np.isnan(target)
    return [(known[:, at], target[known[:, at], at]) for at in range(target.shape[1])]


def _has_both_classes(label: Array) -> bool:
    """A rare label may be absent from all training rows."""
    return bool(len(label)) and bool(np.ptp(label) > 0)


def _constant(label: Array) -> float:
    """The logit of a label's share, smoothed by half a row on each side: the model if the rows have one class
    alone."""
    positive = label.sum()
    return float(np.log((positive + 0.5) / (len(label) - positive + 0.5)))


def _all_classes(coef: Array, intercept: Array, classes: NDArray[Any], count: int) -> tuple[Array, Array]:
    every_coef, every_intercept = np.zeros((count, coef.shape[1])), np.full(count, ABSENT_CLASS_INTERCEPT)
    every_coef[classes.astype(int)], every_intercept[classes.astype(int)] = coef, intercept
    return every_coef, every_intercept


def _class_codes(x: Array, target: Array) -> tuple[NDArray[np.int64], Array | None, Array]:
    """(class codes, sample weights, x). A row with soft labels becomes one row per class, weighted by its
    share."""
    if np.isin(target, (0, 1)).all():
        return target.argmax(axis=1), None, x
    rows, codes = np.nonzero(target > 0)
    return codes, target[rows, codes], x[rows]


def _regressions(make: Callable[[], Any], x: Array, target: Array) -> dict[str, Any]:
    models = [make().fit(x[known], label) for known, label in _labels(target)]
    coef, intercept = (
        np.stack([model.coef_ for model in models]),
        [float(model.intercept_) for model in models],
    )
    return {"kind": "linear", "link": "identity", "coef": coef.T.tolist(), "intercept": intercept}


def _ridge(x: Array, truth: NDArray[Any], target: Array, head: Head, strength: float) -> dict[str, Any]:
    from sklearn.linear_model import Ridge

    return _regressions(lambda: Ridge(alpha=strength), x, target)


def _elastic_net(x: Array, truth: NDArray[Any], target: Array, head: Head, strength: float) -> dict[str, Any]:
    from sklearn.linear_model import ElasticNet

    return _regressions(lambda: ElasticNet(alpha=strength, max_iter=20_000), x, target)


def _mlp(x: Array, truth: NDArray[Any], target: Array, head: Head, strength: float) -> dict[str, Any]:
    from scipy.linalg import block_diag
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    options = {
        "hidden_layer_sizes": (HIDDEN,),
        "solver": "lbfgs",
        "alpha": strength,
        "max_iter": 500,
        "random_state": 0,
    }
    if head.spec.space == "value":
        model = _converged(MLPRegressor(**options), x, target if target.shape[1] > 1 else target[:, 0])
        return _layers("identity", model.coefs_, model.intercepts_)
    if head.exclusive:
        model = _converged(MLPClassifier(**options), x, target.argmax(axis=1))
        last, start = model.coefs_[-1].T, model.intercepts_[-1]
        if len(model.classes_) == 2:
            last, start = np.vstack([-last / 2, last / 2]), np.append(-start / 2, start / 2)
        last, start = _all_classes(last, start, model.classes_, len(head.outputs))
        return _layers("logistic", [*model.coefs_[:-1], last.T], [*model.intercepts_[:-1], start])
    coefs, intercepts = [], []  # of one network per label; then all of them as one block-diagonal network
    for known, label in _labels(target.round()):
        if _has_both_classes(label):
            model = _converged(MLPClassifier(**options), x[known], label)
            coefs.append(model.coefs_)
            intercepts.append(model.intercepts_)
        else:
            coefs.append([np.zeros((x.shape[1], 1)), np.zeros((1, 1))])
            intercepts.append([np.zeros(1), np.array([_constant(label)])])
    hidden, last = zip(*coefs, strict=True)
    return _layers(
        "logistic",
        [np.hstack(hidden), block_diag(*last)],
        [np.concatenate(layer) for layer in zip(*intercepts, strict=True)],
    )


def _converged(model: Any, x: Array, labels: NDArray[Any]) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # stopping early only overfits less
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, labels)


def _layers(link: str, coefs: Sequence[Array], intercepts: Sequence[Array]) -> dict[str, Any]:
    layers = [{"coef": c.tolist(), "intercept": b.tolist()} for c, b in zip(coefs, intercepts, strict=True)]
    return {"kind": "network", "link": link, "layers": layers}


def _lightgbm(x: Array, truth: NDArray[Any], target: Array, head: Head, strength: float) -> dict[str, Any]:
    try:
        import lightgbm
    except ImportError:
        raise UserError(
            "package-missing",
            key="method",
            what="lightgbm is not installed",
            remedy="pip install lightgbm, or use mlp",
        ) from None
    if head.spec.space == "value" and target.shape[1] > 1:
        raise UserError(
            "method-task",
            key="method",
            what="lightgbm predicts one value per head",
            remedy="ridge, elastic_net and mlp predict several",
        )
    values = head.spec.space == "value"
    options = {
        "objective": "multiclass" if head.exclusive else "regression" if values else "cross_entropy",
        "num_leaves": 7, "learning_rate": 0.05, "min_data_in_leaf": 20, "lambda_l2": strength, "seed": 0,
        "deterministic": True, "force_row_wise": True, "num_threads": 1, "verbosity": -1,
    } | ({"num_class": len(head.outputs)} if head.exclusive else {})  # fmt: skip

    def fit_trees(x: Array, labels: NDArray[Any]) -> list[dict[str, list[float]]]:
        booster = lightgbm.train(options, lightgbm.Dataset(x, labels), TREES)
        return [_tree(tree["tree_structure"]) for tree in booster.dump_model()["tree_info"]]

    if head.exclusive:
        trees = fit_trees(x, target.argmax(axis=1))
    else:
        forests = [
            fit_trees(x[known], label)
            if values or _has_both_classes(label)
            else [_tree({"leaf_value": _constant(label)})]
            for known, label in _labels(target)
        ]
        rounds = max(len(forest) for forest in forests)  # a label without further splits has fewer trees
        zero = _tree({"leaf_value": 0.0})
        trees = [forest[i] if i < len(forest) else zero for i in range(rounds) for forest in forests]
    link = "identity" if values else "logistic"
    return {"kind": "trees", "link": link, "outputs": len(head.outputs), "trees": trees}


def _tree(root: dict[str, Any]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {key: [] for key in ("feature", "threshold", "left", "right", "value")}

    def add(node: dict[str, Any]) -> int:
        place, leaf = len(out["feature"]), "leaf_value" in node
        out["feature"].append(-1 if leaf else node["split_feature"])
        out["threshold"].append(0.0 if leaf else node["threshold"])
        out["value"].append(node["leaf_value"] if leaf else 0.0)
        out["left"].append(-1)
        out["right"].append(-1)
        if not leaf:
            out["left"][place] = add(node["left_child"])
            out["right"][place] = add(node["right_child"])
        return place

    add(root)
    return out


Fit = Callable[[Array, NDArray[Any], Array, Head, float], dict[str, Any]]
FITS: dict[str, Fit] = {
    "logistic": _logistic,
    "ridge": _ridge,
    "elastic_net": _elastic_net,
    "mlp": _mlp,
    "lightgbm": _lightgbm,
}
# To compare strengths: takes a tenth of the time, and its error of the log loss (0.002 of 0.065) is below the
# differences.
LOOSE_FITS = FITS | {"logistic": partial(_logistic, tol=1e-4)}
