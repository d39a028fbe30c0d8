"""Folds are balanced, frozen and audited, and independent of library versions and the order of rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from comp.engine.config import competition_schema
from comp.engine.data import fold_audit, fold_schemes, make_folds
from comp.engine.data.folds import TRAIN_ONLY, Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Head

Codes = NDArray[np.int64]


def table(
    count: int = 600, task: str = "multiclass", seed: int = 0, target: Any = None, **columns: Any
) -> Samples:
    """Samples with a target of four uneven classes (or numbers), 60 groups and a time that repeats."""
    rng = np.random.default_rng(seed)
    if task == "regression":
        drawn, head = rng.normal(size=count).round(2), Head("y", task, ("y",), ("target.y",))
    else:
        drawn = rng.choice(4, count, p=[0.5, 0.3, 0.15, 0.05]).astype(float)
        head = Head("y", task, tuple("abcd"), ("target.y",), tuple("abcd"))
    frame = pd.DataFrame(
        {
            "id": [f"{i:05d}" for i in range(count)],
            "source": "train",
            "group": [f"g{g}" for g in np.minimum(rng.geometric(0.04, count), 60)],
            "time": rng.integers(0, count // 3, count).astype(float),
            "target.y": drawn if target is None else target,
        }
    ).assign(**columns)
    return Samples(frame.assign(row=frame["id"]), (head,), "hash")


def plan(scheme: str, **changes: Any) -> competition_schema.Folds:
    return competition_schema.Folds.model_validate(
        {"scheme": scheme, "k": 5, "seed": 0, "blind_to_groups": "group" not in scheme} | changes
    )


def made(table: Samples, scheme: str, **changes: Any) -> Folds:
    how = plan(scheme, **changes)
    return Folds(make_folds.assign(table, how), make_folds.fold_metadata(how, table), table)


def counts(found: Folds, repeat: int = 0) -> Codes:
    """(folds, classes)"""
    fold = found.assignment[repeat]
    code = found.samples.frame["target.y"].to_numpy(np.int64)
    return np.array([np.bincount(code[fold == f], minlength=4) for f in range(found.meta["k"])])


def spread(folds_: Codes, classes: Codes, k: int) -> float:
    """The quantity that the greedy rule minimises: the standard deviation over folds of a class's share of
    rows, averaged over classes."""
    table = np.bincount(folds_ * (classes.max() + 1) + classes, minlength=k * (classes.max() + 1)).reshape(
        k, -1
    )
    return float((table / table.sum(axis=0)).std(axis=0).mean())


# --- frozen -------------------------------------------------------------------------------------------------

FROZEN = {
    "kfold": "6cc5b3c03f6df4c5",
    "stratified": "4045f9db55ac86f1",
    "quantiles": "48bbf8cc64217930",
    "group": "a50437d2c62eda9f",
    "stratified_group": "a2d0f6c021665336",
    "time": "cc0680b7f078ed3e",
}


def steady(count: int = 600) -> Samples:
    """Made without random numbers, whose streams belong to a library's version."""
    step = np.arange(count) * 7919 % 601
    return table(
        count,
        group=[f"g{value}" for value in step * step % 61],
        time=(step % 97).astype(float),
        target=np.searchsorted([300, 480, 570], step).astype(float),
    )


@pytest.mark.parametrize("scheme", fold_schemes.SCHEMES)
def test_folds_never_change(scheme: str) -> None:
    """The same samples and seed must give the same folds in every version: otherwise all existing runs are
    invalid."""
    found = made(steady(), scheme, holdout=0.1, repeats=1 if scheme == "time" else 2)
    assert hashlib.sha256(found.assignment.astype("<i4").tobytes()).hexdigest()[:16] == FROZEN[scheme]


@pytest.mark.parametrize("scheme", fold_schemes.SCHEMES)
def test_the_order_of_rows_does_not_matter(scheme: str) -> None:
    one = table(task="regression" if scheme == "quantiles" else "multiclass")
    shuffled = Samples(one.frame.sample(frac=1, random_state=1).reset_index(drop=True), one.heads, one.hash)
    a, b = (made(each, scheme, holdout=0.2).frame.set_index("id")["fold"] for each in (one, shuffled))
    assert a.equals(b.loc[a.index])


