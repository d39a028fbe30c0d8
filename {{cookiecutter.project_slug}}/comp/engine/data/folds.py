"""data/folds.parquet, and the training and validation rows of each fold, which are computed only here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.resolve import Loaded
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError, joined
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

# Special values of the column `fold`.
TRAIN_ONLY = -1  # trained on, never scored
HOLDOUT = -2  # the locked hold-out: read only by comp predict NAME --last-look

# Keys of competition.yaml from which folds are made.
PLAN_KEYS = ("scheme", "k", "repeats", "seed", "holdout", "gap", "blind_to_groups", "duplicates")


@dataclass(frozen=True)
class Folds:
    """The folds of all repeats: fold f of repeat r is r * k + f. Every labeled row has one line per repeat.

    Only source = train is scored. For any other row, `fold` is the fold that must not train
    on it, because it scores a duplicate of the row. A test row has a line only if it has such a duplicate;
    it matters if the test row is pseudo-labeled.
    """

    frame: pd.DataFrame  # id, repeat, fold; and group, if rows share images: see make_folds
    meta: dict[str, Any]  # scheme, k, repeats, seed, holdout, rule, gap, samples, hash
    samples: Samples

    @property
    def count(self) -> int:
        return int(self.meta["k"]) * int(self.meta["repeats"])

    @property
    def hash(self) -> str:
        return str(self.meta["hash"])

    @cached_property
    def assignment(self) -> NDArray[np.int64]:
        """(repeats, samples): the fold of every line of the samples table; TRAIN_ONLY if it has no line."""
        out = np.full((int(self.meta["repeats"]), len(self.samples.frame)), TRAIN_ONLY, np.int64)
        for repeat in range(len(out)):
            lines = self.frame[self.frame["repeat"] == repeat]
            out[repeat, self._positions(lines["id"])] = lines["fold"].to_numpy()
        return out

    def _positions(self, ids: pd.Series) -> Positions:
        return np.asarray(self.samples.frame.reset_index().set_index("id")["index"].loc[ids].to_numpy())

    @cached_property
    def scorable(self) -> NDArray[np.bool_]:
        """(samples,): whether a fold may score the row."""
        return (self.samples.frame["source"] == "train").to_numpy()

    @cached_property
    def oof_rows(self) -> Positions:
        """Rows that some fold scores, in order: those with an out-of-fold prediction."""
        return np.flatnonzero((self.assignment[0] >= 0) & self.scorable)

    def split(self, fold: int | str) -> tuple[Positions, Positions]:
        """(train_rows, valid_rows) of a fold. `full` trains on all rows and validates on none."""
        labeled = self.samples.labeled
        if fold == "full":
            return labeled[self.assignment[0, labeled] != HOLDOUT], labeled[:0]
        repeat, number = divmod(int(fold), int(self.meta["k"]))
        assigned = self.assignment[repeat, labeled]
        valid_rows = labeled[(assigned == number) & self.scorable[labeled]]
        train = (assigned != number) & (assigned != HOLDOUT)
        if self.meta["rule"] == "earlier":
            if not len(valid_rows):
                return labeled[:0], valid_rows
            time = self.samples.frame["time"].to_numpy(np.float64)
            latest = time[valid_rows].min() - float(self.meta["gap"])
            train &= (assigned < number) & (time[labeled] <= latest)
        return labeled[train], valid_rows

    def inner_split(self, fold: int | str, share: float) -> tuple[Positions, Positions]:
        """Splits the training rows of a fold into (train_rows, inner validation rows), to select the best
        epoch and the like without the fold's validation rows.

        Groups stay together. Of a split by time the latest rows are held out, with folds.gap before them.
        """
        rows = self.split(fold)[0]
        own = rows[self.scorable[rows]]
        if len(own) < 2:
            raise UserError(
                "fold-too-small",
                where=f"fold {fold}",
                what=f"has {len(own)} training rows; select.on: inner needs at least 2",
                remedy="set select.on to another value",
            )
        if self.meta["rule"] == "earlier":
            time = self.samples.frame["time"].to_numpy(np.float64)
            cut = np.sort(time[own])[-max(1, round(share * len(own)))]
            inner_valid = own[time[own] >= cut]
            train = (time[rows] <= cut - float(self.meta["gap"])) & ~np.isin(rows, inner_valid)
        else:
            names, group = self.shuffled_groups(own, f"inner of {fold}")
            before = np.cumsum(np.bincount(group)) - np.bincount(
                group
            )  # number of rows in the groups before each one
            chosen = np.flatnonzero(before < round(share * len(own)))[: len(names) - 1]
            inner_valid = own[np.isin(group, chosen)] if len(chosen) else own[group == 0]
            train = ~np.isin(self._groups[rows], names[chosen] if len(chosen) else names[:1])
        if not train.any() or not len(inner_valid):
            raise UserError(
                "select-share-too-large",
                where=f"fold {fold}",
                key="select.validation_fraction",
                what=f"{share:.0%} of the training rows held out leaves no row to train on",
                remedy="lower it",
            )
        return rows[train], inner_valid

    def shuffled_groups(self, rows: Positions, salt: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Names of the groups among `rows` in an order drawn by `salt`, and for each row the index of its
        group.

        The order comes from a hash, so it depends on names and salt only.
        """
        names, group = np.unique(self._groups[rows], return_inverse=True)
        hashed = [hashlib.blake2b(f"{salt}:{name}".encode(), digest_size=8).digest() for name in names]
        order = np.array(sorted(range(len(names)), key=hashed.__getitem__), np.int64)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return names[order], rank[group]

    @cached_property
    def _groups(self) -> NDArray[Any]:
        """(samples,): the group of rows that must stay together: the declared group, else the scored row,
        joined with rows that share images."""
        column = "group" if "group" in self.samples.frame else "row"
        names = self.samples.frame[column].to_numpy(object).astype(str).astype(object)
        if "group" in self.frame:
            lines = self.frame[self.frame["repeat"] == 0]
            names[self._positions(lines["id"])] = lines["group"].to_numpy(object)
        return names.astype(str)

    def holdout_rows(self) -> Positions:
        return np.flatnonzero((self.assignment[0] == HOLDOUT) & self.scorable)


