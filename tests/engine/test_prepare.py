"""comp prepare: raw tables become samples; every fault has file, line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import config

from comp import competition
from comp.engine.data import prepare, samples
from comp.engine.errors import UserError
from comp.engine.store import paths

SIMPLE: dict[str, Any] = {
    "slug": "x",
    "title": "x",
    "raw": "data/raw",
    "train": {"table": "train.csv", "image": "train/{id}.png"},
    "test": {"table": "test.csv", "image": "test/{id}.png"},
    "id": "id",
    "target": "label",
    "task": "multiclass",
    "metric": "accuracy",
    "folds": {"scheme": "stratified", "k": 2, "seed": 0},
    "submission": {"sample": "sample.csv", "form": "label"},
}
TRAIN = "id,label\n007,cat\n008,dog\n"
TEST = "id\n9\n"
SAMPLE = "id,label\n9,cat\n"


def lay(
    root: Path, rows: str | bytes = TRAIN, testing: str = TEST, sample: str = SAMPLE, **changes: Any
) -> None:
    """A competition of three tables under root; `changes` are keys of competition.yaml."""
    raw = root / "data" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "train.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    (raw / "test.csv").write_text(testing)
    (raw / "sample.csv").write_text(sample)
    (root / "configs" / "competition.yaml").write_text(yaml.safe_dump(SIMPLE | changes))


def prepared() -> samples.Samples:
    prepare.prepare(config(experiment="base"))
    return samples.load()


def errors() -> list[UserError]:
    with pytest.raises(UserError) as raised:
        prepare.prepare(config(experiment="base"))
    assert not paths.samples_file().exists(), "nothing is written after an error"
    return raised.value.errors


def error_lines() -> list[str]:
    return [error.line for error in errors()]


# --- what comes out -----------------------------------------------------------------------------------------


def test_the_practice_competition(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = samples.load()
    frame = made.frame
    first = frame.iloc[0]
    assert first["id"] == first["row"] == "00000"
    assert list(first["images"]) == ["train/00000.png"]
    assert frame["source"].value_counts().to_dict() == {"train": 1437, "test": 360}
    assert frame["id"].is_unique and (frame["weight"] == 1).all()
    test = frame[frame["source"] == "test"]
    assert (
        test["target.label"].isna().all()
        and test["group"].isna().all()
        and set(test["meta.pen"]) == {"fine", "medium", "bold"}
    )
    (head,) = made.heads
    assert (head.name, head.task, head.classes) == ("label", "multiclass", tuple("0123456789"))
    raw = pd.read_csv(project / "data/raw/train.csv", dtype=str)
    truth = made.truth(head, made.positions("train"))
    assert [head.classes[code] for code in truth] == raw["label"].tolist()

    before = paths.samples_file().read_bytes()
    paths.samples_file().unlink()
    prepare.prepare(config(experiment="base"))
    assert paths.samples_file().read_bytes() == before
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "next: comp check, then comp folds"
    assert any(line.endswith(", from target label") for line in printed)
    assert "  also group writer, metadata pen" in printed


def test_ids_stay_text(empty: Path) -> None:
    lay(empty, "id,label\n007,1\n1e5,2\nNA,1\n 8,2\n", "id\n00\n", "id,label\n00,1\n")
    assert prepared().frame["id"].tolist() == ["007", "1e5", "NA", " 8", "00"]


def test_a_parquet_table_reads_like_a_csv(empty: Path) -> None:
    lay(empty, "id,label,age\n7,1,3\n8,2,\n9,1,4\n", "id,age\n1,5\n", "id,label\n1,1\n", metadata=["age"])
    from_csv = prepared()
    frame = pd.DataFrame({"id": [7, 8, 9], "label": [1, 2, 1], "age": [3, None, 4]})
    frame.to_parquet(empty / "data" / "raw" / "train.parquet")
    lay(
        empty,
        testing="id,age\n1,5\n",
        sample="id,label\n1,1\n",
        metadata=["age"],
        train={"table": "train.parquet", "image": "train/{id}.png"},
    )
    assert prepared().hash == from_csv.hash


def test_a_byte_order_mark_is_no_letter(empty: Path) -> None:
    lay(empty, b"\xef\xbb\xbf" + TRAIN.encode())
    assert prepared().frame["id"].tolist() == ["007", "008", "9"]


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("{id}.png", "ab12.png"),
        ("{id[0]}/{id[1]}/{id}", "a/b/ab12"),
        ("{id[-1]}/{id[0:2]}/{id[2:]}.jpg", "2/ab/12.jpg"),
        ("{a b}/x{id}", "dir/xab12"),
        ("same.png", "same.png"),
    ],
)
def test_image_paths(empty: Path, template: str, path: str) -> None:
    lay(empty, "id,label,a b\nab12,1,dir\ncd34,2,dir\n", train={"table": "train.csv", "image": template})
    assert list(prepared().frame["images"].iloc[0]) == [path]


def test_test_ids_like_training_ids(empty: Path) -> None:
    """Hosts number both from 0: the sample's id must be unique, the key that the host scores must stay."""
    lay(empty, "id,label\n0,a\n1,b\n", "id\n0\n1\n2\n", "id,label\n0,a\n1,a\n2,a\n")
    frame = prepared().frame
    assert frame["id"].is_unique
    assert frame["row"].tolist() == ["0", "1", "0", "1", "2"]
    assert list(frame["images"].iloc[2]) == ["test/0.png"]


