"""Labels and groups that differ only in whitespace, case or number format, and NaN, None, null as words:
reported with the line that resolves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import config
from test_prepare import error_lines, lay, prepared

from comp.engine.config import yaml_lines
from comp.engine.data import similar_labels
from comp.engine.extras import check

GROUPS: dict[str, Any] = {"group": "g", "folds": {"scheme": "group", "k": 2, "seed": 0}}


def table(labels: list[str]) -> str:
    return "id,label\n" + "".join(f"{chr(97 + i)},{label}\n" for i, label in enumerate(labels))


def proposed(line: str) -> list[Any]:
    """The values of the lines of competition.yaml that a message proposes."""
    parts = line.split("configs/competition.yaml: classes: ")[1:]
    texts = [part.split(" makes one")[0].split(" keeps")[0].split(" keeps it")[0] for part in parts]
    return [yaml_lines.parse(f"here: {text}".encode())[0]["here"] for text in texts]


@pytest.mark.parametrize(
    ("labels", "row", "mapping"),
    [
        (["cat", "cat", '"cat "', "dog"], 4, {"cat": "cat", "cat ": "cat", "dog": "dog"}),
        (["cat", "cat", "Cat", "dog"], 4, {"Cat": "cat", "cat": "cat", "dog": "dog"}),
        (["a  b", "a b", "a b", "dog"], 2, {"a  b": "a b", "a b": "a b", "dog": "dog"}),
        (["1", "1.0", "1", "2"], 3, {"1": "1", "1.0": "1", "2": "2"}),
        (["01", "1", "1", "2"], 2, {"01": "1", "1": "1", "2": "2"}),
    ],
)
def test_labels_that_may_be_one(
    empty: Path, capsys: pytest.CaptureFixture[str], labels: list[str], row: int, mapping: dict[str, str]
) -> None:
    lay(empty, table(labels))
    faults = [f.line for f in check.run(config(experiment="base")) if f.key == "label"]
    assert len(faults) == 1 and f"train.csv:{row}: label: " in faults[0]
    one, several = proposed(faults[0])
    assert one == mapping and sorted(map(str, several)) == sorted(mapping)
    assert error_lines() == faults
    lay(empty, table(labels), classes=one)
    assert prepared().heads[0].classes == tuple(sorted(set(mapping.values())))
    lay(empty, table(labels), classes=several)
    assert prepared().heads[0].classes == tuple(several)


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_two_classes_of_three_spellings(empty: Path, task: str) -> None:
    lay(empty, table(["cat", "cat", "Cat", "dog"]), task=task)
    (line,) = error_lines()
    assert "train.csv:4: label: 'Cat' and 'cat'" in line and "1 and 2 rows" in line


@pytest.mark.parametrize("word", ["NaN", "None", "null", "nan"])
def test_null_words_are_texts(empty: Path, word: str) -> None:
    """An empty cell is a missing label; these words are classes if they are declared as such."""
    labels = ["cat", word, "dog"]
    lay(empty, table(["cat", "", "dog"]))
    assert ["train.csv:3: label: the label is missing" in line for line in error_lines()] == [True]
    lay(empty, table(labels))
    (line,) = error_lines()
    assert f"train.csv:3: label: {word!r} is a text, not a missing value" in line
    (several,) = proposed(line)
    lay(empty, table(labels), classes=several)
    made = prepared()
    assert set(made.heads[0].classes) == set(labels) and len(made.positions("train")) == 3
    lay(empty, table(labels), unknown=word)
    assert prepared().heads[0].unknown == word, "declared as the unknown class"


def test_labels_of_several_in_a_cell(empty: Path) -> None:
    lay(empty, table(["a b", "B a", "a none"]), task="multilabel", metric="f1_macro")
    lines = error_lines()
    assert len(lines) == 2 and "train.csv:3: label: 'B' and 'b'" in lines[0]
    assert "train.csv:4: label: 'none' is a text" in lines[1]


def test_similar_ids_of_retrieval_are_classes_and_noted(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(empty, table(["wA", "wa", "x", "x"]), task="retrieval", metric="map5")
    assert prepared().heads[0].classes == ("wA", "wa", "x")
    assert "note: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("groups", "row"), [(["p", "P", "q"], 3), (["p", '"p "', "q"], 3), (["1", "01", "2"], 3), (["1", "2", "1.0"], 4)]
)  # fmt: skip
def test_groups_that_may_be_one(empty: Path, groups: list[str], row: int) -> None:
    rows = "id,label,g\n" + "".join(f"{chr(97 + i)},{1 + i % 2},{g}\n" for i, g in enumerate(groups))
    lay(empty, rows, **GROUPS)
    (line,) = error_lines()
    assert f"train.csv:{row}: g: " in line
    for spelling, count in (("merge", 2), ("keep", 3)):
        assert f"configs/competition.yaml: group_spelling: {spelling}" in line
        lay(empty, rows, **GROUPS, group_spelling=spelling)
        made = prepared()
        assert made.frame["group"][made.positions("train")].nunique() == count


def test_a_group_called_nan(empty: Path) -> None:
    rows = "id,label,g\na,1,NaN\nb,2,NaN\nc,1,q\n"
    lay(empty, rows, **GROUPS)
    (line,) = error_lines()
    assert "train.csv:2: g: the group 'NaN' is a text" in line and "2 rows" in line
    lay(empty, rows, **GROUPS, group_spelling="keep")
    assert prepared().frame["group"].tolist()[:2] == ["NaN", "NaN"]


def test_normalized_spellings() -> None:
    same = [("1", "1.0"), ("01", "1"), ("+1", "1."), ("-0", "0"), ("A\t b", "a b"), ("Straße", "STRASSE")]
    other = [("1e3", "1000"), ("1", "-1"), ("9007199254740993", "9007199254740992"), ("1.2.0", "1.2"), ("ab", "a b"), ("1_0", "10")]  # fmt: skip
    assert all(similar_labels.normalized(a) == similar_labels.normalized(b) for a, b in same)
    assert all(similar_labels.normalized(a) != similar_labels.normalized(b) for a, b in other)
    assert pd.Series(similar_labels.merge_spellings({"b": 1, "B": 2, "c": 1})).to_dict() == {
        "b": "B",
        "B": "B",
        "c": "c",
    }