def read(file: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(artifacts.verified(file, "make it with: comp folds"))
    return table.to_pandas(), json.loads(table.schema.metadata[b"comp"])


def load(samples: Samples, file: Path | None = None) -> Folds:
    file = file or paths.folds_file()
    frame, meta = read(file)
    if meta["samples"] != samples.hash:
        raise UserError(
            "folds-stale",
            where=paths.relative(file),
            what="was made for another data/samples.parquet",
            remedy="make new folds with comp folds --remake; runs on the old ones cannot be continued",
        )
    return Folds(frame, meta, samples)


def validate_plan(folds: Folds, loaded: Loaded) -> None:
    """Raises UserError unless the folds were made from what competition.yaml declares now."""
    plan, shown = loaded.config.competition.folds, paths.relative(paths.folds_file())
    faults = [
        UserError(
            "folds-differ",
            where=loaded.where(f"competition.folds.{key}"),
            key=f"folds.{key}",
            what=f"is {getattr(plan, key)}, but {shown} was made with {then}",
            remedy="restore the value or make new folds with comp folds --remake",
        )
        for key in PLAN_KEYS
        if (then := folds.meta[key]) != getattr(plan, key)
    ]
    if faults:
        raise joined(faults)


def save(frame: pd.DataFrame, meta: dict[str, Any], file: Path | None = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file or paths.folds_file()
    meta = meta | {"hash": content_hash(frame, meta)}
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(
        {"comp": json.dumps(meta)}
    )
    with artifacts.atomic(file) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    artifacts.add_to_manifest(file, hash=meta["hash"])
    return file


def content_hash(frame: pd.DataFrame, meta: dict[str, Any]) -> str:
    """Hash of the assignment and its rule, not of the file, whose bytes depend on pyarrow's version."""
    hashed = hashlib.sha256(json.dumps([meta["rule"], meta["gap"], meta["k"], meta["repeats"]]).encode())
    hashed.update("\n".join(frame["id"]).encode())
    hashed.update(frame[["repeat", "fold"]].to_numpy(np.int32).tobytes())
    if "group" in frame:
        hashed.update("\n".join(frame["group"]).encode())
    return hashed.hexdigest()
