"""How much faster ensembles are searched than with scikit-learn's metric per candidate, and than the package hillclimbers.

    .venv/bin/python benchmarks/search.py [--rows 100000] [--members 200]

One candidate of each kind is timed in turns with the library's own; a greedy round is one pass over all members. Then the picks
of whole searches are compared with those of the naive search, on cases small enough for it. JSON comes out. Bars: 30 for AUC and
log loss of two classes and of five, 20 for QWK, F1 and the AUC of several labels, 20 against the package hillclimbers (a development
dependency) at its own search with the same picks.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"))

import numpy as np
from sklearn.metrics import cohen_kappa_score, f1_score, log_loss, roc_auc_score

from comp import metrics
from comp.engine.ensemble import fast_metrics, weight_search
from comp.engine.tasks import kinds

FIVE = tuple("abcde")
BINARY = kinds.Head("t", "binary", ("t",), ("t",), ("0", "1"))
CLASSES = kinds.Head("t", "multiclass", FIVE, ("t",), FIVE)
LABELS = kinds.Head("t", "multilabel", FIVE, FIVE)
GRADES = kinds.Head("t", "ordinal", ("t",), ("t",), FIVE)


def kappa(truth: Any, value: Any) -> float:
    return float(cohen_kappa_score(truth, np.clip(np.rint(value), 0, 4), weights="quadratic"))


# name: head, metric, bar, what a naive search calls with (truth, mean of members), higher is better; those of a head side by side
CASES: dict[str, tuple[kinds.Head, str, int, Callable[[Any, Any], float]]] = {
    "auc": (BINARY, "roc_auc", 30, lambda t, p: float(roc_auc_score(t, p[:, 0]))),
    "log_loss": (BINARY, "log_loss", 30, lambda t, p: -float(log_loss(t, p[:, 0]))),
    "f1": (BINARY, "f1", 20, lambda t, p: float(f1_score(t, p[:, 0] >= 0.5))),
    "log_loss_5": (CLASSES, "log_loss", 30, lambda t, p: -float(log_loss(t, p))),
    "auc_5": (CLASSES, "roc_auc", 30, lambda t, p: float(roc_auc_score(t, p, multi_class="ovr"))),
    "f1_macro_5": (CLASSES, "f1_macro", 20, lambda t, p: float(f1_score(t, p.argmax(axis=1), average="macro"))),
    "auc_labels_5": (LABELS, "mean_column_auc", 20, lambda t, p: float(roc_auc_score(t, p))),
    "qwk": (GRADES, "qwk", 20, lambda t, p: kappa(t, p[:, 0])),
}  # fmt: skip


def members(head: kinds.Head, count: int, rows: int, seed: int = 0) -> tuple[Any, list[Any]]:
    random = np.random.default_rng(seed)
    if head.task == "multiclass":
        truth = random.integers(0, 5, rows)
        base = 1.5 * np.eye(5, dtype=np.float32)[truth]
    elif head.task == "multilabel":
        truth = random.integers(0, 2, (rows, 5))
        base = (2.0 * truth - 1).astype(np.float32)
    else:
        truth = random.integers(0, 2 if head.task == "binary" else 5, rows)
        base = (2.0 * truth - 1 if head.task == "binary" else truth)[:, None].astype(np.float32)
    shared = random.standard_normal(base.shape, np.float32)
    said = []
    for i in range(count):
        noise = shared + random.standard_normal(base.shape, np.float32) * np.float32(1 + i % 7 / 3)
        said.append(
            kinds.log_softmax(base + noise).astype(np.float32)
            if head.task == "multiclass"
            else base + noise * np.float32(0.5)
        )
    return truth.astype(np.float64), said


many = lru_cache(maxsize=1)(members)  # drawing 200 members takes longer than what is measured on them


def naive_greedy(truth: Any, shown: list[Any], call: Callable[[Any, Any], float], rounds: int) -> Any:
    """The algorithm written out: every candidate by the library's metric."""
    total, count, best, weights = 0.0, np.zeros(len(shown)), -np.inf, np.zeros(len(shown))
    for size in range(1, rounds + 1):
        scores = np.array([call(truth, (total + each) / size) for each in shown])
        pick = int(np.flatnonzero(scores >= scores.max() - weight_search.TOLERANCE)[0])
        total, reached = total + shown[pick], scores[pick]
        count[pick] += 1
        if reached > best + weight_search.TOLERANCE:
            best, weights = reached, count / size
    return weights


