"""What a download seems to be: its id, rows, target, task, form and groups. Guesses with reasons, for comp inspect; nothing else
in the project ever guesses. Which file is what: finding.py."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from comp import metrics
from comp.engine.errors import Refused
from comp.engine.extras import examples, find_tables
from comp.engine.extras.find_tables import Found
from comp.engine.readers import layouts

if TYPE_CHECKING:
    import pandas as pd

GROUPS = re.compile(
    r"patient|subject|person|user|owner|writer|location|site|camera|seq_id|study|slide|volume|group", re.I
)


def look(raw: Path) -> Found:
    found = Found()
    tables, pictures = find_tables.files(raw)
    sample = find_tables.sample(raw, tables)
    frames = dict(find_tables.opened(raw, [name for name in tables if name != sample[0]], found))
    train = find_tables.table("train", frames, sample[1])
    test = find_tables.table("test", frames, sample[1])
    index = find_tables.Index(pictures)
    found.say("submission.sample", sample[0], "its name, and few columns")
    if train is None:
        find_tables.from_paths(found, index, sample[1])
        frame = layouts.files_frame(raw, found.says["train.files"])
    else:
        frame = frames[train]
        found.say("train.table", train, f"{len(frame)} rows of {', '.join(map(str, frame.columns[:6]))}")
        find_tables.images(found, "train", frame, index, train)
    key = str(sample[1].columns[0])
    if test is None:
        found.say("test.table", sample[0], "no table of test rows beside the sample submission")
    else:
        found.say("test.table", test, f"{len(frames[test])} rows")
    testing = sample[1] if test is None else frames[test]
    find_tables.images(found, "test", testing, index, test or sample[0])
    _ids(found, frame, testing, key, set(sample[1].iloc[:, 0]))
    _target(found, frame, testing, sample[1], test is None)
    _groups(found, frame, testing)
    examples.choose(found, raw, "train", frame)
    examples.choose(found, raw, "test", testing)
    return found


def _ids(found: Found, frame: pd.DataFrame, testing: pd.DataFrame, key: str, wanted: set[str]) -> None:
    def unique(column: str) -> bool:
        return column in frame and frame[column].is_unique

    same = [str(c) for c in testing.columns if testing[c].is_unique and set(testing[c]) == wanted]
    named = re.findall(r"\{([^}\[]+)", found.says.get("train.image", "{id}"))
    choices = [key, *same, *reversed(named), "id", "image_id"]
    id_ = next((c for c in choices if unique(c)), None) or str(frame.columns[0])
    found.say("id", id_, "the sample's id column" if id_ == key else "no two training rows share it")
    keyed = next((c for c in [key, *same, id_] if c in testing), str(testing.columns[0]))
    if (
        keyed not in frame
        and keyed != id_
        and key in testing
        and id_ in testing
        and not testing[key].is_unique
    ):
        found.say("id", id_, "a row of the sample has several images")
        _rows(found, frame, testing, key)
    elif keyed != id_:
        found.say("test.id", keyed, "there it is called so")


def _rows(found: Found, frame: pd.DataFrame, testing: pd.DataFrame, key: str) -> None:
    """Several images make a row of the sample: a template of columns that builds its key."""
    shared = [str(c) for c in testing.columns if c in frame and c != key]
    first = testing.iloc[0]
    for a in shared:
        for b in shared:
            if (
                a != b
                and f"{first[a]}_{first[b]}" == first[key]
                and ((testing[a] + "_" + testing[b]) == testing[key]).all()
            ):
                found.say("row", f"{{{a}}}_{{{b}}}", f"builds {key} of the test rows; merge: mean or max")
                found.say("group", a, "part of the scored row")
                return
    found.unsure.append(f"row: no two columns build {key}; several test rows share it")


def _target(
    found: Found, frame: pd.DataFrame, testing: pd.DataFrame, sample: pd.DataFrame, bare: bool
) -> None:
    columns = [str(c) for c in frame.columns]
    answers = [str(c) for c in sample.columns[1:]]
    only = [c for c in columns if bare or c not in testing]
    form = "probabilities" if len(answers) > 1 else ""
    inside = [c for c in answers if c in columns]
    if len(answers) > 1 and inside == answers:
        numbers = frame[answers].astype(float)
        if numbers.isin([0, 1]).all().all():
            found.labels = Counter({c: int(numbers[c].sum()) for c in answers})
            if (numbers.sum(axis=1) == 1).all():
                _say(found, answers, "multiclass", "roc_auc", form, "one-hot columns, those of the sample")
            else:
                flags = [c for c in only if frame[c].isin(["0", "1"]).all()]
                more = (
                    f"; {len(flags) - len(answers)} more are not graded" if len(flags) > len(answers) else ""
                )
                _say(found, flags, "multilabel", "mean_column_auc", form, f"columns of 0 and 1{more}")
        else:
            soft = (numbers >= 0).all().all() and (abs(numbers.sum(axis=1) - 1) < 1e-3).all()
            found.spread = "; ".join(f"{c}: {_spread(numbers[c])}" for c in answers[:8])
            _say(
                found,
                answers,
                "multiclass" if soft else "regression",
                "kl" if soft else "rmse",
                form if soft else "value",
                "shares" if soft else "numbers",
            )
        return
    by_values = [
        c
        for c in only
        if len(answers) > 1 and len(set(frame[c].dropna()) & set(answers)) > 0.5 * frame[c].nunique()
    ]
    if by_values:
        found.labels = Counter(frame[by_values[0]].dropna())
        _say(found, by_values[:1], "multiclass", "log_loss", form, "its values are the sample's columns")
        return
    likely = [
        c
        for c in [*inside, "label", "category_id", "target", "class", *only]
        if c in only and c != found.says["id"]
    ]
    if not likely:
        raise Refused(
            "data/raw: no column of the training table is absent from the test rows; write configs/competition.yaml by hand"
        )
    _one(found, likely[0], frame, sample.iloc[:, 1].dropna().astype(str))
    others = [c for c in dict.fromkeys(likely) if c != likely[0]]
    if others and not inside:
        found.unsure.append(f"target: {likely[0]}; others that the test rows lack: {', '.join(others[:5])}")


def _one(found: Found, name: str, frame: pd.DataFrame, cells: pd.Series) -> None:
    values = frame[name].dropna().astype(str)
    found.labels = Counter(values)
    several = values.str.contains(" ").mean() > 0.05 and cells.str.contains(" ").any()
    numeric = values.str.fullmatch(r"-?\d+(\.\d+)?").all()
    given = cells.str.fullmatch(r"-?\d*\.\d+").mean() > 0.5 if len(cells) else False
    if several:
        found.labels = Counter(part for cell in values for part in cell.split())
        _say(found, [name], "multilabel", "f1_micro", "labels", "several ids in a cell")
    elif len(cells) and cells.str.contains(" ").mean() > 0.5:
        k = int(max(len(cell.split()) for cell in cells))
        _say(found, [name], "retrieval", f"map@{k}", "ranking", f"the sample lists {k} labels a row")
        found.say("submission.k", k, "as many as in the sample")
    elif values.nunique() == 2:
        _say(found, [name], "binary", "roc_auc", "probability", "two values")
    elif (
        numeric
        and (given or values.nunique() > 0.2 * len(values) or values.str.contains(r"\.").any())
        and not cells.isin(set(values)).all()
    ) or (numeric and given):
        _regression(found, name, values)
    else:
        metric = "f1_macro" if values.nunique() > 20 else "accuracy"
        _say(found, [name], "multiclass", metric, "label", f"{values.nunique()} values")
        if numeric and values.nunique() < 12:
            found.unsure.append("task: multiclass; ordinal, with metric qwk, where its numbers are grades")


def _regression(found: Found, name: str, values: pd.Series) -> None:
    low, high = values.astype(float).min(), values.astype(float).max()
    found.labels, found.spread = Counter(), f"{name}: {_spread(values.astype(float))}"
    _say(found, [name], "regression", "rmse", "value", f"numbers from {low:g} to {high:g}")
    found.say(
        "submission.range",
        [float(low), float(high)],
        "that of the training rows; what lies a little outside is moved to its edge",
    )


def _say(found: Found, target: list[str], task: str, metric: str, form: str, why: str) -> None:
    found.say("target", target if len(target) > 1 else target[0], why)
    found.say("task", task, why)
    found.say("metric", metric, "GUESSED from the task; the page of the competition says which")
    found.say("submission.form", form, "the sample's columns and cells")
    needs = metrics.find(metric).needs
    fit = [each for each in metrics.METRICS.values() if task in each.tasks and each.name != metric]
    line = f"metric: {metric}; also {', '.join(each.name for each in fit if each.needs == needs)}"
    if task == "binary":
        line += f"; with form label: {', '.join(each.name for each in fit if each.needs == 'label')}"
    found.unsure.append(line)


def _spread(values: pd.Series) -> str:
    low, middle, high = values.quantile([0.05, 0.5, 0.95])
    return f"{values.min():g} to {values.max():g}, half of them above {middle:g}, nine in ten from {low:g} to {high:g}"


def _groups(found: Found, frame: pd.DataFrame, testing: pd.DataFrame) -> None:
    told = found.says["target"]
    used = {found.says["id"], *(told if isinstance(told, list) else [told])}
    repeated = [str(c) for c in frame.columns if c not in used and 1 < frame[c].nunique() < 0.9 * len(frame)]
    candidates = [
        c for c in repeated if GROUPS.search(c) and frame[c].notna().all() and frame[c].nunique() > 9
    ]
    if candidates and "group" not in found.says:
        found.say("group", candidates[0], f"{frame[candidates[0]].nunique()} values, by its name")
        if len(candidates) > 1:
            found.unsure.append(f"group: {', '.join(candidates)} would all do")
    task = found.says["task"]
    plain = "quantiles" if task == "regression" else "stratified"
    found.say(
        "folds.scheme",
        "stratified_group"
        if "group" in found.says and task != "regression"
        else "group"
        if "group" in found.says
        else plain,
        "from target and group",
    )
    found.say("folds.k", 5, "the usual; fewer where training is slow")
    found.say("folds.seed", 0, "any; another one is another cut")
    shared = [
        c
        for c in repeated
        if c in testing
        and c not in (found.says.get("group"), found.says.get("test.id"))
        and frame[c].nunique() < 200
    ]
    if shared:
        found.say("metadata", shared[:20], "in train and test alike; used by model.metadata: true")
