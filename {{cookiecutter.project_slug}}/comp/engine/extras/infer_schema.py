"""For comp inspect: guesses of id, rows, target, task, metric, form and groups of a download, each with its
reason. Nothing else in the project guesses."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from comp import metrics
from comp.engine.errors import UserError
from comp.engine.extras import find_images, find_tables
from comp.engine.extras.find_images import Examples
from comp.engine.extras.find_tables import BY_HAND, Guesses
from comp.engine.readers import layouts

if TYPE_CHECKING:
    import pandas as pd

GROUPS = re.compile(
    r"patient|subject|person|user|owner|writer|location|site|camera|seq_id|study|slide|volume|group", re.I
)


class Inferred(NamedTuple):
    guesses: Guesses
    train: Examples
    test: Examples


def infer(raw: Path) -> Inferred:
    guesses = Guesses()
    tables, images = find_tables.files(raw)
    sample_name, sample = find_tables.sample_submission(raw, tables)
    others = [name for name in tables if name != sample_name]
    frames = dict(find_tables.read_tables(raw, others, guesses))
    train_name = find_tables.choose_table("train", frames, sample)
    test_name = find_tables.choose_table("test", frames, sample)
    index = find_images.PathIndex(images)
    guesses.set("submission.sample", sample_name, "its name, and few columns")
    if train_name is None:
        find_images.labels_from_paths(guesses, index)
        train = layouts.files_frame(raw, guesses.values["train.files"])
    else:
        train = frames[train_name]
        columns = ", ".join(map(str, train.columns[:6]))
        guesses.set("train.table", train_name, f"{len(train)} rows of {columns}")
        find_images.image_template(guesses, "train", train, index, train_name)
    if test_name is None:
        test = sample
        guesses.set("test.table", sample_name, "no table of test rows except the sample submission")
    else:
        test = frames[test_name]
        guesses.set("test.table", test_name, f"{len(test)} rows")
    find_images.image_template(guesses, "test", test, index, test_name or sample_name)
    _ids(guesses, train, test, sample)
    _target(guesses, train, test, sample, no_test_table=test_name is None)
    _groups(guesses, train, test)
    return Inferred(
        guesses,
        find_images.examples(guesses, raw, "train", train),
        find_images.examples(guesses, raw, "test", test),
    )


# --- ids and rows -------------------------------------------------------------------------------------------


def _ids(guesses: Guesses, train: pd.DataFrame, test: pd.DataFrame, sample: pd.DataFrame) -> None:
    key, sample_ids = str(sample.columns[0]), set(sample.iloc[:, 0])
    same = [str(c) for c in test.columns if test[c].is_unique and set(test[c]) == sample_ids]
    in_template = re.findall(r"\{([^}\[]+)", guesses.values.get("train.image", "{id}"))
    candidates = [key, *same, *reversed(in_template), "id", "image_id"]
    unique = (c for c in candidates if c in train and train[c].is_unique)
    id_ = next(unique, None) or str(train.columns[0])
    guesses.set("id", id_, "the sample's id column" if id_ == key else "unique in the training table")
    test_id = next((c for c in [key, *same, id_] if c in test), str(test.columns[0]))
    if test_id not in train and test_id != id_ and key in test and id_ in test and not test[key].is_unique:
        guesses.set("id", id_, "a row of the sample has several images")
        _row_template(guesses, train, test, key)
    elif test_id != id_:
        guesses.set("test.id", test_id, "its name in the test table")


def _row_template(guesses: Guesses, train: pd.DataFrame, test: pd.DataFrame, key: str) -> None:
    """Where a row of the sample has several images: two columns of the test table that make up its key."""
    shared = [str(c) for c in test.columns if c in train and c != key]
    first = test.iloc[0]
    for a in shared:
        for b in shared:
            if (
                a != b
                and f"{first[a]}_{first[b]}" == first[key]
                and ((test[a] + "_" + test[b]) == test[key]).all()
            ):
                guesses.set("row", f"{{{a}}}_{{{b}}}", f"equals {key} of the test rows; merge: mean or max")
                guesses.set("group", a, "part of the scored row")
                return
    guesses.ambiguous.append(f"row: no two columns make up {key}; several test rows share it")


# --- target, task, metric, form -----------------------------------------------------------------------------


def _target(
    guesses: Guesses, train: pd.DataFrame, test: pd.DataFrame, sample: pd.DataFrame, no_test_table: bool
) -> None:
    columns = [str(c) for c in train.columns]
    predicted = [str(c) for c in sample.columns[1:]]
    train_only = [c for c in columns if no_test_table or c not in test]
    form = "probabilities" if len(predicted) > 1 else ""
    in_train = [c for c in predicted if c in columns]
    if len(predicted) > 1 and in_train == predicted:
        _several_columns(guesses, train, predicted, train_only, form)
        return
    by_value = [
        c
        for c in train_only
        if len(predicted) > 1 and len(set(train[c].dropna()) & set(predicted)) > 0.5 * train[c].nunique()
    ]
    if by_value:
        guesses.label_counts = Counter(train[by_value[0]].dropna())
        reason = "its values are the sample's columns"
        _set_task(guesses, by_value[:1], "multiclass", "log_loss", form, reason)
        return
    likely = [
        c
        for c in [*in_train, "label", "category_id", "target", "class", *train_only]
        if c in train_only and c != guesses.values["id"]
    ]
    if not likely:
        raise UserError(
            "target-missing",
            where="data/raw",
            what="every column of the training table is in the test table too",
            remedy=BY_HAND,
        )
    _one_column(guesses, likely[0], train, sample.iloc[:, 1].dropna().astype(str))
    others = [c for c in dict.fromkeys(likely) if c != likely[0]]
    if others and not in_train:
        guesses.ambiguous.append(
            f"target: {likely[0]}; also only in the training table: {', '.join(others[:5])}"
        )


def _several_columns(
    guesses: Guesses, train: pd.DataFrame, predicted: list[str], train_only: list[str], form: str
) -> None:
    """The sample's columns are columns of the training table: one-hot, several labels, shares or values."""
    numbers = train[predicted].astype(float)
    if numbers.isin([0, 1]).all().all():
        guesses.label_counts = Counter({c: int(numbers[c].sum()) for c in predicted})
        if (numbers.sum(axis=1) == 1).all():
            reason = "one-hot columns, those of the sample"
            _set_task(guesses, predicted, "multiclass", "roc_auc", form, reason)
        else:
            flags = [c for c in train_only if train[c].isin(["0", "1"]).all()]
            more = (
                f"; {len(flags) - len(predicted)} more are not graded" if len(flags) > len(predicted) else ""
            )
            _set_task(guesses, flags, "multilabel", "mean_column_auc", form, f"columns of 0 and 1{more}")
        return
    soft = (numbers >= 0).all().all() and (abs(numbers.sum(axis=1) - 1) < 1e-3).all()
    guesses.value_range = "; ".join(f"{c}: {_range(numbers[c])}" for c in predicted[:8])
    if soft:
        _set_task(guesses, predicted, "multiclass", "kl", form, "shares")
    else:
        _set_task(guesses, predicted, "regression", "rmse", "value", "numbers")


