"""Makes data/folds.parquet. The same samples, scheme and seed give the same bytes on any machine.

Rows that share a fold, in addition to those of one declared group:
  - training rows that name the same image file, under every scheme but time
  - duplicates, by bytes or by pixels, with folds.duplicates: group
Extra rows are TRAIN_ONLY, and so is the first block of a split by time. An extra or a test row that shares an
image with a scored row gets the fold of that row, so that it is never part of the training rows of that fold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import competition_schema, declaration
from comp.engine.config.schema import Config
from comp.engine.data import duplicates, exact_duplicates, fold_audit, fold_schemes, folds
from comp.engine.data import samples as samples_table
from comp.engine.data.fold_schemes import SCHEMES, Ints, TrainRows
from comp.engine.data.folds import HOLDOUT, TRAIN_ONLY, Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError, joined
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

# The scheme that replaces folds.scheme if some rows have to share a fold.
GROUPED: dict[competition_schema.Scheme, competition_schema.Scheme] = {
    "kfold": "group", "stratified": "stratified_group", "quantiles": "stratified_group"
}  # fmt: skip
NO_PAIRS: Ints = np.zeros((0, 2), np.int64)
LARGE = 200_000  # rows from which a line says that it takes some seconds


def make_for_table(cfg: Config, *, remake: bool = False) -> None:
    """comp folds: makes and prints the folds."""
    make(cfg, samples_table.load(), remake)


def make(cfg: Config, samples: Samples, remake: bool = False) -> Path:
    """Writes data/folds.parquet and its audit. Existing folds are frozen: if samples or plan changed, it is
    an error unless `remake`, because runs on the old folds cannot be continued on new ones."""
    file, plan = paths.folds_file(), cfg.competition.folds
    meta = fold_metadata(plan, samples)
    if artifacts.manifest_entry(file) and not remake:
        frame, old = folds.read(file)
        if changed := _differences(set(frame["id"]), old, meta, samples):
            raise joined(changed)
        existing = Folds(frame, old, samples)
        print(f"{paths.relative(file)}: unchanged, made for these samples")
        images = exact_duplicates.find_by_bytes(cfg, samples)
        return _finish(file, fold_audit.audit(samples, existing, images))
    if len(samples.frame) > LARGE:
        print(f"{len(samples.frame)} rows into folds, some seconds …")
    similar = NO_PAIRS
    if plan.duplicates == "group":
        similar = duplicates.find(cfg, samples).pairs
        print(
            f"{len(similar)} pairs of duplicates: training rows share a fold, other rows are not trained on "
            "in the fold of their duplicate; list them with comp folds --duplicates"
        )
    # After duplicates.find, which fills a cache that holds the hashes of the files.
    images = exact_duplicates.find_by_bytes(cfg, samples)
    equal = exact_duplicates.duplicate_pairs(images, images.by_bytes)
    made = Folds(assign(samples, plan, similar, equal), meta, samples)
    report = fold_audit.audit(samples, made, images)
    if report["faults"]:
        # In a separate file: folds_audit.json may be the audit of older folds.
        audit_file = _write_audit(report, file.with_name("folds_refused.json"))
        remedy = f"the audit is in {paths.relative(audit_file)}"
        unwritten = UserError(
            "folds-unwritten", where=paths.relative(file), what="not written", remedy=remedy
        )
        raise joined([*fold_audit.errors(report), unwritten])
    folds.save(made.frame, meta, file)
    repeats = f" x {plan.repeats} repeats" if plan.repeats > 1 else ""
    print(f"{paths.relative(file)}: {plan.k} folds{repeats}, {plan.scheme}")
    return _finish(file, report)


def fold_metadata(plan: competition_schema.Folds, samples: Samples) -> dict[str, Any]:
    rule = "earlier" if plan.scheme == "time" else "others"
    return plan.model_dump() | {"rule": rule, "samples": samples.hash}


def assign(
    samples: Samples, plan: competition_schema.Folds, similar: Ints = NO_PAIRS, equal: Ints = NO_PAIRS
) -> pd.DataFrame:
    """The frame of Folds.

    `similar`: (pairs, 2) samples that must share a fold. `equal`: (pairs, 2) samples whose files have equal
    bytes; they must share a fold with folds.duplicates: group, and otherwise only keep pseudo-labeled test
    rows out of the fold of their duplicate.
    """
    import pandas as pd

    train = samples.positions("train")
    _validate_targets(samples, plan)
    if plan.duplicates == "group":
        plan = plan.model_copy(update={"scheme": GROUPED.get(plan.scheme, plan.scheme)})
        similar = np.concatenate([similar, equal])
    _validate_scored_rows(samples, plan)
    images = exact_duplicates.find_by_path(samples)
    same_file = exact_duplicates.duplicate_pairs(images, images.by_path)
    tied = np.concatenate([np.asarray(similar, np.int64).reshape(-1, 2), same_file])
    grouped = plan
    if plan.scheme != "time" and _any_tied(tied, train, len(samples.frame)):
        grouped = plan.model_copy(update={"scheme": GROUPED.get(plan.scheme, plan.scheme)})
    as_groups = grouped is not plan or plan.duplicates == "group"
    rows = _train_rows(samples, train, plan, tied if as_groups else None)
    free = ~fold_schemes.holdout_mask(rows, grouped)
    if not free.any():
        raise declaration.error(
            "holdout-takes-all",
            "folds.holdout",
            f"the hold-out consists of whole groups, and all {len(rows)} training rows are one group "
            "(declared groups, and rows that share images)",
            "list shared images with comp folds --duplicates",
        )
    lines = []
    for repeat in range(plan.repeats):
        fold = np.full(len(samples.frame), TRAIN_ONLY, np.int64)
        fold[train[~free]] = HOLDOUT
        fold[train[free]] = SCHEMES[grouped.scheme](rows.select(free), plan.k, plan.seed + repeat)
        fold = _with_fold_of_duplicate(fold, samples, tied, equal)
        listed = np.flatnonzero((samples.frame["source"] != "test").to_numpy() | (fold != TRAIN_ONLY))
        columns = {
            "id": samples.frame["id"].to_numpy()[listed],
            "repeat": np.full(len(listed), repeat, np.int32),
            "fold": fold[listed].astype(np.int32),
        }
        lines.append(pd.DataFrame(columns | _group_column(samples, np.concatenate([tied, equal]), listed)))
    return pd.concat(lines, ignore_index=True)


def _validate_targets(samples: Samples, plan: competition_schema.Folds) -> None:
    if plan.scheme == "stratified" and all(head.task == "regression" for head in samples.heads):
        raise declaration.error(
            "scheme-unfit",
            "folds.scheme",
            "stratified needs classes, and the target is a number",
            "use quantiles",
        )


def _validate_scored_rows(samples: Samples, plan: competition_schema.Folds) -> None:
    """Raises UserError unless all samples of one scored row share a fold."""
    keys = samples.frame["row"].iloc[samples.positions("train")]
    if "group" not in plan.scheme and keys.duplicated().any():
        raise declaration.error(
            "row-across-folds",
            "row",
            f"several samples make the row {keys[keys.duplicated()].iloc[0]!r}, so they must share a fold",
            "declare a group column that keeps them together, and folds.scheme: group or stratified_group",
        )


def _any_tied(pairs: Ints, train: NDArray, count: int) -> bool:
    """Whether any pair consists of two training rows."""
    component = duplicates.connected_components(count, pairs)[train]
    return len(np.unique(component)) < len(component)


def _with_fold_of_duplicate(fold: Ints, samples: Samples, tied: Ints, equal: Ints) -> Ints:
    """Gives extra and test rows that share an image with a training row the fold of that row."""
    source = samples.frame["source"].to_numpy()
    fold = fold.copy()
    for pairs, sources in ((tied, ("extra", "test")), (np.concatenate([tied, equal]), ("test",))):
        component = duplicates.connected_components(len(fold), pairs)
        fold_of_component = np.full(len(fold), TRAIN_ONLY, np.int64)
        fold_of_component[component[source == "train"]] = fold[source == "train"]
        open_rows = np.isin(source, sources) & (fold == TRAIN_ONLY)
        fold[open_rows] = fold_of_component[component[open_rows]]
    return fold


def _group_column(samples: Samples, pairs: Ints, listed: NDArray) -> dict[str, Any]:
    """The column `group`: one name for all rows that must stay together. Absent if no row shares an image
    with a training row, since then samples.parquet has the groups."""
    component = duplicates.connected_components(len(samples.frame), pairs)
    pairs = pairs[np.isin(component[pairs[:, 0]], component[samples.positions("train")])]
    if not len(pairs):
        return {}
    column = "group" if "group" in samples.frame else "row"
    names = samples.frame[column].fillna(samples.frame["id"]).to_numpy(object)
    return {"group": duplicates.group_names(names, pairs)[listed].astype(object)}


def _train_rows(
    samples: Samples, train: NDArray, plan: competition_schema.Folds, tied: Ints | None
) -> TrainRows:
    """`tied`: pairs of rows that are one group, together with the declared groups if the scheme uses these.
    None: only the declared groups."""
    frame = samples.frame.iloc[train]
    group: Ints | None = None
    names: NDArray = np.zeros(0, str)
    if tied is not None:
        declared = "group" in frame and ("group" in plan.scheme or plan.duplicates == "group")
        named = samples.frame["group" if declared else "id"].fillna(samples.frame["id"]).to_numpy(object)
        names, group = np.unique(duplicates.group_names(named, tied)[train], return_inverse=True)
    elif "group" in frame:
        names, group = np.unique(frame["group"].to_numpy(object).astype(str), return_inverse=True)
    return TrainRows(
        hashed=fold_schemes.hash_ids(frame["id"]),
        labels=_strata(samples, train),
        value=_rank(samples, train),
        group=group,
        group_hashed=fold_schemes.hash_ids(names),
        time=frame["time"].to_numpy(np.float64) if "time" in frame else None,
    )


def _strata(samples: Samples, rows: NDArray) -> Ints:
    """What to stratify by: (rows,) classes of a single target with classes, otherwise (rows, strata) of 0 and
    1 with a column per class of each target. Numeric targets are binned into ten quantiles."""
    codes: list[Ints] = []
    binary: list[Ints] = []
    for head in samples.heads:
        columns = samples.targets(head)[rows]
        if head.task == "multilabel":
            binary.append((columns > 0.5).astype(np.int64))
        elif head.task == "regression":
            codes += [_tenths(column) for column in columns.T]
        elif columns.shape[1] > 1:
            codes.append(columns.argmax(axis=1))
        else:  # a soft label counts as the nearest class
            codes.append(np.rint(columns[:, 0]).astype(np.int64))
    if "drift" in samples.frame:
        codes.append(_tenths(samples.frame["drift"].to_numpy(np.float64)[rows]))
    if len(codes) == 1 and not binary:
        return codes[0]
    for code in codes:
        width = int(code.max()) + 1
        first = 1 if width == 2 else 0  # one column suffices for two classes
        binary.append(code[:, None] == np.arange(first, width))
    return np.hstack(binary).astype(np.int64)


def _tenths(values: NDArray) -> Ints:
    ranks = np.unique(values, return_inverse=True)[1]
    return ranks * 10 // (int(ranks.max()) + 1)


def _rank(samples: Samples, rows: NDArray) -> Ints:
    """The rank of a row by its target; with several targets the sum of its ranks."""
    columns = [column for head in samples.heads for column in samples.targets(head)[rows].T]
    ranks = (np.unique(column, return_inverse=True)[1] for column in columns)
    return sum(ranks, np.zeros(len(rows), np.int64))


def _differences(
    ids: set[str], old: dict[str, Any], new: dict[str, Any], samples: Samples
) -> list[UserError]:
    """What differs between the plan and samples that the existing folds were made from, and those of now."""
    shown = paths.relative(paths.folds_file())
    remedy = "restore it, or make new folds with comp folds --remake; every run on the old ones starts again"
    found = [
        UserError(
            "folds-differ",
            where=shown,
            key=f"folds.{key}",
            what=f"made with {old[key]}, now {new[key]}",
            remedy=remedy,
        )
        for key in folds.PLAN_KEYS
        if old[key] != new[key]
    ]
    if old["samples"] != new["samples"]:
        now = set(samples.frame["id"].to_numpy()[samples.labeled])
        ids = ids - set(
            samples.frame["id"].to_numpy()[samples.positions("test")]
        )  # duplicates of scored rows
        what = "the same ids with other values"
        if ids != now:
            what = f"{len(now - ids)} rows are new and {len(ids - now)} are gone"
        table = paths.relative(paths.samples_file())
        found.append(
            UserError("folds-stale", where=shown, what=f"made for another {table}: {what}", remedy=remedy)
        )
    return found


def _finish(file: Path, report: dict[str, Any]) -> Path:
    numbers = _write_audit(report, file.with_name("folds_audit.json"))
    if report["faults"]:
        raise joined(fold_audit.errors(report))
    for suffix in ("json", "txt"):
        file.with_name(f"folds_refused.{suffix}").unlink(missing_ok=True)
    print(f"{paths.relative(numbers)}: the same as JSON")
    print("next: comp train exp001")
    return file


def _write_audit(report: dict[str, Any], file: Path) -> Path:
    """Prints the table, and writes it as text and as JSON."""
    print(fold_audit.table(report))
    artifacts.write_json(file, report)
    artifacts.write_text(file.with_suffix(".txt"), fold_audit.table(report) + "\n")
    return file
