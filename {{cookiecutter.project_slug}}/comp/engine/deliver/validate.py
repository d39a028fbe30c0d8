"""What a submission file must be: the sample's columns, its rows in its order, and in every cell what the form allows.

The bytes are read as text, never through a parser that guesses types: a guess would repair the very damage that the host
will see. Order matters always: a host matches rows by id or by line and does not say which, and the sample's order suits both.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from comp.engine.config.resolve import nearest
from comp.engine.data.sample_submission import SampleSubmission, read_sample
from comp.engine.deliver.cell_format import Form, form_of, likeness, some
from comp.engine.errors import Refused
from comp.engine.store import paths

BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def validate(
    file: Path,
    sample_file: Path,
    form: str,
    range: Sequence[float] | None = None,
    sums_to_one: bool = False,
    classes: Sequence[str] | None = None,
    key: str | None = None,
) -> None:
    """Refused with the first fault and the count of the others; nothing, when the file may go to the host. `classes` are
    the labels as the raw table writes them, `key` the id column where it is not the sample's first."""
    if not file.is_file():
        raise Refused(f"{paths.relative(file)}: no such file; comp submit NAME --dry-run writes it")
    rules = form_of(form, range, sums_to_one, classes)
    check(file.read_bytes(), paths.relative(file), read_sample(sample_file, *([key] if key else [])), rules)


def check(data: bytes, name: str, sample: SampleSubmission, form: Form) -> None:
    lines = _lines(data, name, sample.delimiter)
    _header(_cells(lines[0], f"{name}:1", sample.delimiter), name, sample)
    given: list[str] = []
    faults: list[str] = []
    bar = tqdm(lines[1:], "validate", unit="row", leave=False, disable=None, delay=1)
    for number, line in enumerate(bar, 2):
        cells = _cells(line, f"{name}:{number}", sample.delimiter)
        if len(cells) != len(sample.columns):
            what = f"{len(cells)} cells under {len(sample.columns)} columns"
            if len(cells) < len(sample.columns):
                what = f"column {sample.columns[len(cells)]!r} has no cell; " + (
                    what if line else "an empty line"
                )
            raise Refused(f"{name}:{number}: row {cells[0]!r}, {what}")
        given.append(cells[sample.key])
        faults += _row(cells, f"{name}:{number}: row {cells[sample.key]!r}", sample, number - 2, form)
    # Ids first: a shifted file has faults in its cells too, and the shift is what explains them.
    for found in (list(_ids(given, name, sample)), faults):
        if found:
            others = len(found) - 1
            raise Refused(found[0] + (f" (and {others} more like it)" if others else ""))