def test_seeds_and_repeats_give_different_folds() -> None:
    first, second = made(table(), "stratified", repeats=2), made(table(), "stratified", seed=7)
    assert (first.assignment[0] == first.assignment[1]).mean() < 0.4
    assert (first.assignment[0] == second.assignment[0]).mean() < 0.4
    assert first.count == 10
    scored = [first.split(f)[1] for f in range(5, 10)]
    assert sorted(np.concatenate(scored)) == list(range(600)), "each repeat scores every row once"


# --- schemes ------------------------------------------------------------------------------------------------


def test_kfold_is_even() -> None:
    assert np.bincount(made(table(), "kfold").assignment[0]).tolist() == [120] * 5


def test_stratified_gives_each_fold_its_share() -> None:
    there = counts(made(table(), "stratified"))
    assert (there.max(axis=0) - there.min(axis=0)).max() <= 1
    assert np.ptp(there.sum(axis=1)) <= 1


def test_quantiles_give_each_fold_the_whole_range() -> None:
    numbers = table(task="regression")
    found = made(numbers, "quantiles").assignment[0]
    order = numbers.frame["target.y"].to_numpy().argsort(kind="stable")
    values = numbers.frame["target.y"].to_numpy()
    means = [values[found == f].mean() for f in range(5)]
    assert (
        np.ptp(means)
        < 0.02
        < np.ptp([values[made(numbers, "kfold").assignment[0] == f].mean() for f in range(5)])
    )
    lowest = found[order[:100]]
    assert np.bincount(lowest, minlength=5).min() >= 18


@pytest.mark.parametrize("scheme", ["group", "stratified_group"])
@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_groups_stay_together(scheme: str, holdout: float) -> None:
    found = made(table(), scheme, holdout=holdout, repeats=2)
    for repeat in range(2):
        places = pd.Series(found.assignment[repeat]).groupby(found.samples.frame["group"]).nunique()
        assert (places == 1).all()
    assert fold_audit.audit(found.samples, found)["faults"] == []
    assert abs(len(found.holdout_rows()) / 600 - holdout) < 0.03


def test_group_folds_are_even() -> None:
    assert np.ptp(np.bincount(made(table(3000), "group").assignment[0])) <= 3


@pytest.mark.parametrize("seed", range(4))
def test_stratified_groups_are_as_even_as_scikit_learns(seed: int) -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    one = table(1000, seed=seed)
    classes, groups = one.frame["target.y"].to_numpy(np.int64), one.frame["group"].to_numpy()
    theirs = np.zeros(1000, np.int64)
    for number, (_, scored) in enumerate(
        StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(classes, classes, groups)
    ):
        theirs[scored] = number
    ours = made(one, "stratified_group", seed=seed).assignment[0]
    assert spread(ours, classes, 5) <= spread(theirs, classes, 5)


def test_few_groups_are_swapped_until_no_swap_improves() -> None:
    """The greedy rule alone gives folds that are a third more uneven."""
    rng = np.random.default_rng(3)
    group = rng.integers(0, 16, 1500)
    found = fold_schemes.count_labels(group, rng.integers(0, 10, 1500))
    key = fold_schemes.sort_keys(fold_schemes.hash_ids(map(str, range(16))), 0)
    improved = fold_schemes.balance_groups(found, 5, key)

    def unevenness(fold: Codes) -> float:
        load = np.zeros((5, 10))
        np.add.at(load, (fold[found.group], found.label), found.count)
        return float(load.std(axis=0).mean())

    greedy = fold_schemes.local_search(found, 5, improved, passes=0)
    assert (greedy == improved).all()
    for a in range(16):
        for b in range(16):
            swapped = improved.copy()
            swapped[[a, b]] = swapped[[b, a]]
            assert unevenness(swapped) > 0.97 * unevenness(improved)