def _one_column(guesses: Guesses, name: str, train: pd.DataFrame, cells: pd.Series) -> None:
    """`cells`: what the sample submission has where the prediction goes."""
    values = train[name].dropna().astype(str)
    guesses.label_counts = Counter(values)
    several = values.str.contains(" ").mean() > 0.05 and cells.str.contains(" ").any()
    numeric = values.str.fullmatch(r"-?\d+(\.\d+)?").all()
    decimals = cells.str.fullmatch(r"-?\d*\.\d+").mean() > 0.5 if len(cells) else False
    if several:
        guesses.label_counts = Counter(part for cell in values for part in cell.split())
        _set_task(guesses, [name], "multilabel", "f1_micro", "labels", "several ids in a cell")
    elif len(cells) and cells.str.contains(" ").mean() > 0.5:
        k = int(max(len(cell.split()) for cell in cells))
        _set_task(guesses, [name], "retrieval", f"map@{k}", "ranking", f"the sample has {k} labels per row")
        guesses.set("submission.k", k, "as many as in the sample")
    elif values.nunique() == 2:
        _set_task(guesses, [name], "binary", "roc_auc", "probability", "two values")
    elif (
        numeric
        and (decimals or values.nunique() > 0.2 * len(values) or values.str.contains(r"\.").any())
        and not cells.isin(set(values)).all()
    ) or (numeric and decimals):
        _regression(guesses, name, values)
    else:
        metric = "f1_macro" if values.nunique() > 20 else "accuracy"
        _set_task(guesses, [name], "multiclass", metric, "label", f"{values.nunique()} values")
        if numeric and values.nunique() < 12:
            guesses.ambiguous.append("task: multiclass; ordinal, with metric qwk, if its numbers are grades")


