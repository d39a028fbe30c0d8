"""Pseudo-labeled test rows: data/pseudo/<name>.parquet, written by comp pseudo, joins the training rows of
each fold.

A row of the table is for one fold (-1: for the refit on all data), and its label comes from models that were
not trained on what this fold scores. A fold gets its own rows and no others; folds and the rows that are
scored stay the same.
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
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

    from comp.engine.run.context import Context

FULL = -1


def soft_columns(head: Head) -> list[str]:
    """Columns of soft labels, one per class, where the samples have one column of class codes."""
    return [f"soft.{head.name}.{output}" for output in head.outputs]


def validate(cfg: Config, folds: Folds) -> None:
    """Before anything is trained: the table must exist and belong to these samples and folds."""
    name = cfg.data.pseudo_labels
    if name is None:
        return
    file = paths.pseudo_file(name)
    entry = artifacts.manifest_entry(file)
    if entry is None:
        known = sorted(each.stem for each in file.parent.glob("*.parquet"))
        closest = f"the nearest are {', '.join(nearest(name, known, 3))}; " if known else ""
        raise UserError(
            "pseudo-unknown",
            where=paths.relative(file),
            key="data.pseudo_labels",
            what="no such table",
            remedy=f"{closest}comp pseudo RUN writes one",
        )
    for what, now in (("samples", folds.samples.hash), ("folds", folds.hash)):
        if entry[what] != now:
            raise UserError(
                "pseudo-outdated",
                where=paths.relative(file),
                key="data.pseudo_labels",
                what=f"made for other {what}",
                remedy=f"make it again: {entry['command']}",
            )
    if folds.meta["rule"] == "earlier":
        raise UserError(
            "knob-unused",
            key="data.pseudo_labels",
            what="folds by time train on earlier rows only, and test rows are later",
            remedy="set it to null",
        )


def fold_context(context: Context, fold: int | str) -> Context:
    """The context of one fold: its pseudo-labeled test rows join the training rows, with a label, a weight
    and another source."""
    name = context.cfg.data.pseudo_labels
    if name is None:
        return context
    validate(context.cfg, context.folds)
    samples = add_rows(context.samples, read(name), name, fold)
    return replace(context, samples=samples, folds=replace(context.folds, samples=samples))


def read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(artifacts.verified(paths.pseudo_file(name), "comp pseudo RUN writes it"))


def add_rows(samples: Samples, table: pd.DataFrame, name: str, fold: int | str) -> Samples:
    """The samples with the pseudo labels of one fold filled in; `table` is data/pseudo/<name>.parquet."""
    frame = samples.frame.copy()
    table = table[table["fold"] == (FULL if fold == "full" else int(fold))]
    at = frame.reset_index().set_index("id")["index"].loc[table["id"]].to_numpy()
    assert (frame["source"].to_numpy()[at] == "test").all(), "only test rows get a pseudo label"
    source = frame["source"].to_numpy(object)
    source[at] = f"pseudo:{name}:fold{fold}"
    frame["source"] = source
    weight = frame["weight"].to_numpy(np.float64).copy()
    weight[at] *= table["weight"].to_numpy()
    frame["weight"] = weight
    for column in [each for each in map(str, table) if each.startswith(("target.", "soft."))]:
        values = frame[column].to_numpy(np.float64).copy() if column in frame else np.full(len(frame), np.nan)
        values[at] = table[column].to_numpy()
        frame[column] = values
    return replace(samples, frame=frame)


def training_target(samples: Samples, head: Head) -> NDArray[Any]:
    """Targets of a head for every row, as the loss takes them: class codes, or a share per class where some
    labels are soft."""
    values = head.spec.encode_target(np.nan_to_num(samples.targets(head)))
    if soft_columns(head)[0] not in samples.frame:
        return values
    shares = samples.frame[soft_columns(head)].to_numpy(np.float64)
    return np.where(np.isnan(shares), np.eye(len(head.outputs))[values], shares)