def test_several_labels_are_spread_together() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((3000, 8)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.004]).astype(float)
    heads = tuple(Head(f"l{i}", "binary", (f"l{i}",), (f"target.l{i}",), ("0", "1")) for i in range(8))
    frame = table(3000).frame.assign(**{f"target.l{i}": labels[:, i] for i in range(8)})
    one = Samples(frame, heads, "hash")
    for scheme, slack in (("stratified", 0.0), ("stratified_group", 0.08)):
        found = made(one, scheme)
        positives = np.array([labels[found.assignment[0] == f].sum(axis=0) for f in range(5)])
        assert (np.ptp(positives, axis=0) <= 1 + slack * positives.mean(axis=0)).all(), scheme
        assert fold_audit.audit(one, found)["faults"] == []


def test_time_trains_on_the_past() -> None:
    found = made(table(), "time", gap=5)
    time, fold = found.samples.frame["time"].to_numpy(), found.assignment[0]
    assert set(fold) == {TRAIN_ONLY, 0, 1, 2, 3, 4}
    assert pd.Series(fold).groupby(time).nunique().max() == 1, "equal times never split"
    assert np.bincount(fold + 1).min() > 80
    for number in range(5):
        train_rows, valid_rows = found.split(number)
        assert len(train_rows) and time[train_rows].max() <= time[valid_rows].min() - 5
        assert (fold[train_rows] < number).all()


def test_time_of_few_moments_never_splits_one() -> None:
    one = table(600, time=np.repeat([1.0, 2.0, 3.0], 200))
    found = made(one, "time", k=2)
    assert [len(found.split(f)[1]) for f in range(2)] == [200, 200]
    report = fold_audit.audit(one, made(one, "time", k=4))
    assert any(fault["code"] == "fold-empty" for fault in report["faults"])


# --- the locked hold-out, and rows that are only trained on -------------------------------------------------


@pytest.mark.parametrize("scheme", fold_schemes.SCHEMES)
def test_the_hold_out_is_in_no_split(scheme: str) -> None:
    found = made(table(task="regression" if scheme == "quantiles" else "multiclass"), scheme, holdout=0.2)
    locked = set(found.holdout_rows().tolist())
    assert abs(len(locked) - 120) <= (20 if "group" in scheme else 6)
    for fold in [*range(5), "full"]:
        for positions in found.split(fold):
            assert not locked & set(positions.tolist())
    if scheme == "time":
        time = found.samples.frame["time"].to_numpy()
        assert time[found.holdout_rows()].min() > time[found.split("full")[0]].max()


def test_the_hold_out_looks_like_the_whole() -> None:
    for scheme, slack in (("stratified", 0.01), ("stratified_group", 0.04)):
        found = made(table(2000), scheme, holdout=0.2)
        code = found.samples.frame["target.y"].to_numpy(np.int64)
        whole, inside = (
            np.bincount(each, minlength=4) / len(each) for each in (code, code[found.holdout_rows()])
        )
        assert np.abs(whole - inside).max() < slack, scheme


def test_extra_rows_are_trained_on_and_never_scored() -> None:
    source = np.where(np.arange(600) % 10 == 0, "extra", np.where(np.arange(600) % 10 == 1, "test", "train"))
    one = table(600, source=source)
    found = made(one, "stratified", holdout=0.1)
    assert set(found.assignment[0][source == "extra"]) == {TRAIN_ONLY}
    assert "test" not in set(one.frame["source"].to_numpy()[np.isin(one.frame["id"], found.frame["id"])])
    for fold in range(5):
        train_rows, valid_rows = found.split(fold)
        assert set(source[valid_rows]) == {"train"} and set(source[train_rows]) == {"train", "extra"}
        assert (source[train_rows] == "extra").sum() == 60


def test_a_number_is_not_stratified() -> None:
    with pytest.raises(UserError, match="use quantiles"):
        made(table(task="regression"), "stratified")
