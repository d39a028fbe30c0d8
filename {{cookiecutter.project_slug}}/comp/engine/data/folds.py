"""data/folds.parquet, and the only place that knows which rows may teach a model that is scored on a fold."""

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
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

TRAIN_ONLY, HOLDOUT = (
    -1,
    -2,
)  # trained on but never scored; the hold-out that no verb reads but an explicit last look

# Keys of competition.yaml that folds are made from.
PLAN_KEYS = ("scheme", "k", "repeats", "seed", "holdout", "gap", "blind_to_groups", "duplicates")


@dataclass(frozen=True)
class Folds:
    """`fold` runs over repeats: fold f of repeat r is r * k + f. Every row with labels has one line a repeat.

    Only source = train is scored. The fold of any other row is the one that it does not train, since that fold scores a copy of it;
    test rows have a line only then, for the day that they get pseudo-labels.
    """

    frame: pd.DataFrame  # id, repeat, fold; unit, where rows share images: one name for what belongs together
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
        """(repeats, samples): the fold of every line of the samples table, TAUGHT_ONLY where it has none."""
        out = np.full((int(self.meta["repeats"]), len(self.samples.frame)), TRAIN_ONLY, np.int64)
        for repeat in range(len(out)):
            lines = self.frame[self.frame["repeat"] == repeat]
            out[repeat, self._position(lines["id"])] = lines["fold"].to_numpy()
        return out

    def _position(self, ids: pd.Series) -> Positions:
        return np.asarray(self.samples.frame.reset_index().set_index("id")["index"].loc[ids].to_numpy())

    @cached_property
    def scorable(self) -> NDArray[np.bool_]:
        """(samples,): which rows a fold may score."""
        return (self.samples.frame["source"] == "train").to_numpy()

    @cached_property
    def oof_rows(self) -> Positions:
        """Every row that some fold scores, in order."""
        return np.flatnonzero((self.assignment[0] >= 0) & self.scorable)

    def split(self, fold: int | str) -> tuple[Positions, Positions]:
        """(positions that teach, positions that are scored). `full` teaches everything and scores nothing."""
        taught = self.samples.labeled
        if fold == "full":
            return taught[self.assignment[0, taught] != HOLDOUT], taught[:0]
        repeat, number = divmod(int(fold), int(self.meta["k"]))
        mine = self.assignment[repeat, taught]
        scored = taught[(mine == number) & self.scorable[taught]]
        free = (mine != number) & (mine != HOLDOUT)
        if self.meta["rule"] == "earlier":
            if not len(scored):
                return taught[:0], scored
            time = self.samples.frame["time"].to_numpy(np.float64)
            free &= (mine < number) & (time[taught] <= time[scored].min() - float(self.meta["gap"]))
        return taught[free], scored

    def inner_split(self, fold: int | str, share: float) -> tuple[Positions, Positions]:
        """(positions that teach, training rows held out from them): where a choice is made that must not see the scored rows.

        What belongs together stays together; of a split by time the latest are held out, with the gap before them.
        """
        taught = self.split(fold)[0]
        own = taught[self.scorable[taught]]
        if len(own) < 2:
            raise Refused(
                f"fold {fold}: {len(own)} training rows are too few to hold some out; select.on: inner needs 2"
            )
        if self.meta["rule"] == "earlier":
            time = self.samples.frame["time"].to_numpy(np.float64)
            cut = np.sort(time[own])[-max(1, round(share * len(own)))]
            held = own[time[own] >= cut]
            free = (time[taught] <= cut - float(self.meta["gap"])) & ~np.isin(taught, held)
        else:
            names, place = self.shuffled_groups(own, f"inner of {fold}")
            before = np.cumsum(np.bincount(place)) - np.bincount(place)  # rows of the units in front of each
            wanted = np.flatnonzero(before < round(share * len(own)))[: len(names) - 1]
            held = own[np.isin(place, wanted)] if len(wanted) else own[place == 0]
            free = ~np.isin(self._unit(taught), names[wanted] if len(wanted) else names[:1])
        if not free.any() or not len(held):
            raise Refused(
                f"fold {fold}: holding out {share:.0%} of the training rows leaves none to train on; lower select.share"
            )
        return taught[free], held

    def shuffled_groups(self, rows: Positions, salt: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """What belongs together among rows, in an order without meaning: names, and the place of each row's unit in them."""
        names, place = np.unique(self._unit(rows), return_inverse=True)
        hashed = [hashlib.blake2b(f"{salt}:{name}".encode(), digest_size=8).digest() for name in names]
        order = np.array(sorted(range(len(names)), key=hashed.__getitem__), np.int64)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return names[order], rank[place]

    def _unit(self, rows: Positions) -> NDArray[Any]:
        """A row's group, or where there are none the row that the host scores; and whatever shares an image with it."""
        return self._units[rows]

    @cached_property
    def _units(self) -> NDArray[Any]:
        column = "group" if "group" in self.samples.frame else "row"
        names = self.samples.frame[column].to_numpy(object).astype(str).astype(object)
        if "unit" in self.frame:
            lines = self.frame[self.frame["repeat"] == 0]
            names[self._position(lines["id"])] = lines["unit"].to_numpy(object)
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
        raise Refused(
            f"{paths.relative(file)}: made for another data/samples.parquet; frozen folds are never remade silently: comp folds --remake"
        )
    return Folds(frame, meta, samples)


def validate_plan(folds: Folds, loaded: Loaded) -> None:
    """Folds are made once: what competition.yaml declares now must be what these were made from."""
    plan, shown = loaded.config.competition.folds, paths.relative(paths.folds_file())
    faults = [
        f"{loaded.where(f'competition.folds.{key}')}: folds.{key} is {getattr(plan, key)}, and {shown} was made with {then}"
        for key in PLAN_KEYS
        if (then := folds.meta[key]) != getattr(plan, key)
    ]
    if faults:
        raise Refused(*faults, "make new folds, comp folds --remake, or set the old value again")


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
    """What every later artefact repeats: the assignment and its rule, not the file's bytes."""
    hashed = hashlib.sha256(json.dumps([meta["rule"], meta["gap"], meta["k"], meta["repeats"]]).encode())
    hashed.update("\n".join(frame["id"]).encode())
    hashed.update(frame[["repeat", "fold"]].to_numpy(np.int32).tobytes())
    if "unit" in frame:
        hashed.update("\n".join(frame["unit"]).encode())
    return hashed.hexdigest()
