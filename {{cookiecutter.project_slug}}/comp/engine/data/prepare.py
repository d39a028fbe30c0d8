"""data/raw -> data/samples.parquet, as configs/competition.yaml declares it.

Two kinds of mistake: a declaration that does not fit the tables stops at once (Refused); rows that are wrong are collected,
so that one run of `comp check` shows them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comp.engine.config.competition_schema import Competition
from comp.engine.config.schema import Config
from comp.engine.data import raw_tables, samples, similar_labels, targets, times
from comp.engine.data.tables import RawRows
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Prepared:
    frame: pd.DataFrame  # as it will stand in data/samples.parquet
    heads: tuple[Head, ...]
    faults: list[str]  # one line a wrong row
    notes: list[str]  # what is left out
    where: Callable[[int], str]  # file and line of a row


def prepare(cfg: Config) -> Path:
    """The same raw files give the same bytes, however often it is killed and run again."""
    before = (artifacts.manifest_entry(paths.samples_file()) or {}).get("hash")
    reading = read_samples(cfg.competition)
    if reading.faults:
        more = len(reading.faults) - targets.SHOWN
        raise Refused(
            *reading.faults[: targets.SHOWN], *([f"and {more} more: comp check"] if more > 0 else [])
        )
    sample = raw_tables.unpacked(paths.path(cfg.competition.raw, cfg.competition.submission.sample))
    file = samples.save(
        reading.frame, reading.heads, sample=artifacts.sha256(sample) if sample.is_file() else ""
    )
    counts = reading.frame["source"].value_counts(sort=False)
    print(
        f"{paths.relative(file)}: "
        + ", ".join(f"{count} {source}" for source, count in counts.items())
        + " rows"
    )
    for head in reading.heads:
        classes = f", {len(head.classes)} classes {targets.abbreviated(head.classes)}" if head.classes else ""
        print(f"  {head.name}: {head.task}{classes}, from {targets.abbreviated(head.columns)}")
    print(*reading.notes, sep="\n", end="\n" * bool(reading.notes))
    extra = [
        c for c in raw_tables.column_names(reading.frame) if c in ("group", "time") or c.startswith("meta.")
    ]
    if extra:
        print(f"  also {targets.abbreviated(extra)}")
    if paths.folds_file().is_file() and before not in (None, samples.load().hash):
        print(
            f"{paths.relative(paths.folds_file())} was made for the table as it was before; comp folds says what to do"
        )
    print("next: comp check, then comp folds")
    return file


def read_samples(competition: Competition) -> Prepared:
    """The samples table, not yet written, and what is wrong with its rows."""
    import pandas as pd

    _refuse_features(competition)
    rows = raw_tables.load(competition)
    frame, faults = _identified(rows)
    faults += rows.faults
    notes: list[str] = []
    known = (frame["source"] != "test").to_numpy()
    if competition.group:
        frame["group"], wrong = _groups(rows, competition, competition.group)
        faults += wrong
        ours = (frame["source"] == "train").to_numpy()  # other people's data need not know our groups
        faults += _missing(rows, frame["group"].isna().to_numpy() & ours, competition.group)
    if competition.time:
        dated, wrong = _times(rows, competition, competition.time, known)
        frame["time"] = dated.values
        faults += wrong
        notes.append(dated.note)
    if competition.drift:
        frame = _drifted(frame, competition)
    found = targets.read(rows, competition, np.flatnonzero(known))
    faults += found.faults
    wide = {}
    for name, numbers in found.columns.items():
        column = np.full(len(frame), np.nan, numbers.dtype if numbers.dtype.kind == "f" else np.float64)
        column[known] = numbers
        wide[f"target.{name}"] = column
    frame = pd.concat([frame, pd.DataFrame(wide, index=frame.index)], axis=1)
    for name in competition.metadata:
        if name not in rows.has["test"]:
            raise Refused(
                f"configs/competition.yaml: metadata: {competition.test.table or competition.test.files}:1 has no column {name!r}, "
                "it stands in the training table only; a column that the test rows lack cannot become a feature"
            )
        frame[f"meta.{name}"] = _feature(rows.columns[name])
    assert isinstance(frame, pd.DataFrame)
    return Prepared(frame, found.heads, faults, [*notes, *found.notes], rows.where)


def _drifted(frame: pd.DataFrame, competition: Competition) -> pd.DataFrame:
    """What comp audit --drift wrote of every training row; other people's data keep their weight."""
    import pandas as pd

    file = paths.path("data", "adversarial_validation.csv")
    if not file.is_file():
        raise Refused(
            f"configs/competition.yaml: drift: wants {paths.relative(file)}, which comp audit --drift RUN makes"
        )
    told = pd.read_csv(file, dtype={"id": str}).set_index("id")
    train = frame["source"] == "train"
    absent = frame["id"][train & ~frame["id"].isin(told.index)]
    if len(absent):
        raise Refused(
            f"{paths.relative(file)}: knows nothing of the row {absent.iloc[0]!r} and {len(absent) - 1} more; "
            "take drift out of configs/competition.yaml, and make it anew on a run of today: comp audit --drift RUN"
        )
    if "weights" in competition.drift:
        frame["weight"] *= frame["id"].map(told["weight"]).where(train, 1.0)
    if "folds" in competition.drift:
        frame["drift"] = frame["id"].map(told["like_test"]).where(train)
    return frame


