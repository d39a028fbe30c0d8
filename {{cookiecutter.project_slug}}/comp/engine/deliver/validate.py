"""What a submission file must be: the sample's columns, its rows in its order, and in every cell what the
form allows.

The bytes are read as text, not with a parser that infers types: inference would repair the very damage that
the host will see. Order is always compared: a host matches rows by id or by line and does not say which; the
sample's order suits both.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from comp.engine.config.competition_schema import Competition
from comp.engine.config.resolve import nearest
from comp.engine.data.sample_submission import SampleSubmission, id_column_candidates, read_sample
from comp.engine.deliver.submission_format import (
    CellRules,
    cell_rules,
    likely_cause,
    rules_for,
    shortened,
)
from comp.engine.errors import UserError
from comp.engine.store import paths
from comp.engine.tasks.kinds import Head

BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def validate_file(
    file: Path,
    sample_file: Path,
    form: str,
    range: Sequence[float] | None = None,
    sums_to_one: bool = False,
    classes: Sequence[str] | None = None,
    key: str | None = None,
) -> None:
    """Raises UserError with the first mistake and the number of others. `classes` are the labels as the raw
    table writes them, `key` is the id column if it is not the sample's first."""
    if not file.is_file():
        raise UserError(
            "file-missing",
            where=paths.relative(file),
            what="no such file",
            remedy="comp submit NAME --dry-run writes it",
        )
    rules = rules_for(form, range, sums_to_one, classes)
    sample = read_sample(sample_file, *([key] if key else []))
    validate_bytes(file.read_bytes(), paths.relative(file), sample, rules)


def validate_declared(
    file: Path, name: str, raw: Path, competition: Competition, heads: Sequence[Head]
) -> None:
    """By competition.yaml and the sample submission in the folder `raw`. `name` is the file that errors
    name."""
    sample = read_sample(raw / competition.submission.sample, *id_column_candidates(competition))
    validate_bytes(file.read_bytes(), name, sample, cell_rules(competition.submission, heads, sample))


def validate_bytes(data: bytes, name: str, sample: SampleSubmission, rules: CellRules) -> None:
    """`name` is the file that errors name."""
    lines = _lines(data, name, sample.delimiter)
    _header(_cells(lines[0], f"{name}:1", sample.delimiter), f"{name}:1", sample)
    ids: list[str] = []
    cell_errors: list[UserError] = []
    bar = tqdm(lines[1:], "validate", unit="row", leave=False, disable=None, delay=1)
    for number, line in enumerate(bar, 2):
        where = f"{name}:{number}"
        cells = _cells(line, where, sample.delimiter)
        if len(cells) != len(sample.columns):
            what = f"{len(cells)} cells, but {len(sample.columns)} columns" if line else "empty line"
            if len(cells) < len(sample.columns):
                what = f"no cell for column {sample.columns[len(cells)]!r}: {what}"
            raise UserError("submission-line", where=where, key=f"row {cells[0]!r}", what=what)
        ids.append(cells[sample.id_position])
        cell_errors += _row(cells, where, sample, number - 2, rules)
    # Ids first: a shifted file has errors in its cells too, and the shift is what explains them.
    for found in (list(_ids(ids, name, sample)), cell_errors):
        if found:
            first, others = found[0], len(found) - 1
            more = f" (and {others} more like it)" if others else ""
            raise UserError(first.code, where=first.where, key=first.key, what=first.what + more)


def _lines(data: bytes, name: str, delimiter: str) -> list[str]:
    if not data:
        raise UserError("submission-encoding", where=name, what="empty file")
    if data.startswith(BYTE_ORDER_MARKS):
        raise UserError(
            "submission-encoding",
            where=f"{name}:1",
            what="begins with a byte order mark, which would become part of the first column's name",
            remedy='write with encoding="utf-8"',
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            "submission-encoding",
            where=f"{name}:{data.count(10, 0, error.start) + 1}",
            what=f"not UTF-8 (byte {data[error.start]:#x})",
        ) from None
    odd = re.search(r"[\x00-\x08\x0b-\x1f\x7f]" if delimiter == "\t" else r"[\x00-\x09\x0b-\x1f\x7f]", text)
    if odd:
        what = {
            "\r": r"a line ends with \r\n, not with \n alone",
            "\t": f"contains a tab; cells are separated by {delimiter!r}",
        }
        raise UserError(
            "submission-encoding",
            where=f"{name}:{text.count(chr(10), 0, odd.start()) + 1}",
            what=what.get(
                odd.group(), f"contains a control character ({odd.group()!r}): the file is damaged"
            ),
        )
    if not text.endswith("\n"):
        raise UserError(
            "submission-encoding",
            where=f"{name}:{text.count(chr(10)) + 1}",
            what="the last line has no line end: the file is truncated",
        )
    return text[:-1].split("\n")


