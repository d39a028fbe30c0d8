"""Makes data/samples.parquet from data/raw, as configs/competition.yaml declares it.

A declaration that does not fit the tables raises at once. Faults of single rows are collected, so that one
run of `comp check` reports all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import declaration
from comp.engine.config.competition_schema import Competition
from comp.engine.config.schema import Config
from comp.engine.data import raw_tables, samples, similar_labels, tables, targets, times
from comp.engine.data.tables import RawRows, Where
from comp.engine.errors import UserError, joined
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd

REPEATED_ID = "if an id has several images set gather: true, if it has several classes train: {long: …}"
SHOWN = 20  # faults in the message of comp prepare; comp check lists all


@dataclass(frozen=True)
class Prepared:
    """The samples table before it is written, and the faults of its rows."""

    frame: pd.DataFrame  # as in data/samples.parquet
    heads: tuple[Head, ...]
    faults: list[UserError]  # of single rows
    notes: list[str]
    where: Where  # file and line of a row


def prepare(cfg: Config) -> Path:
    """Writes data/samples.parquet. The same raw files always give the same bytes, also after a kill."""
    before = (artifacts.manifest_entry(paths.samples_file()) or {}).get("hash")
    prepared = read_samples(cfg.competition)
    if prepared.faults:
        more = len(prepared.faults) - SHOWN
        rest = [UserError("more-faults", what=f"and {more} more", remedy="list all with comp check")]
        raise joined([*prepared.faults[:SHOWN], *rest * (more > 0)])
    sample = raw_tables.unpacked(paths.path(cfg.competition.raw, cfg.competition.submission.sample))
    sha256 = artifacts.sha256(sample) if sample.is_file() else ""
    file = samples.save(prepared.frame, prepared.heads, sample=sha256)
    counts = prepared.frame["source"].value_counts(sort=False)
    listed = ", ".join(f"{count} {source}" for source, count in counts.items())
    print(f"{paths.relative(file)}: {listed} rows")
    for head in prepared.heads:
        names = [column.removeprefix("target.") for column in head.columns]
        classes = f", {len(head.classes)} classes {targets.abbreviated(head.classes)}" if head.classes else ""
        print(f"  {head.name}: {head.task}{classes}, from target {targets.abbreviated(names)}")
    print(*prepared.notes, sep="\n", end="\n" * bool(prepared.notes))
    if optional := _optional_columns(prepared.frame, cfg.competition):
        print(f"  also {', '.join(optional)}")
    if paths.folds_file().is_file() and before not in (None, samples.load().hash):
        folds = paths.relative(paths.folds_file())
        print(f"{folds} was made for the previous table; comp folds lists what changed")
    print("next: comp check, then comp folds")
    return file


def _optional_columns(frame: pd.DataFrame, competition: Competition) -> list[str]:
    """Group, time and metadata of the samples, by their names in the raw table."""
    columns = tables.column_names(frame)
    optional = [
        f"{kind} {name or ''}".strip()
        for kind, name in (("group", competition.group), ("time", competition.time))
        if kind in columns
    ]
    metadata = [name.removeprefix("meta.") for name in columns if name.startswith("meta.")]
    return optional + [f"metadata {targets.abbreviated(metadata)}"] * bool(metadata)


def read_samples(competition: Competition) -> Prepared:
    """The samples table from the raw tables."""
    import pandas as pd

    _validate_metadata(competition)
    rows = raw_tables.load(competition)
    frame, faults = _with_unique_ids(rows)
    faults += rows.faults
    notes: list[str] = []
    labeled = (frame["source"] != "test").to_numpy()
    if competition.group:
        frame["group"], group_faults = _groups(rows, competition, competition.group)
        faults += group_faults
        train = (frame["source"] == "train").to_numpy()  # extra rows may be without a group
        faults += _missing(rows, frame["group"].isna().to_numpy() & train, competition.group)
    if competition.time:
        dates, time_faults = _times(rows, competition, competition.time, labeled)
        frame["time"] = dates.values
        faults += time_faults
        notes.append(dates.note)
    if competition.drift:
        frame = _with_drift(frame, competition)
    found = targets.read(rows, competition, np.flatnonzero(labeled))
    faults += found.faults
    columns = {}
    for name, values in found.columns.items():
        column = np.full(len(frame), np.nan, values.dtype if values.dtype.kind == "f" else np.float64)
        column[labeled] = values
        columns[f"target.{name}"] = column
    frame = pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1)
    for name in competition.metadata:
        if name not in rows.has["test"]:
            raise declaration.error(
                "metadata-not-in-test",
                "metadata",
                f"{competition.test.table or competition.test.files}:1 has no column {name!r}, "
                "only the training table has it",
                "list columns that test rows have as well",
            )
        frame[f"meta.{name}"] = _metadata(rows.columns[name])
    assert isinstance(frame, pd.DataFrame)
    return Prepared(frame, found.heads, faults, [*notes, *found.notes], rows.where)


def _validate_metadata(competition: Competition) -> None:
    for name in competition.metadata:
        if name in competition.targets:
            raise declaration.error(
                "metadata-is-target", "metadata", f"{name!r} is a target", "remove it: it cannot be a feature"
            )


def _with_unique_ids(rows: RawRows) -> tuple[pd.DataFrame, list[UserError]]:
    """Prefixes the ids of test or extra rows if training rows have the same ids. `row`, the key in the
    submission, stays unchanged."""
    frame = rows.samples.copy()
    faults = _missing(rows, frame["id"].isna().to_numpy(), "id")
    for source in ("test", "extra"):
        mine = frame["source"] == source
        if set(frame["id"][mine].dropna()) & set(frame["id"][~mine].dropna()):
            frame.loc[mine, "id"] = f"{source}:" + frame["id"][mine]
    repeated = np.flatnonzero(frame["id"].duplicated() & frame["id"].notna()).tolist()
    first: dict[str, int] = {}
    for position, id_ in enumerate(frame["id"] if repeated else ()):
        first.setdefault(id_, position)
    for position in repeated:
        id_ = frame["id"].iloc[position]
        what = f"the id {id_!r} occurs again, first in {rows.where(first[id_])}"
        faults.append(UserError("id-repeated", where=rows.where(position), what=what, remedy=REPEATED_ID))
    return frame, faults


def _groups(rows: RawRows, competition: Competition, name: str) -> tuple[pd.Series, list[UserError]]:
    """The groups, unchanged (group_spelling: keep) or with spellings merged (merge). If neither is declared,
    similar groups are faults."""
    text = rows.columns[name]
    counts = {str(key): int(count) for key, count in text.value_counts(sort=False).items()}
    if competition.group_spelling == "merge":
        return text.map(similar_labels.merge_spellings(counts), na_action="ignore"), []
    if competition.group_spelling == "keep":
        return text, []
    first = text.drop_duplicates()
    position = dict(zip(first, first.index, strict=True))
    return text, [
        UserError(
            each.code, where=rows.where(position[each.text]), key=name, what=each.what, remedy=each.remedy
        )
        for each in similar_labels.of_groups(counts)
    ]


def _times(
    rows: RawRows, competition: Competition, name: str, labeled: NDArray
) -> tuple[times.Times, list[UserError]]:
    text = rows.columns[name]
    present = text.notna().to_numpy()
    found = times.read(text, name, competition.time_format, rows.where)
    faults = _missing(rows, ~present & labeled, name)
    for position in np.flatnonzero(present & ~np.isfinite(found.values)).tolist():
        what = f"{text.iloc[position]!r} is not a time; expected {found.expected}"
        faults.append(UserError("time-invalid", where=rows.where(position), key=name, what=what))
    return found, faults


def _with_drift(frame: pd.DataFrame, competition: Competition) -> pd.DataFrame:
    """Adds the weights and test-row probabilities that comp audit --drift wrote for the training rows, as
    competition.drift declares. Extra rows keep their weight."""
    import pandas as pd

    file, make = paths.path("data", "adversarial_validation.csv"), "make it with comp audit --drift RUN"
    if not file.is_file():
        raise declaration.error("drift-missing", "drift", f"{paths.relative(file)} does not exist", make)
    drift = pd.read_csv(file, dtype={"id": str}).set_index("id")
    train = frame["source"] == "train"
    absent = frame["id"][train & ~frame["id"].isin(drift.index)]
    if len(absent):
        raise UserError(
            "drift-stale",
            where=paths.relative(file),
            what=f"has no row {absent.iloc[0]!r}, nor {len(absent) - 1} more training rows",
            remedy=f"remove drift from {declaration.FILE}, train, then {make}",
        )
    if "weights" in competition.drift:
        frame["weight"] *= frame["id"].map(drift["weight"]).where(train, 1.0)
    if "folds" in competition.drift:
        frame["drift"] = frame["id"].map(drift["like_test"]).where(train)
    return frame


def _metadata(text: pd.Series) -> pd.Series:
    """A metadata column as numbers if all values of train and test are numbers, otherwise as text."""
    import pandas as pd

    numbers = targets.to_numbers(text)
    if (np.isfinite(numbers) | text.isna().to_numpy()).all():
        return pd.Series(numbers, index=text.index)
    return text


def _missing(rows: RawRows, missing: NDArray, column: str) -> list[UserError]:
    return [
        UserError("value-missing", where=rows.where(position), key=column, what="the value is missing")
        for position in np.flatnonzero(missing).tolist()
    ]


def check_written(prepared: Prepared) -> list[str]:
    """A note if the tables have changed since data/samples.parquet was made."""
    if prepared.faults or not artifacts.manifest_entry(paths.samples_file()):
        return []
    if samples.load().hash == samples.content_hash(prepared.frame, prepared.heads):
        return []
    return [f"note: {paths.relative(paths.samples_file())} differs from the tables; run comp prepare"]