def picks_equal(head: kinds.Head, metric: str, call: Callable[[Any, Any], float], cases: int) -> int:
    same = 0
    for seed in range(cases):
        truth, said = members(head, 12, 400, seed)
        scorer = fast_metrics.fast_scorer(metrics.find(metric), head, "probability", truth)
        extracted = [scorer.extract(each) for each in said]
        ours = weight_search.greedy(scorer, extracted, 12, weight_search.unlimited(len(said)))
        shown = [head.spec.to_probability(each.astype(np.float64)) for each in said]
        same += bool(np.allclose(ours, naive_greedy(truth, shown, call, 12), atol=1e-12))
    return same


def one_case(name: str, count: int, rows: int) -> dict[str, Any]:
    head, metric, bar, call = CASES[name]
    truth, said = many(head, count, rows)
    size = sum(each.nbytes for each in said)
    gc.collect()
    tracemalloc.start()
    scorer = fast_metrics.fast_scorer(metrics.find(metric), head, "probability", truth)
    extracted = [scorer.extract(each) for each in said]
    budget = weight_search.unlimited(count)
    weight_search.greedy(scorer, extracted, 1, budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shown = [head.spec.to_probability(each.astype(np.float64)) for each in said[:5]]
    ours, theirs = [], []
    for turn in range(5):
        began = time.perf_counter()
        weight_search.greedy(scorer, extracted, 2, budget)  # the checks of the best five belong to it
        ours.append((time.perf_counter() - began) / (2 * count))
        began = time.perf_counter()
        call(truth, (shown[turn] + shown[0]) / 2)
        theirs.append(time.perf_counter() - began)
    ratio = median(theirs) / median(ours)
    return {
        "ratio": round(ratio, 1),
        "bar": bar,
        "ours_ms": round(1000 * median(ours), 3),
        "scikit_learn_ms": round(1000 * median(theirs), 2),
        "memory_over_predictions": round(peak / size, 2),
        "same_picks": f"{picks_equal(head, metric, call, 20)} of 20 random cases",
    }


def against_hillclimbers(count: int, rows: int) -> dict[str, Any]:
    import hillclimbers
    import pandas as pd

    truth, said = members(BINARY, count, rows)
    columns = {
        f"m{i}": BINARY.spec.to_probability(each.astype(np.float64))[:, 0] for i, each in enumerate(said)
    }
    table = pd.DataFrame(columns)
    target = pd.DataFrame({"t": truth})
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        # Twice the same table as OOF and test: then what it predicts for test is its ensemble of OOF.
        theirs = hillclimbers.climb_hill(
            train=target, oof_pred_df=table, test_pred_df=table.copy(), target="t", objective="maximize",
            eval_metric=hillclimbers.partial(roc_auc_score), negative_weights=True, precision=0.05,
            plot_hill=False,
        )  # fmt: skip
    spent = time.perf_counter() - began
    began = time.perf_counter()
    scorer = fast_metrics.fast_scorer(metrics.find("roc_auc"), BINARY, "probability", truth, signed=True)
    extracted = [scorer.extract(each) for each in said]
    weights = weight_search.hill(scorer, extracted, 0.05, True, weight_search.unlimited(count))
    ours = time.perf_counter() - began
    blend = sum(weight * column for weight, column in zip(weights, columns.values(), strict=True))
    return {
        "what": f"hill climbing with negative weights, {count} members x {rows} rows, AUC, steps of 0.05",
        "ratio": round(spent / ours, 1),
        "bar": 20,
        "same_picks": bool(np.allclose(blend, theirs, atol=1e-9)),
        "members_used": int((weights != 0).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--members", type=int, default=200)
    args = parser.parse_args()
    report: dict[str, Any] = {"what": f"greedy selection, {args.members} members x {args.rows} rows"}
    for name, case in {name: partial(one_case, name) for name in CASES}.items():
        report[name] = case(args.members, args.rows)
    report["hillclimbers"] = against_hillclimbers(8, args.rows)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