def _cells(line: str, where: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        cells = next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError("submission-quotes", where=where, what=f"broken quotes ({error})") from None
    if csv_line(cells, delimiter) != line + "\n":
        raise UserError(
            "submission-quotes",
            where=where,
            what=f"unnecessary quotes, which a host may read as part of the text: {line[:60]}",
        )
    return cells


def csv_line(cells: Sequence[str], delimiter: str) -> str:
    """One line of csv, quoted only where a cell contains the delimiter or a quote."""
    line = delimiter.join(cells)
    if '"' not in line and line.count(delimiter) == len(cells) - 1:
        return line + "\n"
    quoted = io.StringIO()
    csv.writer(quoted, delimiter=delimiter, lineterminator="\n").writerow(cells)
    return quoted.getvalue()


def _header(columns: list[str], where: str, sample: SampleSubmission) -> None:
    if tuple(columns) == sample.columns:
        return
    wanted = list(sample.columns)

    def wrong(column: str, what: str, remedy: str = "") -> UserError:
        return UserError("submission-header", where=where, key=f"column {column!r}", what=what, remedy=remedy)

    if len(columns) == len(wanted) + 1 and columns[1:] == wanted:
        raise wrong(columns[0], "a row index", "write with index=False")
    missing = [column for column in wanted if column not in columns]
    extra = [column for column in columns if column not in wanted]
    if missing:
        close = nearest(missing[0], extra)
        raise wrong(
            missing[0],
            "missing" + (f"; there is {close[0]!r}, which the sample does not have" if close else ""),
        )
    if extra:
        raise wrong(extra[0], f"not in {paths.relative(sample.file)}, which has {shortened(wanted)}")
    if len(columns) != len(wanted):
        raise wrong(next(c for c in columns if columns.count(c) > 1), "appears twice")
    first = next(i for i, column in enumerate(columns) if column != wanted[i])
    raise wrong(columns[first], f"in the place of the sample's {wanted[first]!r}")


def _ids(ids: list[str], name: str, sample: SampleSubmission) -> Iterator[UserError]:
    """Unknown, duplicate, missing, reordered: each explains the ones after it, so only the first kind found
    is reported."""
    column, wanted = repr(sample.columns[sample.id_position]), sample.ids
    line_of = {id_: number for number, id_ in enumerate(wanted, 2)}

    def wrong(id_: str, what: str, number: int | None = None) -> UserError:
        where = name if number is None else f"{name}:{number}"
        return UserError("submission-ids", where=where, key=f"row {id_!r}, column {column}", what=what)

    unknown = [(number, id_) for number, id_ in enumerate(ids, 2) if id_ not in line_of]
    if unknown:
        shown = paths.relative(sample.file)
        cause = likely_cause(unknown[0][1], wanted)
        cause = cause or f"no such id in {shown}; its first is {wanted[0]!r}"
        yield from (wrong(id_, cause, number) for number, id_ in unknown)
        return
    first: dict[str, int] = {}
    expected, count = Counter(wanted), Counter(ids)  # a sample may have an id in several lines
    left = expected.copy()
    for number, id_ in enumerate(ids, 2):
        first.setdefault(id_, number)
        left[id_] -= 1
        if left[id_] < 0:
            yield wrong(id_, f"duplicate of line {first[id_]}", number)
    if any(count[id_] > expected[id_] for id_ in count):
        return
    missing = [id_ for id_ in expected if count[id_] < expected[id_]]
    if missing:
        where = f"line {line_of[missing[0]]} of {paths.relative(sample.file)}"
        yield from (wrong(id_, f"missing; it is in {where}") for id_ in missing)
        return
    for number, (id_, right) in enumerate(zip(ids, wanted, strict=True), 2):
        if id_ != right:
            yield wrong(id_, f"the sample has {right!r} here; keep the order of its rows", number)


def _row(
    cells: list[str], where: str, sample: SampleSubmission, row: int, rules: CellRules
) -> Iterator[UserError]:
    """Index columns must be as in the sample, columns to fill in as the form allows. `row` counts from 0."""
    names, id_ = sample.prediction_columns, cells[sample.id_position]
    if row < len(sample.rows):
        line = sample.rows[row]
        for i in sample.index:
            if cells[i] != line[i]:
                key = f"row {id_!r}, column {sample.columns[i]!r}"
                yield UserError(
                    "submission-cell",
                    where=where,
                    key=key,
                    what=f"{cells[i]!r}, where the sample has {line[i]!r}",
                )
    for place, error in rules.errors([cells[i] for i in sample.prediction_positions]):
        columns = f"columns {names[0]!r} to {names[-1]!r}" if place is None else f"column {names[place]!r}"
        yield UserError("submission-cell", where=where, key=f"row {id_!r}, {columns}", what=error)
