"""The host's sample submission: the authority on columns, ids and order. What stands in its cells means nothing."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from comp import store
from comp.config import Refused
from comp.samples import Samples


@dataclass(frozen=True)
class Sample:
    file: Path
    columns: tuple[str, ...]
    key: int  # position of the id column
    rows: list[list[str]]

    @property
    def ids(self) -> list[str]:
        return [row[self.key] for row in self.rows]

    @property
    def answers(self) -> tuple[str, ...]:
        """The columns to fill in."""
        return self.columns[: self.key] + self.columns[self.key + 1 :]


def read_sample(file: Path, key: str | None = None) -> Sample:
    """Hosts' files may carry a BOM, quotes and \\r\\n. The id column is `key` where the sample has it, else the first."""
    shown = store.shown(file)
    try:
        lines = list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    except FileNotFoundError:
        raise Refused(
            f"{shown}: no such file; competition.submission.sample names the host's sample submission"
        ) from None
    except UnicodeDecodeError as error:
        raise Refused(f"{shown}: not UTF-8 (byte {error.start}); download it again") from None
    except csv.Error as error:
        raise Refused(f"{shown}: not a csv file ({error}); download it again") from None
    lines = [line for line in lines if line]
    if len(lines) < 2 or len(lines[0]) < 2:
        raise Refused(
            f"{shown}: a header with an id and at least one column to fill in, and rows, are wanted"
        )
    columns = tuple(lines[0])
    for row, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise Refused(f"{shown}:{row}: {len(line)} cells under {len(columns)} columns; download it again")
    sample = Sample(file, columns, columns.index(key) if key in columns else 0, lines[1:])
    for what, names in (("column", columns), ("id", sample.ids)):
        if len(set(names)) < len(names):
            seen: set[str] = set()
            twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise Refused(f"{shown}: {what} {twice!r} stands there twice")
    return sample


def refuse_stale(sample: Sample, samples: Samples, ids: list[str] | None = None) -> None:
    """The sample must be the one that `comp prepare` saw: hosts replace files in the middle of a competition."""
    shown, remedy = store.shown(sample.file), "run comp prepare again"
    rows = set(samples.frame["row"].to_numpy()[samples.positions("test")])
    ids = sample.ids if ids is None else ids  # a long form asks several lines of a row
    strange = [(line, each) for line, each in enumerate(ids, 2) if each not in rows]
    if strange:
        line, each = strange[0]
        raise Refused(
            f"{shown}:{line}: row {each!r} is no test row of data/samples.parquet, nor are {len(strange) - 1} others; {remedy}"
        )
    left = rows - set(ids)
    if left:
        raise Refused(
            f"{shown}: stale, {len(left)} test rows of data/samples.parquet are not in it, the first {min(left)!r}; {remedy}"
        )
    noted = (store.sealed(store.samples_file()) or {}).get("sample")
    if noted != store.sha256(sample.file):
        raise Refused(f"{shown}: not the file that it was when data/samples.parquet was made; {remedy}")