def _refuse_features(competition: Competition) -> None:
    told = [name for name in competition.metadata if name in competition.targets]
    if told:
        raise Refused(
            f"configs/competition.yaml: metadata: {told[0]!r} is the target; it cannot be a feature"
        )


def _identified(rows: RawRows) -> tuple[pd.DataFrame, list[str]]:
    """Unique ids. Test rows that are numbered like training rows get a prefix; the key that the host scores stays."""
    frame = rows.samples.copy()
    faults = _missing(rows, frame["id"].isna().to_numpy(), "the id")
    for source in ("test", "extra"):
        mine = frame["source"] == source
        if set(frame["id"][mine].dropna()) & set(frame["id"][~mine].dropna()):
            frame.loc[mine, "id"] = f"{source}:" + frame["id"][mine]
    again = frame["id"].duplicated() & frame["id"].notna()
    first = {id_: position for position, id_ in reversed(list(enumerate(frame["id"])))} if again.any() else {}
    for position in np.flatnonzero(again).tolist():
        id_ = frame["id"].iloc[position]
        faults.append(
            f"{rows.where(position)}: the id {id_!r} stands there again, first in {rows.where(first[id_])}"
        )
    return frame, faults


def _groups(rows: RawRows, competition: Competition, name: str) -> tuple[pd.Series, list[str]]:
    """As they are written, or in one spelling; where two spellings may be one group, competition.group_spelling says it."""
    text = rows.columns[name]
    counts = {str(key): int(count) for key, count in text.value_counts(sort=False).items()}
    if competition.group_spelling == "merge":
        return text.map(similar_labels.merge_spellings(counts), na_action="ignore"), []
    if competition.group_spelling == "keep":
        return text, []
    first = text.drop_duplicates()
    places = dict(zip(first, first.index, strict=True))
    return text, [
        f"{rows.where(places[group])}: {name}: {why}" for group, why in similar_labels.group_faults(counts)
    ]


def _times(
    rows: RawRows, competition: Competition, name: str, known: NDArray
) -> tuple[times.Times, list[str]]:
    text = rows.columns[name]
    present = text.notna().to_numpy()
    found = times.read(text, name, competition.time_format, rows.where)
    faults = _missing(rows, ~present & known, name)
    for position in np.flatnonzero(present & ~np.isfinite(found.values)).tolist():
        faults.append(f"{rows.where(position)}: {name} is {text.iloc[position]!r}; {found.wanted}")
    return found, faults


def _feature(text: pd.Series) -> pd.Series:
    """A number where every value of train and test is one, text otherwise."""
    import pandas as pd

    numbers = targets.to_numbers(text)
    if (np.isfinite(numbers) | text.isna().to_numpy()).all():
        return pd.Series(numbers, index=text.index)
    return text


def _missing(rows: RawRows, missing: NDArray, what: str) -> list[str]:
    return [f"{rows.where(position)}: {what} is missing" for position in np.flatnonzero(missing).tolist()]
