"""Test rows that teach: data/pseudo/<name>.parquet, as comp pseudo wrote it, joins the training rows of each fold.

A line is for one fold (-1: for the refit on all data), and its label is from models that never saw what this fold scores. So a
fold gets its own lines and no others; samples, folds and the rows that are scored stay what they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

    from comp.engine.run.context import Context

FULL = -1


def soft_columns(head: Head) -> list[str]:
    """Columns for shares of classes, where the samples have a column of class codes."""
    return [f"soft.{head.name}.{output}" for output in head.outputs]


def validate(cfg: Config, folds: Folds) -> None:
    """Before anything is spent: is there such a table, and was it made for these rows and folds?"""
    name = cfg.data.pseudo_labels
    if name is None:
        return
    file = paths.pseudo_file(name)
    entry = artifacts.manifest_entry(file)
    if entry is None:
        known = sorted(each.stem for each in file.parent.glob("*.parquet"))
        there = f"the nearest are {', '.join(nearest(name, known, 3))}; " if known else ""
        raise Refused(
            f"data.pseudo_labels: {paths.relative(file)}: no such table; {there}comp pseudo RUN writes one"
        )
    for what, now in (("samples", folds.samples.hash), ("folds", folds.hash)):
        if entry[what] != now:
            raise Refused(
                f"data.pseudo_labels: {paths.relative(file)}: made for other {what}; make it again: {entry['command']}"
            )
    if folds.meta["rule"] == "earlier":
        raise Refused(
            "data.pseudo_labels: has no effect on folds by time: earlier rows teach a fold, and test rows come later; set it to null"
        )


def fold_context(context: Context, number: int | str) -> Context:
    """The context of one fold: its pseudo-labelled test rows join the training rows, with a label, a weight and another source."""
    name = context.cfg.data.pseudo_labels
    if name is None:
        return context
    validate(context.cfg, context.folds)
    samples = add_rows(context.samples, read(name), name, number)
    return replace(context, samples=samples, folds=replace(context.folds, samples=samples))


def read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(artifacts.verified(paths.pseudo_file(name), "comp pseudo RUN writes it"))


def add_rows(samples: Samples, lines: pd.DataFrame, name: str, number: int | str) -> Samples:
    frame = samples.frame.copy()
    lines = lines[lines["fold"] == (FULL if number == "full" else int(number))]
    at = frame.reset_index().set_index("id")["index"].loc[lines["id"]].to_numpy()
    assert (frame["source"].to_numpy()[at] == "test").all(), "only test rows get a label"
    source = frame["source"].to_numpy(object)
    source[at] = f"pseudo:{name}:fold{number}"
    frame["source"] = source
    weight = frame["weight"].to_numpy(np.float64).copy()
    weight[at] *= lines["weight"].to_numpy()
    frame["weight"] = weight
    for column in [each for each in map(str, lines) if each.startswith(("target.", "soft."))]:
        values = frame[column].to_numpy(np.float64).copy() if column in frame else np.full(len(frame), np.nan)
        values[at] = lines[column].to_numpy()
        frame[column] = values
    return replace(samples, frame=frame)


def training_target(samples: Samples, head: Head) -> NDArray[Any]:
    """What the loss takes, for every row: class codes, or shares of each class where labels of a few rows are soft."""
    values = head.spec.encode_target(np.nan_to_num(samples.targets(head)))
    if soft_columns(head)[0] not in samples.frame:
        return values
    shares = samples.frame[soft_columns(head)].to_numpy(np.float64)
    return np.where(np.isnan(shares), np.eye(len(head.outputs))[values], shares)