def test_class_orders(empty: Path) -> None:
    def classes(labels: str, **changes: Any) -> tuple[str, ...]:
        lay(
            empty,
            "id,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels.split())),
            **changes,
        )
        return prepared().heads[0].classes

    assert classes("10 9 2 10") == ("2", "9", "10")
    assert classes("b a C") == ("C", "a", "b")
    assert classes("b a", classes=["c", "b", "a"]) == ("c", "b", "a")
    form = {"sample": "sample.csv", "form": "probabilities"}
    assert classes("b a", submission=form, sample="id,b,rare,a\n9,0,0,0\n") == ("b", "rare", "a")
    assert classes("yes no", task="binary", metric="roc_auc") == ("no", "yes")
    assert classes("good bad", task="ordinal", metric="qwk", classes=["bad", "good"]) == ("bad", "good")


def test_one_hot_rows_become_codes(empty: Path) -> None:
    lay(empty, "id,rust,scab\na,0,1\nb,1.0,0\n", target=["rust", "scab"])
    made = prepared()
    assert made.heads[0].outputs == ("rust", "scab")
    assert made.truth(made.heads[0], made.positions("train")).tolist() == [1, 0]


def test_soft_labels_keep_their_shares(empty: Path) -> None:
    lay(empty, "id,rust,scab\na,0.25,0.75\nb,1,0\n", target=["rust", "scab"])
    made = prepared()
    assert made.truth(made.heads[0], made.positions("train")).tolist() == [[0.25, 0.75], [1, 0]]
    lay(empty, "id,label\na,0.25\nb,1\nc,0\n", task="binary", metric="roc_auc")
    made = prepared()
    assert made.truth(made.heads[0], made.positions("train")).tolist() == [0.25, 1, 0]


def test_several_targets(empty: Path) -> None:
    lay(empty, "id,x,y\na,0.5,-3\nb,1e3,4\n", target=["x", "y"], task="regression", metric="rmse")
    made = prepared()
    assert [head.outputs for head in made.heads] == [("x", "y")]
    assert made.truth(made.heads[0], made.positions("train")).tolist() == [[0.5, -3], [1000, 4]]
    lay(empty, "id,x,y\na,0,1\nb,1,0\n", target=["x", "y"], task="binary", metric="roc_auc")
    made = prepared()
    assert [(head.name, head.outputs) for head in made.heads] == [("x", ("x",)), ("y", ("y",))]
    assert made.truth(made.heads[1], made.positions("train")).tolist() == [1, 0]


def test_dates_are_days_and_numbers_stay(empty: Path) -> None:
    folds = {"scheme": "time", "k": 2, "seed": 0}
    lay(empty, "id,label,t\na,1,1970-01-03\nb,2,1970-01-01T12:00:00\nc,1,1970-02-01\n", time="t", folds=folds)
    assert prepared().frame["time"].tolist()[:3] == [2, 0.5, 31]
    lay(empty, "id,label,t\na,1,2019\nb,2,2020.5\nc,1,7\n", "id,t\n9,8\n", time="t", folds=folds)
    assert prepared().frame["time"].tolist() == [2019, 2020.5, 7, 8]


