"""data/folds.parquet: who is scored when. Made once; the same samples, scheme and seed give the same bytes anywhere.

Only source = train is ever scored. Extra rows are TAUGHT_ONLY, and so is the first block of time.

Rows that name one image file share a fold under any scheme but time, and so do copies with folds.duplicates: group. An extra or a
test row that shares an image with a scored row gets the fold of that row, which means: it never trains that fold (folds.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import competition_schema
from comp.engine.config.schema import Config
from comp.engine.data import duplicates, exact_duplicates, fold_audit, fold_balance, folds
from comp.engine.data import samples as table
from comp.engine.data.fold_balance import Ints, Keys
from comp.engine.data.folds import HOLDOUT, TRAIN_ONLY, Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

TOGETHER: dict[competition_schema.Scheme, competition_schema.Scheme] = {  # what a scheme is where copies are groups
    "kfold": "group", "stratified": "stratified_group", "quantiles": "stratified_group"
}  # fmt: skip
NO_PAIRS: Ints = np.zeros((0, 2), np.int64)
DRAWS = 64  # hold-outs of whole groups that are drawn, to keep the one most like the whole


@dataclass(frozen=True)
class TrainRows:
    """What folds are made from, one line a training row."""

    hashed: Keys
    labels: Ints  # one class a row, or (rows, labels) of 0 and 1
    value: NDArray  # where a row stands among the targets, for quantiles
    group: Ints | None
    group_hashed: Keys
    time: NDArray | None

    def __len__(self) -> int:
        return len(self.hashed)

    def only(self, chosen: NDArray) -> TrainRows:
        return replace(
            self,
            hashed=self.hashed[chosen],
            labels=self.labels[chosen],
            value=self.value[chosen],
            group=None if self.group is None else self.group[chosen],
            time=None if self.time is None else self.time[chosen],
        )


def make_for_table(cfg: Config, *, remake: bool = False) -> None:
    """comp folds: of data/samples.parquet."""
    make(cfg, table.load(), remake)


def make(cfg: Config, samples: Samples, remake: bool = False) -> Path:
    """Write data/folds.parquet with its audit. Folds that exist are frozen: other inputs are refused, not obeyed."""
    file, plan = paths.folds_file(), cfg.competition.folds
    meta = fold_metadata(plan, samples)
    if artifacts.manifest_entry(file) and not remake:
        frame, old = folds.read(file)
        changed = _changes(set(frame["id"]), old, meta, samples)
        if changed:
            raise Refused(
                *changed,
                "frozen folds are not remade silently: comp folds --remake, and every run on them starts again",
            )
        kept = Folds(frame, old, samples)
        print(f"{paths.relative(file)}: unchanged, made for these samples")
        images = exact_duplicates.find_by_bytes(cfg, samples)
        return _finish(file, kept, fold_audit.audit(samples, kept, images))
    if len(samples.frame) > 200_000:
        print(f"{len(samples.frame)} rows into folds, some seconds …")
    copies = NO_PAIRS
    if plan.duplicates == "group":
        copies = duplicates.find(cfg, samples).pairs
        print(
            f"{len(copies)} pairs of copies: training rows share a fold, other rows do not train the fold of theirs; "
            "comp folds --duplicates shows them"
        )
    images = exact_duplicates.find_by_bytes(
        cfg, samples
    )  # behind the cache that finding copies fills, which knows the hashes
    same = exact_duplicates.duplicate_pairs(images, images.by_bytes)
    made = Folds(assign(samples, plan, copies, same), meta, samples)
    report = fold_audit.audit(samples, made, images)
    if report["faults"]:
        # Under a name of its own: where older folds stand, their audit stands beside them.
        refused = _written(report, file.with_name("folds_refused.json"))
        raise Refused(*report["faults"], f"no folds were written; {paths.relative(refused)} has the audit")
    folds.save(made.frame, meta, file)
    print(
        f"{paths.relative(file)}: {plan.k} folds"
        + (f" x {plan.repeats} repeats" if plan.repeats > 1 else "")
        + f", {plan.scheme}"
    )
    return _finish(file, made, report)


def fold_metadata(plan: competition_schema.Folds, samples: Samples) -> dict[str, Any]:
    rule = "earlier" if plan.scheme == "time" else "others"
    return plan.model_dump() | {"rule": rule, "samples": samples.hash}


def assign(
    samples: Samples, plan: competition_schema.Folds, copies: Ints = NO_PAIRS, same: Ints = NO_PAIRS
) -> pd.DataFrame:
    """The frame of Folds. `copies`: pairs of samples that stay together; `same`: pairs whose files have equal bytes, which do so
    where folds.duplicates is group, and otherwise keep pseudo-labelled test rows out of the fold of theirs."""
    import pandas as pd

    positions = samples.positions("train")
    if plan.scheme == "stratified" and all(head.task == "regression" for head in samples.heads):
        raise Refused(
            "configs/competition.yaml: folds.scheme: stratified wants classes, and the target is a number; use quantiles"
        )
    if plan.duplicates == "group":
        plan = plan.model_copy(update={"scheme": TOGETHER.get(plan.scheme, plan.scheme)})
        copies = np.concatenate([copies, same])
    keys = samples.frame["row"].iloc[positions]
    if "group" not in plan.scheme and keys.duplicated().any():
        raise Refused(
            f"configs/competition.yaml: row: several samples make the row {keys[keys.duplicated()].iloc[0]!r}, so they must share a "
            "fold: name a group column that holds rows together, and folds.scheme group or stratified_group"
        )
    images = exact_duplicates.find_by_path(samples)
    shared = exact_duplicates.duplicate_pairs(images, images.by_path)
    tied = np.concatenate([np.asarray(copies, np.int64).reshape(-1, 2), shared])
    together = plan
    if plan.scheme != "time" and _several(tied, positions, len(samples.frame)):
        together = plan.model_copy(update={"scheme": TOGETHER.get(plan.scheme, plan.scheme)})
    rows = _rows(
        samples, positions, plan, tied if together is not plan or plan.duplicates == "group" else None
    )
    free = ~_locked(rows, together)
    if not free.any():
        raise Refused(
            f"configs/competition.yaml: folds.holdout: what belongs together (groups, and rows that share images) is one of all {len(rows)} "
            "rows, so the hold-out takes them all; comp folds --duplicates lists what shares images"
        )
    lines = []
    for repeat in range(plan.repeats):
        fold = np.full(len(samples.frame), TRAIN_ONLY, np.int64)
        fold[positions[~free]] = HOLDOUT
        fold[positions[free]] = SCHEMES[together.scheme](rows.only(free), plan.k, plan.seed + repeat)
        fold = _kept_out(fold, samples, tied, same)
        named = np.flatnonzero((samples.frame["source"] != "test").to_numpy() | (fold != TRAIN_ONLY))
        lines.append(
            pd.DataFrame(
                {
                    "id": samples.frame["id"].to_numpy()[named],
                    "repeat": np.full(len(named), repeat, np.int32),
                    "fold": fold[named].astype(np.int32),
                }
                | _units(samples, np.concatenate([tied, same]), named)
            )
        )
    return pd.concat(lines, ignore_index=True)


def _several(pairs: Ints, positions: NDArray, count: int) -> bool:
    """Whether any two training rows are tied to each other."""
    part = duplicates.connected_components(count, pairs)[positions]
    return len(np.unique(part)) < len(part)


def _kept_out(fold: Ints, samples: Samples, tied: Ints, same: Ints) -> Ints:
    """With the fold of a scored row for the rows beside the training rows that share an image with it."""
    source = samples.frame["source"].to_numpy()
    fold = fold.copy()
    for pairs, kinds in ((tied, ("extra", "test")), (np.concatenate([tied, same]), ("test",))):
        part = duplicates.connected_components(len(fold), pairs)
        home = np.full(len(fold), TRAIN_ONLY, np.int64)
        home[part[source == "train"]] = fold[source == "train"]
        beside = np.isin(source, kinds) & (fold == TRAIN_ONLY)
        fold[beside] = home[part[beside]]
    return fold


def _units(samples: Samples, pairs: Ints, named: NDArray) -> dict[str, Any]:
    """The column `unit`, where anything shares an image with a row that may be scored."""
    part = duplicates.connected_components(len(samples.frame), pairs)
    pairs = pairs[np.isin(part[pairs[:, 0]], part[samples.positions("train")])]
    if not len(pairs):
        return {}
    column = "group" if "group" in samples.frame else "row"
    names = samples.frame[column].fillna(samples.frame["id"]).to_numpy(object)
    return {"unit": duplicates.group_names(names, pairs)[named].astype(object)}


def _rows(
    samples: Samples, positions: NDArray, plan: competition_schema.Folds, tied: Ints | None
) -> TrainRows:
    """`tied`: pairs that are one group, beside the declared groups where the scheme knows these; None without any."""
    frame = samples.frame.iloc[positions]
    group: Ints | None = None
    names: NDArray = np.zeros(0, str)
    if tied is not None:
        grouped = "group" in frame and ("group" in plan.scheme or plan.duplicates == "group")
        named = samples.frame["group" if grouped else "id"].fillna(samples.frame["id"]).to_numpy(object)
        names, group = np.unique(duplicates.group_names(named, tied)[positions], return_inverse=True)
    elif "group" in frame:
        names, group = np.unique(frame["group"].to_numpy(object).astype(str), return_inverse=True)
    return TrainRows(
        hashed=fold_balance.hashes(frame["id"]),
        labels=_labels(samples, positions),
        value=_standing(samples, positions),
        group=group,
        group_hashed=fold_balance.hashes(names),
        time=frame["time"].to_numpy(np.float64) if "time" in frame else None,
    )


def _labels(samples: Samples, positions: NDArray) -> Ints:
    """What to spread evenly: the classes of one target, or a column of 0 and 1 for each class of several. Numbers count by
    tenths of their range of ranks."""
    found: list[Ints] = []
    several: list[Ints] = []
    for head in samples.heads:
        columns = samples.targets(head)[positions]
        if head.task == "multilabel":
            several.append((columns > 0.5).astype(np.int64))
        elif head.task == "regression":
            found += [_tenths(column) for column in columns.T]
        elif columns.shape[1] > 1:
            found.append(columns.argmax(axis=1))
        else:
            found.append(
                np.rint(columns[:, 0]).astype(np.int64)
            )  # a soft label counts for the class it is nearer to
    if "drift" in samples.frame:
        found.append(_tenths(samples.frame["drift"].to_numpy(np.float64)[positions]))
    if len(found) == 1 and not several:
        return found[0]
    # Of two classes one column says all.
    widths = [int(codes.max()) + 1 for codes in found]
    return np.hstack(
        [
            *several,
            *(
                codes[:, None] == np.arange(1 if width == 2 else 0, width)
                for codes, width in zip(found, widths, strict=True)
            ),
        ]
    ).astype(np.int64)


def _tenths(values: NDArray) -> Ints:
    ranks = np.unique(values, return_inverse=True)[1]
    return ranks * 10 // (int(ranks.max()) + 1)


def _standing(samples: Samples, positions: NDArray) -> Ints:
    """The rank of a row among the targets; over several targets the sum of its ranks."""
    columns = [column for head in samples.heads for column in samples.targets(head)[positions].T]
    return sum(
        (np.unique(column, return_inverse=True)[1] for column in columns), np.zeros(len(positions), np.int64)
    )


def _kfold(rows: TrainRows, k: int, seed: int) -> Ints:
    return fold_balance.rows_by_class(np.zeros(len(rows), np.int64), k, fold_balance.keys(rows.hashed, seed))


def _stratified(rows: TrainRows, k: int, seed: int) -> Ints:
    key = fold_balance.keys(rows.hashed, seed)
    if rows.labels.ndim == 1:
        return fold_balance.rows_by_class(rows.labels, k, key)
    return fold_balance.groups(fold_balance.counted(np.arange(len(rows)), rows.labels), k, key)


def _quantiles(rows: TrainRows, k: int, seed: int) -> Ints:
    return fold_balance.rows_by_value(rows.value, k, fold_balance.keys(rows.hashed, seed))


def _group(rows: TrainRows, k: int, seed: int) -> Ints:
    return _stratified_group(replace(rows, labels=np.zeros(len(rows), np.int64)), k, seed)


def _stratified_group(rows: TrainRows, k: int, seed: int) -> Ints:
    assert rows.group is not None
    present, group = np.unique(rows.group, return_inverse=True)
    return fold_balance.groups(
        fold_balance.counted(group, rows.labels), k, fold_balance.keys(rows.group_hashed[present], seed)
    )[group]


def _time(rows: TrainRows, k: int, seed: int) -> Ints:
    """k + 1 blocks of time; the first teaches and is never scored. Equal times stay together."""
    assert rows.time is not None
    moment = np.unique(rows.time, return_inverse=True)[1]
    count = np.bincount(moment)
    twice_middle = 2 * np.cumsum(count) - count
    return (twice_middle * (k + 1) // (2 * len(rows)) - 1)[moment]


SCHEMES: dict[competition_schema.Scheme, Callable[[TrainRows, int, int], Ints]] = {
    "kfold": _kfold,
    "stratified": _stratified,
    "quantiles": _quantiles,
    "group": _group,
    "stratified_group": _stratified_group,
    "time": _time,
}
assert TRAIN_ONLY == -1  # what `_time` calls its first block


def _locked(rows: TrainRows, plan: competition_schema.Folds) -> NDArray[np.bool_]:
    """The hold-out: the latest rows, or whole groups, or a share of every class or range of values."""
    locked = np.zeros(len(rows), bool)
    if plan.holdout == 0:
        return locked
    key = fold_balance.keys(rows.hashed, ~plan.seed)
    if plan.scheme == "time":
        assert rows.time is not None
        moment = np.unique(rows.time, return_inverse=True)[1]
        before = np.cumsum(np.bincount(moment)) - np.bincount(moment)
        return np.asarray(before[moment] >= (1 - plan.holdout) * len(rows))
    if "group" in plan.scheme:
        return _locked_groups(rows, plan)
    if plan.scheme == "kfold":
        order = np.argsort(key, kind="stable")
    elif plan.scheme == "quantiles":
        order = np.lexsort((key, rows.value))
    else:
        classes = (
            rows.labels
            if rows.labels.ndim == 1
            else np.unique(rows.labels, axis=0, return_inverse=True)[1].ravel()
        )
        order = np.lexsort((key, classes))
    # Every 1/share-th row of the order: of a class each its share, and the rounding is carried on to the next class.
    steps = np.floor(np.arange(len(rows) + 1) * plan.holdout)
    locked[order] = np.diff(steps) > 0
    return locked


def _locked_groups(rows: TrainRows, plan: competition_schema.Folds) -> NDArray[np.bool_]:
    """Groups in random order until the share is reached; of many such draws the one whose labels are most like the whole."""
    assert rows.group is not None
    labels = rows.labels if plan.scheme == "stratified_group" else np.zeros(len(rows), np.int64)
    counts = fold_balance.counted(rows.group, labels)
    totals = np.bincount(counts.label, counts.count, counts.labels)
    best, least = np.zeros(0, np.int64), np.inf
    for draw in range(DRAWS):
        order = np.argsort(fold_balance.keys(rows.group_hashed, ~plan.seed - draw), kind="stable")
        filled = np.cumsum(counts.size[order])
        # The group that crosses the line comes along if that misses the share by less.
        taken = order[: max(1, int((filled - counts.size[order] / 2 <= plan.holdout * len(rows)).sum()))]
        inside = np.isin(counts.unit, taken)
        share = np.bincount(counts.label[inside], counts.count[inside], counts.labels) / np.maximum(totals, 1)
        off = float(((share - plan.holdout) ** 2)[totals > 0].sum())
        if off < least:
            best, least = taken, off
    return np.isin(rows.group, best)


def _changes(ids: set[str], old: dict[str, Any], new: dict[str, Any], samples: Samples) -> list[str]:
    """One line for each thing that the frozen folds were made from and that is another now."""
    shown = paths.relative(paths.folds_file())
    lines = [
        f"{shown}: made with folds.{n} {old[n]}, which is {new[n]} now"
        for n in folds.PLAN_KEYS
        if old[n] != new[n]
    ]
    if old["samples"] != new["samples"]:
        now = set(samples.frame["id"].to_numpy()[samples.labeled])
        ids = ids - set(samples.frame["id"].to_numpy()[samples.positions("test")])  # copies of scored rows
        what = (
            f"{len(now - ids)} rows are new and {len(ids - now)} are gone"
            if ids != now
            else "the same ids, other values"
        )
        lines.append(f"{shown}: made for another {paths.relative(paths.samples_file())}: {what}")
    return lines


def _finish(file: Path, made: Folds, report: dict[str, Any]) -> Path:
    numbers = _written(report, file.with_name("folds_audit.json"))
    if report["faults"]:
        raise Refused(*report["faults"])
    for old in ("json", "txt"):
        file.with_name(f"folds_refused.{old}").unlink(missing_ok=True)
    print(f"{paths.relative(numbers)}: the same as numbers")
    print("next: comp train exp001")
    return file


def _written(report: dict[str, Any], numbers: Path) -> Path:
    """Printed, and kept as text and as numbers."""
    print(fold_audit.table(report))
    artifacts.write_json(numbers, report)
    artifacts.write_text(numbers.with_suffix(".txt"), fold_audit.table(report) + "\n")
    return numbers
