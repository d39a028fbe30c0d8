"""Whether the nested score predicts the hidden one: the practice digits, 20 % of the labels flipped, split 20 times into known
and hidden rows; 12 members and more, ensembled; nested, in-sample and hidden log loss.

    .venv/bin/python benchmarks/nested_cv.py

Members are small heads on frozen features (pixels, random projections), so that all of it takes minutes. Labels are flipped on both
sides, as mislabelled test sets are. A table and JSON come out. Bars: |nested - hidden| smaller on average than |in-sample -
hidden|, and hidden in the 90 % interval of the nested score in at least 16 of 20.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"))

import warnings

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

from comp import metrics
from comp.engine.bank import nested_cv, score
from comp.engine.data import folds, samples
from comp.engine.ensemble import apply as fitted
from comp.engine.ensemble import comparison, methods
from comp.engine.ensemble.blend_config import Blend
from comp.engine.tasks import kinds

SPLITS, K, FLIPPED, HIDDEN = 20, 5, 0.2, 0.4
DIGITS = tuple("0123456789")
HEAD = kinds.Head("label", "multiclass", DIGITS, ("target.label",), DIGITS)
METHODS = ("greedy", "slsqp", "logistic")
MORE = {"logistic": {"strength": 300.0}}  # 140 inputs for a thousand rows
LOSS = metrics.find("log_loss")


def models(seed: int) -> list[tuple[int, Any]]:
    """(random features, model): 14 of them, of all degrees of skill."""
    return [
        *(
            (n, LogisticRegression(C=c, max_iter=300))
            for n, c in ((0, 0.003), (0, 0.1), (16, 0.1), (24, 0.1), (32, 0.03), (48, 0.1))
        ),
        *((n, GaussianNB(var_smoothing=v)) for n, v in ((0, 0.3), (24, 0.1), (32, 0.1))),
        *((n, KNeighborsClassifier(k)) for n, k in ((0, 15), (20, 25), (40, 35))),
        *((n, DecisionTreeClassifier(min_samples_leaf=25, random_state=seed)) for n in (0, 30)),
    ]


def one(seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = random.permutation(len(y))
    x, y = x[order] / 16, y[order].astype(np.int64)
    flipped = random.random(len(y)) < FLIPPED
    y[flipped] = random.integers(0, 10, int(flipped.sum()))
    known = len(y) - int(HIDDEN * len(y))
    fold = np.arange(known) % K
    frame = pd.DataFrame(
        {
            "id": [str(i) for i in range(known)],
            "weight": 1.0,
            "source": "train",
            "target.label": y[:known].astype(float),
        }
    )
    table = samples.Samples(frame, (HEAD,), "s")
    meta = {"k": K, "repeats": 1, "rule": "others", "gap": 0.0, "hash": "f"}
    split = folds.Folds(pd.DataFrame({"id": frame["id"], "repeat": 0, "fold": fold}), meta, table)
    oof, test = [], []
    for width, model in models(seed):
        inputs = x if not width else np.tanh(x @ random.normal(size=(64, width)) / 2)
        own, hidden_mean = np.zeros((known, 10)), np.zeros((len(y) - known, 10))
        for k in range(K):
            train = np.flatnonzero(fold != k)
            fitted_ = model.fit(inputs[:known][train], y[:known][train])
            own[fold == k] = fitted_.predict_proba(inputs[:known][fold == k])
            hidden_mean += fitted_.predict_proba(inputs[known:]) / K
        oof.append(HEAD.spec.from_probability(np.clip(own, 1e-4, 1)).astype(np.float32))
        test.append(HEAD.spec.from_probability(np.clip(hidden_mean, 1e-4, 1)).astype(np.float32))
    rows, truth = np.arange(known), y[:known].astype(float)
    lines = []
    for method in METHODS:
        blend = Blend.model_validate(
            {"members": [f"m{i}" for i in range(len(oof))], "method": method, **MORE.get(method, {})}
        )
        space = blend.merge_space
        data = methods.TrainingData(HEAD, LOSS, space, oof, truth, frame, fold)

        def apply(params: Any, at: Any, parts: Any = oof, space: str = space) -> Any:
            return fitted.predict(params, [part[at] for part in parts], HEAD, space)

        found = score.nested_predict(
            table,
            split,
            rows,
            fold,
            lambda at, b=blend, d=data: methods.fit(b, d.at(at)),
            apply,
            methods.equal_weights(blend, len(oof)),
        )
        probability = HEAD.spec.to_probability(found.prediction)
        interval = nested_cv.bootstrap(LOSS, truth, probability, n=300)
        wide = comparison.interval_widening(
            known, len(y) - known
        )  # as comp ensemble prints it for the test rows
        low, high = (interval.score + wide * (end - interval.score) for end in (interval.low, interval.high))
        hidden = LOSS(y[known:], HEAD.spec.to_probability(apply(found.final, slice(None), test)))
        in_sample = LOSS(truth, HEAD.spec.to_probability(apply(found.final, rows)))
        lines.append({
            "split": seed, "method": method, "nested": interval.score, "in_sample": in_sample, "hidden": hidden,
            "low": low, "high": high, "inside": bool(low <= hidden <= high),
        })  # fmt: skip
    return lines


def main() -> None:
    warnings.filterwarnings("ignore")
    print("split  method       nested  in-sample  hidden  90 % interval", file=sys.stderr)
    lines = []
    for each in (line for seed in range(SPLITS) for line in one(seed)):
        lines.append(each)
        print(
            f"{each['split']:5d}  {each['method']:10s} {each['nested']:8.4f} {each['in_sample']:10.4f} {each['hidden']:7.4f}  "
            f"{each['low']:.4f} to {each['high']:.4f}{'' if each['inside'] else '  outside'}",
            file=sys.stderr,
            flush=True,
        )
    report: dict[str, Any] = {"what": f"{SPLITS} splits, {len(models(0))} members, log loss, bar: 16 inside"}
    for method in METHODS:
        mine = [line for line in lines if line["method"] == method]
        report[method] = {
            "nested_off": round(float(np.mean([abs(e["nested"] - e["hidden"]) for e in mine])), 4),
            "in_sample_off": round(float(np.mean([abs(e["in_sample"] - e["hidden"]) for e in mine])), 4),
            "hidden_inside_interval": f"{sum(e['inside'] for e in mine)} of {SPLITS}",
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