def test_metadata_are_numbers_or_words(empty: Path) -> None:
    lay(empty, "id,label,n,w\na,1,3,3\nb,2,,x\n", "id,n,w\n9,1.5,\n", metadata=["n", "w"])
    frame = prepared().frame
    assert frame["meta.n"].tolist()[::2] == [3, 1.5] and np.isnan(frame["meta.n"].iloc[1])
    assert frame["meta.w"].tolist()[:2] == ["3", "x"] and frame["meta.w"].isna().iloc[2]


def test_a_reader_of_your_own(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_samples(raw: Path) -> pd.DataFrame:
        names = sorted(file.name for file in (raw / "train").iterdir())
        rows = [
            {"id": name, "label": name.split(".")[0], "images": f"train/{name}", "source": "train"}
            for name in names
        ]
        return pd.DataFrame([*rows, {"id": "1", "images": ["test/1.jpg", "test/1b.jpg"], "source": "test"}])

    lay(empty)
    (empty / "data/raw/train").mkdir()
    for name in ("cat.0.jpg", "cat.1.jpg", "dog.0.jpg"):
        (empty / "data/raw/train" / name).write_bytes(b"")
    monkeypatch.setattr(competition, "read_samples", read_samples, raising=False)
    made = prepared()
    assert made.heads[0].classes == ("cat", "dog")
    assert [list(names) for names in made.frame["images"]][2:] == [
        ["train/dog.0.jpg"],
        ["test/1.jpg", "test/1b.jpg"],
    ]
    monkeypatch.setattr(
        competition, "read_samples", lambda raw: read_samples(raw).rename(columns={"label": "lable"})
    )
    paths.samples_file().unlink()
    (error,) = errors()
    assert (error.code, error.where) == ("read-samples-invalid", "comp/competition.py")
    assert "'label'" in error.what and "'lable'" in error.remedy


# --- errors -------------------------------------------------------------------------------------------------


def test_absent_columns_are_named_with_the_nearest(empty: Path) -> None:
    """The error is at the line of the key in competition.yaml."""

    def missing() -> list[tuple[str, str, str]]:
        declared = (empty / "configs/competition.yaml").read_text().splitlines()
        found = []
        for error in errors():
            file, line = error.where.split(":")
            assert (error.code, file) == ("column-missing", "configs/competition.yaml")
            assert declared[int(line) - 1].strip().startswith(error.key.split(".")[-1])
            found.append((error.key, error.what, error.remedy))
        return found

    here = "data/raw/train.csv:1 has no column"
    lay(empty, "ID,label\na,1\n")
    assert missing() == [
        ("id", f"{here} 'id'", "did you mean 'ID'?"),
        ("train.image", f"{here} 'id'", "did you mean 'ID'?"),
    ]
    lay(empty, "idd,lable\na,1\n", train={"table": "train.csv", "image": "{fid}/{idd}.png"})
    assert missing() == [
        ("id", f"{here} 'id'", "did you mean 'idd'?"),
        ("train.image", f"{here} 'fid'", "did you mean 'idd'?"),
        ("target", f"{here} 'label'", "did you mean 'lable'?"),
    ]


ROW_FAULTS: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "short row": ("id,label\na,1\nb\n", {}, "train.csv:3: 1 fields, where the first line has 2 columns"),
    "long row": ("id,label\na,1,1\n", {}, "train.csv:2: 3 fields, where"),
    "a column twice": ("id,label,id\na,1,b\n", {}, "train.csv:1: the column 'id' is there twice"),
    "not UTF-8": (b"id,label\na,1\n\xff,2\n", {}, "train.csv:3: is not UTF-8"),
    "an open quote": ('id,label\n"a,1\nb,2\n', {}, "train.csv:2: the row that begins here is damaged"),
    "no rows": ("id,label\n", {}, "train.csv: has no rows"),
    "no bytes": ("", {}, "train.csv: is empty"),
    "lines are lines of the file": (
        'id,label\n\n"a\na",1\nc,2\nb,\n',
        {},
        "train.csv:6: label: the label is missing",
    ),
    "id twice": (
        "id,label\na,1\nb,2\na,1\n",
        {},
        "train.csv:4: the id 'a' occurs again, first in data/raw/train.csv:2; if an id has several "
        "images set gather: true",
    ),
    "no id": ("id,label\na,1\n,2\n", {}, "train.csv:3: id: has no value for the template train/{id}.png"),
    "no id, image from elsewhere": (
        "id,label\na,1\n,2\n",
        {"train": {"table": "train.csv", "image": "x.png"}},
        "train.csv:3: id: the value is missing",
    ),
    "unknown class": (
        "id,label\na,cat\nb,dgo\n",
        {"classes": ["cat", "dog"]},
        "train.csv:3: label: 'dgo' is not one of the 2 classes; did you mean 'dog'?",
    ),
    "a third class": (
        "id,label\na,0\nb,1\nc,0\nd,1\ne,x\n",
        {"task": "binary", "metric": "roc_auc"},
        "train.csv:6: label: 'x' is one of 3 classes",
    ),
    "one class": ("id,label\na,0\nb,0\n", {}, "at least two different classes"),
    "no number": (
        "id,label\na,1\nb,1.5.2\n",
        {"task": "regression", "metric": "rmse"},
        "train.csv:3: label: '1.5.2' is not a number",
    ),
    "infinite": (
        "id,label\na,1\nb,inf\n",
        {"task": "regression", "metric": "rmse"},
        "train.csv:3: label: 'inf' is not a number",
    ),
    "no value": (
        "id,label\na,1\nb,\n",
        {"task": "regression", "metric": "rmse"},
        "train.csv:3: label: the label is missing",
    ),
    "a grade in words": (
        "id,label\na,1\nb,mild\n",
        {"task": "ordinal", "metric": "qwk"},
        "train.csv:3: label: 'mild' is not a number",
    ),
    "shares": (
        "id,x,y\na,0,1\nb,1,1\n",
        {"target": ["x", "y"]},
        "train.csv:3: the shares of 2 classes sum to 2",
    ),
    "no group": (
        "id,label,g\na,1,p\nb,2,\n",
        {"group": "g", "folds": {"scheme": "group", "k": 2, "seed": 0}},
        "train.csv:3: g: the value is missing",
    ),
    "no time": ("id,label,t\na,1,3\nb,2,\n", {"time": "t"}, "train.csv:3: t: the value is missing"),
    "a date among numbers": (
        "id,label,t\na,1,3\nb,2,2020-01-01\n",
        {"time": "t"},
        "train.csv:3: t: '2020-01-01' is not a time",
    ),
    "too short for the path": (
        "id,label\nab,1\nc,2\n",
        {"train": {"table": "train.csv", "image": "{id[1]}.png"}},
        "train.csv:3: id: 'c' is too short",
    ),
    "out of the folder": (
        "id,label\na,1\n../x,2\n",
        {},
        "train.csv:3: the path 'train/../x.png' is outside",
    ),
    "only train has it": (
        "id,label,m\na,1,p\nb,2,q\n",
        {"metadata": ["m"]},
        "metadata: test.csv:1 has no column 'm', only the training table has it",
    ),
    "the target as feature": (TRAIN, {"metadata": ["label"]}, "metadata: 'label' is a target"),
    "no such table": (
        TRAIN,
        {"test": {"table": "tset.csv", "image": "{id}"}},
        "tset.csv: no such table; did you mean test.csv?",
    ),
    "another kind of table": (
        TRAIN,
        {"test": {"table": "test.xlsx", "image": "{id}"}},
        "test.xlsx: not a table format that is read: .csv",
    ),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_wrong_row_is_one_line(empty: Path, name: str) -> None:
    train, changes, line = ROW_FAULTS[name]
    lay(empty, train, **changes)
    (empty / "data/raw/test.xlsx").write_bytes(b"PK")
    lines = error_lines()
    assert len(lines) == 1 and line in lines[0], lines


def test_many_wrong_rows_end_in_a_count(empty: Path) -> None:
    lay(empty, "id,label\na,1\nb,2\n" + "".join(f"x{i},\n" for i in range(prepare.SHOWN + 5)))
    found = errors()
    assert len(found) == prepare.SHOWN + 1
    assert found[-1].what == "and 5 more" and "comp check" in found[-1].remedy


def test_an_empty_raw_folder(empty: Path) -> None:
    (empty / "data" / "raw").mkdir(parents=True)
    (empty / "configs/competition.yaml").write_text(yaml.safe_dump(SIMPLE))
    (error,) = errors()
    assert (error.code, error.where) == ("raw-empty", "data/raw") and "comp practice" in error.remedy