def _lines(data: bytes, name: str, delimiter: str) -> list[str]:
    if not data:
        raise Refused(f"{name}: is empty")
    if data.startswith(BYTE_ORDER_MARKS):
        raise Refused(
            f'{name}:1: begins with a byte order mark, which becomes part of the first column\'s name; write with encoding="utf-8"'
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{name}:{data.count(10, 0, error.start) + 1}: not UTF-8 (byte {data[error.start]:#x})"
        ) from None
    odd = re.search(r"[\x00-\x08\x0b-\x1f\x7f]" if delimiter == "\t" else r"[\x00-\x09\x0b-\x1f\x7f]", text)
    if odd:
        what = {"\r": "line ends are \\n alone, not \\r", "\t": f"a tab; cells are parted by {delimiter!r}"}
        where = text.count("\n", 0, odd.start()) + 1
        raise Refused(
            f"{name}:{where}: {what.get(odd.group(), f'a control character ({odd.group()!r}), the file is damaged')}"
        )
    if not text.endswith("\n"):
        raise Refused(f"{name}:{text.count(chr(10)) + 1}: the last line has no end, the file is cut off")
    return text[:-1].split("\n")


def _cells(line: str, where: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        cells = next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise Refused(f"{where}: broken quotes ({error})") from None
    if written(cells, delimiter) != line + "\n":
        raise Refused(
            f"{where}: quotes where none are needed; a host may take them for part of the text: {line[:60]}"
        )
    return cells


def written(cells: Sequence[str], delimiter: str) -> str:
    """One line of csv as it must be: quoted only where a cell holds the separator or a quote."""
    line = delimiter.join(cells)
    if '"' not in line and line.count(delimiter) == len(cells) - 1:
        return line + "\n"
    quoted = io.StringIO()
    csv.writer(quoted, delimiter=delimiter, lineterminator="\n").writerow(cells)
    return quoted.getvalue()


def _header(columns: list[str], name: str, sample: SampleSubmission) -> None:
    if tuple(columns) == sample.columns:
        return
    wanted = list(sample.columns)
    where = f"{name}:1: column"
    if len(columns) == len(wanted) + 1 and columns[1:] == wanted:
        raise Refused(f"{where} {columns[0]!r} is a row index; write with index=False")
    missing = [column for column in wanted if column not in columns]
    extra = [column for column in columns if column not in wanted]
    if missing:
        close = nearest(missing[0], extra)
        raise Refused(
            f"{where} {missing[0]!r} is missing"
            + (f"; {close[0]!r} stands there, and the sample has none" if close else "")
        )
    if extra:
        raise Refused(
            f"{where} {extra[0]!r} is not in {paths.relative(sample.file)}, which has {some(wanted)}"
        )
    if len(columns) != len(wanted):
        raise Refused(f"{where} {next(c for c in columns if columns.count(c) > 1)!r} stands there twice")
    first = next(i for i, column in enumerate(columns) if column != wanted[i])
    raise Refused(f"{where} {columns[first]!r} stands where the sample has {wanted[first]!r}")


def _ids(given: list[str], name: str, sample: SampleSubmission) -> Iterator[str]:
    """Unknown, duplicate, missing, reordered: each explains the ones after it, so only the first kind is told."""
    key, wanted = repr(sample.columns[sample.key]), sample.ids
    places = {each: number for number, each in enumerate(wanted, 2)}
    unknown = [(number, each) for number, each in enumerate(given, 2) if each not in places]
    if unknown:
        reason = (
            likeness(unknown[0][1], wanted)
            or f"no such id in {paths.relative(sample.file)}; its first is {wanted[0]!r}"
        )
        yield from (f"{name}:{number}: row {each!r}, column {key}: {reason}" for number, each in unknown)
        return
    first: dict[str, int] = {}
    asked, count = Counter(wanted), Counter(given)  # a host may ask for an id in several lines
    left = asked.copy()
    for number, each in enumerate(given, 2):
        first.setdefault(each, number)
        left[each] -= 1
        if left[each] < 0:
            yield f"{name}:{number}: row {each!r}, column {key}: the id stands in line {first[each]} already"
    if any(count[each] > asked[each] for each in count):
        return
    missing = [each for each in asked if count[each] < asked[each]]
    if missing:
        where = f"line {places[missing[0]]} of {paths.relative(sample.file)}"
        yield from (
            f"{name}: row {each!r}, column {key}: is missing; it stands in {where}" for each in missing
        )
        return
    for number, (each, right) in enumerate(zip(given, wanted, strict=True), 2):
        if each != right:
            yield f"{name}:{number}: row {each!r}, column {key}: the sample has {right!r} here; the order of its rows must be kept"


def _row(cells: list[str], where: str, sample: SampleSubmission, number: int, form: Form) -> Iterator[str]:
    names = sample.prediction_columns
    if number < len(sample.rows):
        line = sample.rows[number]
        for i in sample.index:
            if cells[i] != line[i]:
                yield f"{where}, column {sample.columns[i]!r}: {cells[i]!r}, where the sample has {line[i]!r}"
    for place, fault in form.faults([cells[i] for i in sample.prediction_positions]):
        columns = f"columns {names[0]!r} to {names[-1]!r}" if place is None else f"column {names[place]!r}"
        yield f"{where}, {columns}: {fault}"
