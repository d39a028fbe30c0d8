"""Malformed tables and sample submissions: each kind is a function of (number) that changes one file of a
small competition."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

ROWS = 24
TRAIN = [["id", "label", "writer", "pen", "quality"]] + [
    [f"a{i:02d}", "cat" if i % 3 else "dog", f"w{i % 8}", str(i % 2), "1"] for i in range(ROWS)
]
TEST = [["id", "pen"]] + [[f"t{i:02d}", str(i % 2)] for i in range(ROWS)]
SAMPLE = [["id", "label"]] + [[f"t{i:02d}", "cat"] for i in range(ROWS)]
TABLES = {"train.csv": TRAIN, "test.csv": TEST, "sample_submission.csv": SAMPLE}


class Broken(NamedTuple):
    file: str
    data: bytes | None  # None: the file is gone
    where: str  # what the one line must hold: file and row
    why: str


def text(rows: list[list[str]]) -> bytes:
    return "".join(",".join(row) + "\n" for row in rows).encode()


def with_cell(file: str, number: int, column: int, value: str, why: str) -> Broken:
    rows = [list(row) for row in TABLES[file]]
    at = 1 + number * 7 % ROWS
    rows[at][column] = value
    return Broken(file, text(rows), f"{file}:{at + 1}", why)


def with_row(file: str, number: int, change: Callable[[list[str]], list[str]], why: str) -> Broken:
    rows = [list(row) for row in TABLES[file]]
    at = 1 + number * 5 % ROWS
    rows[at] = change(rows[at])
    return Broken(file, text(rows), f"{file}:{at + 1}", why)


def of_any(number: int) -> str:
    return list(TABLES)[number % 3]


def field_missing(number: int) -> Broken:
    file = of_any(number)
    return with_row(file, number, lambda row: row[:-1], "fields")


def field_too_many(number: int) -> Broken:
    return with_row(of_any(number), number, lambda row: [*row, "x"], "fields")


def id_twice(number: int) -> Broken:
    """Of a sample that is no fault: each of its lines gets the same prediction."""
    file, at = ("train.csv", "test.csv")[number % 2], 2 + number % (ROWS - 1)
    rows = [*TABLES[file][:at], TABLES[file][1], *TABLES[file][at:]]
    return Broken(file, text(rows), f"{file}:{at + 1}", "occurs again")


def id_missing(number: int) -> Broken:
    return with_cell(("train.csv", "test.csv")[number % 2], number, 0, "", "has no value")


def label_missing(number: int) -> Broken:
    return with_cell("train.csv", number, 1, "", "the label is missing")


def label_misspelt(number: int) -> Broken:
    return with_cell(
        "train.csv", number, 1, ("dgo", "Cat", "cat ", "1")[number % 4], "is not one of the 2 classes"
    )


def group_missing(number: int) -> Broken:
    return with_cell("train.csv", number, 2, "", "writer: the value is missing")


def weight_wrong(number: int) -> Broken:
    return with_cell("train.csv", number, 4, ("-1", "much", "", "nan")[number % 4], "is not a number >= 0")


def path_leads_out(number: int) -> Broken:
    return with_cell(
        "train.csv", number, 0, ("../x", "../../etc/passwd", "a/../../b")[number % 3], "is outside"
    )


def image_absent(number: int) -> Broken:
    return with_cell("train.csv", number, 0, f"none{number}", "no such file")


def quote_open(number: int) -> Broken:
    file = of_any(number)
    return with_row(file, number, lambda row: ['"' + row[0], *row[1:]], "")


def not_utf8(number: int) -> Broken:
    file, at = of_any(number), 1 + number % ROWS
    lines = text(TABLES[file]).splitlines(keepends=True)
    lines[at] = lines[at][:1] + (b"\xff", b"\xe9", b"\x80\x81")[number % 3] + lines[at][1:]
    return Broken(file, b"".join(lines), f"{file}:{at + 1}", "is not UTF-8")


def column_twice(number: int) -> Broken:
    file = of_any(number)
    rows = [[*row, row[0]] for row in TABLES[file]]
    return Broken(file, text(rows), f"{file}:1", "the column")


def column_renamed(number: int) -> Broken:
    file, column = (("train.csv", 1 + number // 2 % 4), ("test.csv", 1))[number % 2]
    rows = [list(row) for row in TABLES[file]]
    rows[0][column] += "_"
    return Broken(file, text(rows), f"{file}:1", "has no column")


def no_such_file(number: int) -> Broken:
    return Broken(of_any(number), None, of_any(number), "no such")


def nothing_in_it(number: int) -> Broken:
    return Broken(of_any(number), b"", of_any(number), "empty")


def header_alone(number: int) -> Broken:
    return Broken(of_any(number), text(TABLES[of_any(number)][:1]), of_any(number), "has no rows")


def sample_of_another(number: int) -> Broken:
    rows = [*SAMPLE, [f"z{number}", "cat"]]
    return Broken(
        "sample_submission.csv", text(rows), f"sample_submission.csv:{ROWS + 2}", "is not among the test rows"
    )


def sample_too_short(number: int) -> Broken:
    at = 1 + number % ROWS
    return Broken(
        "sample_submission.csv", text(SAMPLE[:at] + SAMPLE[at + 1 :]), f"test.csv:{at + 1}", "is not in"
    )


def sample_column_too_many(number: int) -> Broken:
    rows = [[*row, "0" if i else f"extra{number}"] for i, row in enumerate(SAMPLE)]
    return Broken(
        "sample_submission.csv", text(rows), "sample_submission.csv:1", "nothing is predicted for this column"
    )


def json_broken(number: int) -> Broken:
    """A list of records, one a line, as the training table."""
    lines = [json.dumps(dict(zip(TRAIN[0], row, strict=True))) for row in TRAIN[1:]]
    at = number * 3 % ROWS
    lines[at] = lines[at][: -2 - number % 9]
    return Broken("train.jsonl", "\n".join(lines).encode(), f"train.jsonl:{at + 1}", "invalid json")


KINDS: tuple[Callable[[int], Broken], ...] = (
    field_missing, field_too_many, id_twice, id_missing, label_missing, label_misspelt, group_missing, weight_wrong,
    path_leads_out, image_absent, quote_open, not_utf8, column_twice, column_renamed, no_such_file, nothing_in_it,
    header_alone, sample_of_another, sample_too_short, sample_column_too_many, json_broken,
)  # fmt: skip
