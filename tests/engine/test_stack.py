"""The penalty of a stacker is chosen by cross-validation within the training folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from banked import HEADS, lay_out, load, made, member, recipe_of

from comp.engine.bank import score
from comp.engine.ensemble import apply, stack
from comp.engine.tasks.kinds import log_softmax, sigmoid

METHODS = ["logistic", "ridge", "elastic_net", pytest.param("mlp", marks=pytest.mark.slow)]


def members(rows: int, count: int, task: str = "binary") -> tuple[list[Any], Any, Any, Any]:
    """(members, of which only the first is informative; truth; frame; folds)"""
    random = np.random.default_rng(0)
    truth = random.integers(0, 3 if task == "multiclass" else 2, rows)
    width = len(HEADS[task].outputs)
    parts = [random.normal(0, 2, (rows, width)) for _ in range(count)]
    parts[0] += np.eye(3)[truth] if task == "multiclass" else (2.0 * truth - 1)[:, None]
    if task == "multiclass":
        parts = [log_softmax(part) for part in parts]
    return parts, truth, pd.DataFrame({"row": np.arange(rows)}), np.arange(rows) % 5


def nested(method: str, task: str, rows: int, count: int, strength: float | None) -> float:
    """Nested squared error of the probabilities."""
    parts, truth, frame, fold = members(rows, count, task)
    head, lost = HEADS[task], 0.0
    for number in range(5):
        mine, others = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        few = [part[others] for part in parts]
        found = stack.fit(
            method, head, few, truth[others], frame.iloc[others], fold[others], strength=strength
        )
        stored = apply.predict(json.loads(json.dumps(found)), [part[mine] for part in parts], head, "logit")
        hot = np.eye(3)[truth[mine]] if task == "multiclass" else truth[mine][:, None]
        lost += float(((head.spec.to_probability(stored) - hot) ** 2).sum())
    return lost / rows


@pytest.mark.parametrize("method", METHODS)
def test_few_rows_and_many_members_get_a_strong_penalty(method: str) -> None:
    """Forty members, one of them informative. Predicting 0.5 scores 0.25; a weak penalty is far worse."""
    weak = nested(method, "binary", 120, 40, 1e-3 if method == "elastic_net" else 1.0)
    chosen = nested(method, "binary", 120, 40, None)
    assert weak > 0.27 and chosen < min(weak - 0.02, 0.265)


def test_multiclass_gets_a_strong_penalty_too() -> None:
    weak, chosen = (nested("logistic", "multiclass", 150, 15, each) for each in (1.0, None))
    assert chosen < weak - 0.1


def test_many_rows_get_a_weak_penalty() -> None:
    parts, truth, frame, fold = members(4000, 2)
    found = stack.fit("logistic", HEADS["binary"], parts, truth, frame, fold)
    assert found["strength"] <= 10
    assert found == stack.fit("logistic", HEADS["binary"], parts, truth, frame, fold)


@pytest.mark.parametrize("groups", [False, True])
def test_inner_folds_of_a_single_fold_follow_the_groups(groups: bool) -> None:
    parts, truth, frame, _ = members(120, 40)
    if groups:
        frame["group"] = np.arange(120) // 12
    inner = stack._inner_folds(np.zeros(120, np.int64), frame)
    assert len(set(inner)) == stack.INNER_FOLDS
    if groups:
        assert (inner.reshape(10, 12) == inner[::12, None]).all()
    found = stack.fit("ridge", HEADS["binary"], parts, truth, frame, np.zeros(120, np.int64))
    assert found["strength"] > 1


def test_a_given_strength_is_used_and_a_chosen_one_is_printed(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    for i in range(3):
        member(project, f"exp00{i + 1}", noise=4.0, seed=10 + i)
    fixed = made(project, "method: logistic\nstrength: 3.0")
    assert recipe_of("blend001")["params"]["label"]["strength"] == 3.0 and fixed["after"] == []
    record = made(project, "method: logistic")
    params = recipe_of("blend001")["params"]["label"]
    (line,) = record["after"]
    assert f"strength {params['strength']:g} of" in line and line in capsys.readouterr().out
    assert params["strength"] in stack.STRENGTHS["logistic"]
    # in-sample: by the parameters in apply.json
    parts = [load(project, f"exp00{i + 1}").heads["label"] for i in range(3)]
    p = sigmoid(apply.predict(params, parts, project.head, "logit"))[:, 0]
    truth = project.samples.truth(project.head, np.arange(len(p)))
    assert record["in_sample"] == pytest.approx(score.metric_of(project.cfg)(truth, p), abs=1e-6)
