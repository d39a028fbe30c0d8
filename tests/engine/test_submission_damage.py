"""Invalid submissions: every kind of damage for each form, and predictions that do not fit the sample."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import config
from test_submission import DOGS, HEADS, Case, lay_out, predictions, refusal

from comp.engine.data import prepare, samples
from comp.engine.data.sample_submission import read_sample, validate_current
from comp.engine.errors import UserError
from comp.engine.store import paths


@pytest.fixture(params=list(HEADS))
def case(request: pytest.FixtureRequest, empty: Path) -> Case:
    return lay_out(request.param)


# --- what is refused while writing --------------------------------------------------------------------------


def test_missing_predictions_keep_the_old_file(case: Case) -> None:
    file = case.write(predictions(case))
    before = file.read_bytes()
    prediction = predictions(case, seed=1)
    prediction.heads[case.table.heads[0].name][3] = np.nan
    key = case.table.frame["row"].iloc[prediction.row[3]]
    assert repr(key) in refusal(lambda: case.write(prediction))
    whole = predictions(case)
    short = replace(whole, row=whole.row[1:], heads={name: v[1:] for name, v in whole.heads.items()})
    assert "no prediction" in refusal(lambda: case.write(short))
    train = replace(whole, row=np.zeros_like(whole.row))
    assert "test rows" in refusal(lambda: case.write(train))
    assert file.read_bytes() == before
    assert not list(file.parent.glob(".*part"))


def test_a_stale_sample(case: Case) -> None:
    prediction = predictions(case)
    text = case.sample.read_text()
    for changed, says in (
        (text.replace("a_3", "a_4"), "'a_4'"),
        (text.replace("9,", "new,"), "'new'"),
        (text.rsplit("\n", 2)[0] + "\n", "'9'"),
        (text.replace("\n", "\r\n"), "changed after"),
    ):
        case.sample.write_bytes(changed.encode())
        line = refusal(lambda: case.write(prediction))
        assert says in line and "sample_submission.csv" in line and "comp prepare" in line
    case.sample.write_bytes(text.encode())
    case.write(prediction)


def test_prepare_stores_the_hash_of_the_sample(project: Path) -> None:
    prepare.prepare(config())
    sample = project / "data" / "raw" / "sample_submission.csv"
    validate_current(read_sample(sample), samples.load())
    sample.write_text(sample.read_text().replace(",0", ",1"))
    assert "changed after" in refusal(lambda: validate_current(read_sample(sample), samples.load()))


def test_an_invalid_sample(case: Case) -> None:
    good = case.sample.read_bytes()
    for data in (
        b"", b"image_id\n1\n", good.split(b"\n")[0] + b"\n",
        good + b"x\n", good.replace(b"a_3", b"a\xff"), good + b'"open', b"a,a\n1,2\n",
    ):  # fmt: skip
        case.sample.write_bytes(data)
        assert "sample_submission.csv" in refusal(lambda: read_sample(case.sample))
    case.sample.unlink()
    assert "no such file" in refusal(lambda: read_sample(case.sample))


def test_columns_without_an_output(empty: Path) -> None:
    lay = lay_out("probabilities", columns=["0012", "borzoi", "poodle"])
    assert "'poodle'" in refusal(lambda: lay.write(predictions(lay)))
    lay = lay_out("probabilities", columns=["0012", "borzoi"])
    assert "'Saint, Bernard'" in refusal(lambda: lay.write(predictions(lay)))


@pytest.mark.parametrize(
    ("form", "other"), [("probability", "value"), ("probabilities", "value"), ("value", "label")]
)
def test_a_form_that_does_not_fit_the_task(empty: Path, form: str, other: str) -> None:
    lay = lay_out(form, heads=(HEADS[other],))
    line = refusal(lambda: lay.write(predictions(lay)))
    assert "submission.form" in line and form in line and HEADS[other].task in line


# --- damage -------------------------------------------------------------------------------------------------

Lines = list[list[str]]
Damage = Callable[[Lines], object]


def text_of(lines: Lines) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def cell(value: str, row: int = 4, column: int = 1) -> Damage:
    return lambda lines: lines[row].__setitem__(column, value)


def every(change: Callable[[int, list[str]], list[str]]) -> Damage:
    return lambda lines: lines.__setitem__(slice(None), [change(i, line) for i, line in enumerate(lines)])


def all_ids(change: Callable[[str], str]) -> Damage:
    return lambda lines: [line.__setitem__(0, change(line[0])) for line in lines[1:]]


TABLE_DAMAGE: dict[str, Damage] = {
    "missing row": lambda lines: lines.pop(3),
    "missing last row": lambda lines: lines.pop(),
    "extra row": lambda lines: lines.append(["unknown", *lines[1][1:]]),
    "duplicate row": lambda lines: lines.append(list(lines[2])),
    "duplicate instead of another": lambda lines: lines.__setitem__(5, list(lines[2])),
    "two rows exchanged": lambda lines: lines.__setitem__(slice(2, 4), lines[3:1:-1]),
    "sorted": lambda lines: lines.__setitem__(slice(1, None), sorted(lines[1:])),
    "ids shifted": lambda lines: [a.__setitem__(0, b) for a, b in zip(lines[1:], [x[0] for x in lines[2:] + lines[1:2]], strict=True)],
    "column missing": lambda lines: [line.pop() for line in lines],
    "column extra": every(lambda i, line: [*line, line[1] if i else "x"]),
    "column renamed": cell("prediction", 0),
    "id column renamed": cell("id", 0, 0),
    "column with a space": lambda lines: cell(f" {lines[0][1]}", 0)(lines),
    "columns exchanged": lambda lines: [line.__setitem__(slice(0, 2), line[1::-1]) for line in lines],
    "column twice": every(lambda i, line: [*line, line[1]]),
    "index column": every(lambda i, line: [str(i - 1) if i else "", *line]),
    "named index column": every(lambda i, line: [str(i - 1) if i else "Unnamed: 0", *line]),
    "index without a header": every(lambda i, line: [str(i - 1), *line] if i else line),
    "no header": lambda lines: lines.pop(0),
    "header twice": lambda lines: lines.insert(1, list(lines[0])),
    "header alone": lambda lines: lines.__delitem__(slice(1, None)),
    ".jpg left on ids": all_ids(lambda each: each + ".jpg"),
    "folder left on ids": all_ids(lambda each: "test/" + each),
    "leading zeros lost": all_ids(lambda each: each.lstrip("0") or each),
    "ids are floats": cell("9.0", 8, 0),
    "id in capitals": cell("A_3", 3, 0),
    "space after an id": cell("a_3 ", 3, 0),
    "id empty": cell("", 3, 0),
    "row too short": lambda lines: lines[4].pop(),
    "row too long": lambda lines: lines[4].append("0.5"),
    "cell empty": cell(""),
    "cell of spaces": cell(" "),
    **{f"cell {word}": cell(word) for word in ("nan", "NaN", "None", "NULL", "NA", "<NA>", "-", "?", "#N/A")},
    **{f"cell {word}": cell(word) for word in ("inf", "-inf", "Infinity", "1e999", "-1e999")},
    "cell with a space before": lambda lines: cell(" " + lines[4][1])(lines),
    "cell with a space behind": lambda lines: cell(lines[4][1] + " ")(lines),
    "decimal comma": lambda lines: cell(lines[4][1].replace(".", ",") if "." in lines[4][1] else "0,5")(lines),
    "True": cell("True"),
    "a list": cell("[0.5]"),
    "a tensor": cell("tensor(0.5)"),
    "1_0": cell("1_0"),
    "other digits": cell("٣"),
    "hexadecimal": cell("0x1"),
    "quotes in the text": cell("'0012'"),
    "line break in a cell": cell("a\nb"),
}  # fmt: skip
FORM_DAMAGE: dict[str, dict[str, Damage]] = {
    "probability": {"above 1": cell("1.0000001"), "below 0": cell("-1e-9"), "a label": cell("malignant"), "per cent": cell("57.1")},
    "probabilities": {
        "above 1": cell("1.0000001"), "below 0": cell("-1e-9"), "a label": cell("borzoi"),
        "rows of 0.9": lambda lines: [line.__setitem__(slice(1, None), ["0.3"] * 3) for line in lines[1:]],
        "one row off by 2e-6": lambda lines: lines[2].__setitem__(slice(1, None), ["0.2", "0.3", "0.500002"]),
        "logits": lambda lines: lines[2].__setitem__(slice(1, None), ["-0.5", "1.2", "0.3"]),
        "rounded": lambda lines: [line.__setitem__(slice(1, None), ["0.333", "0.333", "0.333"]) for line in lines[1:]],
        "all zero": lambda lines: lines[2].__setitem__(slice(1, None), ["0", "0", "0"]),
        "classes exchanged": lambda lines: lines[0].__setitem__(slice(1, 3), lines[0][2:0:-1]),
        "class missing": lambda lines: [line.pop(2) for line in lines],
    },
    "label": {
        "a probability": cell("0.93"), "a code": cell("1"), "label lost its zeros": cell("12"), "label became a float": cell("12.0"),
        "unknown": cell("poodle"), "capitals": cell("Borzoi"), "two labels": cell("borzoi 0012"), "part": cell("borzo"),
    },
    "value": {"above the range": cell("100.00001"), "below the range": cell("0.99"), "negative": cell("-3"), "text": cell("high")},
}  # fmt: skip
BYTE_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda data: b"",
    "a BOM": lambda data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "utf-16 without a mark": lambda data: data.decode().encode("utf-16-le"),
    "latin-1": lambda data: data.replace(b"a_3", "ä_3".encode("latin-1")),
    "a byte that is no text": lambda data: data.replace(b"a_3", b"a\xff3"),
    "windows line ends": lambda data: data.replace(b"\n", b"\r\n"),
    "old mac line ends": lambda data: data.replace(b"\n", b"\r"),
    "one carriage return": lambda data: data.replace(b"\n", b"\r\n", 3).replace(b"\r\n", b"\n", 2),
    "semicolons": lambda data: data.replace(b",", b";"),
    "tabs": lambda data: data.replace(b",", b"\t"),
    "no last line end": lambda data: data[:-1],
    "blank line at the end": lambda data: data + b"\n",
    "blank line at the start": lambda data: b"\n" + data,
    "blank line in the middle": lambda data: data.replace(b"\na_3", b"\n\na_3"),
    "NUL": lambda data: data.replace(b"a_3", b"a\0003"),
    "zeros at the end": lambda data: data + bytes(64),
    "zeros for the end": lambda data: data[:-20] + bytes(20),
    "all quoted": lambda data: b"".join(b",".join(b'"%s"' % c.strip(b'"') for c in x.split(b",")) + b"\n" for x in data.splitlines()),
    "one id quoted": lambda data: data.replace(b"a_3", b'"a_3"'),
    "open quote": lambda data: data.replace(b"a_3", b'"a_3'),
    "quote inside": lambda data: data.replace(b"a_3", b'a"3'),
    "text after a quote": lambda data: data.replace(b"a_3", b'"a"_3'),
    "spaces after commas": lambda data: data.replace(b",", b", "),
    "a comment": lambda data: b"# exp001\n" + data,
    "html": lambda data: b"<html><body>403</body></html>\n",
    "gzip": lambda data: b"\x1f\x8b\x08\x00" + data,
    "twice": lambda data: data + data,
    "merge marks": lambda data: b"<<<<<<< ours\n" + data,
}  # fmt: skip


def test_damaged_tables_name_row_and_column(case: Case) -> None:
    good = list(csv.reader(case.write(predictions(case)).open(newline="")))
    file = paths.path("submissions", "damaged.csv")
    file.write_text(text_of(good))
    case.validate(file)
    damage = TABLE_DAMAGE | FORM_DAMAGE[case.form]
    for name, harm in damage.items():
        lines = [list(line) for line in good]
        harm(lines)
        assert lines != good, name
        file.write_text(text_of(lines))
        line = refusal(lambda: case.validate(file))
        assert line.startswith("submissions/damaged.csv"), (name, line)
        assert ("is outside" in line) == (
            name.split()[0] in ("above", "below", "negative", "per", "logits")
        ), (name, line)
        if name in FORM_DAMAGE[case.form] or name.startswith("cell"):
            changed = next(i for i, (a, b) in enumerate(zip(lines, good, strict=True)) if a != b)
            if changed:
                assert f"csv:{changed + 1}: row {good[changed][0]!r}, column" in line, (name, line)
            else:
                assert "csv:1: column" in line, (name, line)


def test_damaged_bytes(case: Case) -> None:
    file = case.write(predictions(case))
    good = file.read_bytes()
    for name, harm in BYTE_DAMAGE.items():
        file.write_bytes(harm(good))
        assert file.read_bytes() != good, name
        assert refusal(lambda: case.validate(file)).startswith("submissions/exp001.csv"), name
    for length in range(len(good)):
        file.write_bytes(good[:length])
        refusal(lambda: case.validate(file))


def test_a_value_without_a_range_is_still_a_number(empty: Path) -> None:
    lay = lay_out("value", unlimited=True)
    file = lay.write(predictions(lay))
    good = list(csv.reader(file.open(newline="")))
    for word, passes in (
        ("-1e9", True),
        ("1e308", True),
        ("1e999", False),
        ("-1e999", False),
        ("nan", False),
        ("", False),
    ):
        good[3][1] = word
        file.write_text(text_of(good))
        if passes:
            lay.validate(file)
        else:
            assert "row 'a_3', column 'score'" in refusal(lambda: lay.validate(file))


def test_no_flipped_byte_outside_a_number_passes(case: Case) -> None:
    """Inside a number a flip may give another number, and in an own label another class: only those may
    pass."""
    file = case.write(predictions(case))
    good = file.read_bytes()
    rows = list(csv.reader(io.StringIO(good.decode())))
    for place in range(len(good)):
        for mask in (0x01, 0x10, 0x80):
            bad = bytearray(good)
            bad[place] ^= mask
            file.write_bytes(bad)
            try:
                case.validate(file)
            except UserError:
                continue
            passed = list(csv.reader(io.StringIO(bad.decode())))
            assert [row[0] for row in passed] == [row[0] for row in rows] and passed[0] == rows[0]
            assert case.form != "label" or {row[1] for row in passed[1:]} <= set(DOGS)


def test_errors_name_the_cause(empty: Path) -> None:
    """Ids and labels that were changed in a known way, each once."""
    lay = lay_out("label")
    good = list(csv.reader(lay.write(predictions(lay)).open(newline="")))
    file = paths.path("submissions", "damaged.csv")
    for name, words in {
        ".jpg left on ids": ("suffix", "expected '0012'", "and 7 more"),
        "leading zeros lost": ("leading zeros", "expected '0012'"),
        "ids are floats": ("read as a number", "expected '9'"),
        "index column": ("index=False",),
        "missing row": ("row 'a_3'", "missing"),
        "duplicate row": ("row '0007'", "duplicate of line 3"),
        "two rows exchanged": ("row 'a_3'", "'0007' here", "order"),
        "extra row": ("row 'unknown'", "no such id"),
        "row too short": ("row '0100'", "no cell for column 'breed'"),
    }.items():
        lines = [list(line) for line in good]
        TABLE_DAMAGE[name](lines)
        file.write_text(text_of(lines))
        line = refusal(lambda: lay.validate(file))
        assert all(word in line for word in words), (name, line)
    raw = text_of(good).encode()
    for name, word in {
        "a BOM": "byte order mark",
        "windows line ends": r"\r",
        "no last line end": "truncated",
    }.items():
        file.write_bytes(BYTE_DAMAGE[name](raw))
        assert word in refusal(lambda: lay.validate(file)), name