def _regression(guesses: Guesses, name: str, values: pd.Series) -> None:
    low, high = values.astype(float).min(), values.astype(float).max()
    guesses.label_counts, guesses.value_range = Counter(), f"{name}: {_range(values.astype(float))}"
    _set_task(guesses, [name], "regression", "rmse", "value", f"numbers from {low:g} to {high:g}")
    guesses.set(
        "submission.range",
        [float(low), float(high)],
        "that of the training rows; predictions a little outside are clipped to it",
    )


def _set_task(guesses: Guesses, target: list[str], task: str, metric: str, form: str, reason: str) -> None:
    guesses.set("target", target if len(target) > 1 else target[0], reason)
    guesses.set("task", task, reason)
    guesses.set("metric", metric, "GUESSED from the task; see the evaluation page of the competition")
    guesses.set("submission.form", form, "the sample's columns and cells")
    needs = metrics.find(metric).needs
    others = [m for m in metrics.METRICS.values() if task in m.tasks and m.name != metric]
    line = f"metric: {metric}; also {', '.join(m.name for m in others if m.needs == needs)}"
    if task == "binary":
        line += f"; with form label: {', '.join(m.name for m in others if m.needs == 'label')}"
    guesses.ambiguous.append(line)


def _range(values: pd.Series) -> str:
    low, median, high = values.quantile([0.05, 0.5, 0.95])
    return f"{values.min():g} to {values.max():g}, median {median:g}, 90 % from {low:g} to {high:g}"


# --- groups, folds, metadata --------------------------------------------------------------------------------


def _groups(guesses: Guesses, train: pd.DataFrame, test: pd.DataFrame) -> None:
    target = guesses.values["target"]
    used = {guesses.values["id"], *(target if isinstance(target, list) else [target])}
    repeated = [str(c) for c in train.columns if c not in used and 1 < train[c].nunique() < 0.9 * len(train)]
    candidates = [
        c for c in repeated if GROUPS.search(c) and train[c].notna().all() and train[c].nunique() > 9
    ]
    if candidates and "group" not in guesses.values:
        guesses.set("group", candidates[0], f"{train[candidates[0]].nunique()} values, by its name")
        if len(candidates) > 1:
            guesses.ambiguous.append(f"group: {', '.join(candidates)} are all possible")
    regression, grouped = guesses.values["task"] == "regression", "group" in guesses.values
    if grouped:
        scheme = "group" if regression else "stratified_group"
    else:
        scheme = "quantiles" if regression else "stratified"
    guesses.set("folds.scheme", scheme, "from target and group")
    guesses.set("folds.k", 5, "the usual number; fewer if training is slow")
    guesses.set("folds.seed", 0, "any number; another one makes other folds")
    shared = [
        c
        for c in repeated
        if c in test
        and c not in (guesses.values.get("group"), guesses.values.get("test.id"))
        and train[c].nunique() < 200
    ]
    if shared:
        guesses.set("metadata", shared[:20], "in train and test; used by model.metadata: true")
