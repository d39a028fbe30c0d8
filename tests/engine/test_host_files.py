"""Irregular host files: samples with an index column, another separator or repeated ids, names with accents
in two Unicode forms, labels that the host does not score, and labels to which the host gives other names."""

from __future__ import annotations

import io
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config
from test_layouts import declare, error_line, image, opened, prepared, put
from test_submission_forms import logits, submission_lines, write_run

from comp import competition
from comp.engine import cli
from comp.engine.data import samples
from comp.engine.data.sample_submission import read_sample
from comp.engine.deliver import submission_format, validate
from comp.engine.errors import UserError
from comp.engine.extras import check
from comp.engine.readers import containers, unicode_names

NFC, NFD = (unicodedata.normalize(form, "Übung é") for form in ("NFC", "NFD"))


def checked() -> list[str]:
    return [fault.line for fault in check.run(config(experiment="base"))]


def lines_of(root: Path) -> list[str]:
    return (root / "submissions/exp001.csv").read_text().splitlines()


def lay(root: Path, sample: str, **changes: Any) -> samples.Samples:
    """Four training rows of two classes, and the test rows 7 and 8."""
    for i in range(9):
        put(root, f"train/{i}.png", image(20 * i))
    put(root, "train.csv", "id,label\n0,a\n1,b\n2,a\n3,b\n")
    put(root, "test.csv", "id\n7\n8\n")
    put(root, "sample.csv", sample)
    test = {"table": "test.csv", "image": "train/{id}.png"}
    declare(root, **{"test": test} | changes)
    return prepared()


def submitted(root: Path, table: samples.Samples, test: list[list[float]]) -> list[str]:
    truth = table.truth(table.heads[0], table.positions("train"))
    name = table.heads[0].name
    write_run(table, {name: np.log(0.1 + 0.8 * np.eye(2)[truth])}, {name: np.log(test)})
    submission_lines()
    return lines_of(root)


# --- the sample ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_an_index_column_without_a_name_stays_as_it_is(empty: Path, name: str) -> None:
    table = lay(empty, f"{name},Id,Category\n0,8,a\n5,7,a\n")
    assert checked() == []
    assert submitted(empty, table, [[0.1, 0.9], [0.8, 0.2]]) == [f"{name},Id,Category", "0,8,a", "5,7,b"]
    sample = read_sample(empty / "data/raw/sample.csv", "id")
    assert (sample.columns[sample.id_position], sample.prediction_columns) == ("Id", ("Category",))
    with pytest.raises(UserError, match=r"x.csv:3: row '7', column '.*': '6', where the sample has '5'"):
        form = submission_format.cell_rules(config().competition.submission, table.heads, sample)
        validate.validate_bytes(f"{name},Id,Category\n0,8,a\n6,7,b\n".encode(), "x.csv", sample, form)


def test_a_column_without_a_name_is_the_id_where_there_is_no_other(empty: Path) -> None:
    table = lay(empty, ",label\n7,a\n8,a\n")
    assert checked() == []
    assert submitted(empty, table, [[0.1, 0.9], [0.8, 0.2]]) == [",label", "7,b", "8,a"]


@pytest.mark.parametrize("form", ["probabilities", "label"])
def test_the_index_column_is_no_class(empty: Path, form: str) -> None:
    columns = "b,a" if form == "probabilities" else "label"
    cells = "0,0" if form == "probabilities" else "a"
    sample = f",id,{columns}\n0,7,{cells}\n1,8,{cells}\n"
    table = lay(empty, sample, submission={"sample": "sample.csv", "form": form})
    assert table.heads[0].classes == (("b", "a") if form == "probabilities" else ("a", "b"))
    assert checked() == []


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_sample_with_another_separator_is_answered_with_it(empty: Path, mark: str) -> None:
    lay(empty, f"id{mark}label\n7{mark}a\n8{mark}a\n")
    one, other = f"x{mark}y", "1,5"
    put(empty, "train.csv", f'id,label\n0,{one}\n1,"{other}"\n2,{one}\n3,"{other}"\n')
    table = prepared()
    assert table.heads[0].classes == (other, one) and checked() == []
    lines = submitted(empty, table, [[0.9, 0.1], [0.2, 0.8]])
    # Quoted only where the separator stands in a cell.
    assert lines == [f"id{mark}label", f"7{mark}{other}", f'8{mark}"{one}"']
    file = empty / "submissions/exp001.csv"
    validate.validate_file(file, empty / "data/raw/sample.csv", "label", classes=[one, other])
    file.write_text(file.read_text().replace(mark, ",", 2))
    with pytest.raises(UserError, match=r"exp001\.csv:1: column 'id': missing"):
        validate.validate_file(file, empty / "data/raw/sample.csv", "label")


def test_ids_that_the_sample_repeats_get_the_same_line_each_time(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = lay(empty, "id,label\n8,a\n7,a\n8,a\n")
    assert checked() == []
    assert (
        "1 ids are in several lines of data/raw/sample.csv, like '8' in lines 2, 4" in capsys.readouterr().out
    )
    wanted = ["id,label", "8,a", "7,b", "8,a"]
    assert submitted(empty, table, [[0.1, 0.9], [0.8, 0.2]]) == wanted
    sample = read_sample(empty / "data/raw/sample.csv")
    form = submission_format.cell_rules(config().competition.submission, table.heads, sample)
    for damage, line in {
        "id,label\n8,a\n7,b\n": "row '8', column 'id': missing",
        "id,label\n8,a\n7,b\n7,b\n": "x.csv:4: row '7', column 'id': duplicate of line 3",
        "id,label\n8,a\n8,a\n7,b\n": "x.csv:3: row '8', column 'id': the sample has '7' here",
    }.items():
        with pytest.raises(UserError, match=line):
            validate.validate_bytes(damage.encode(), "x.csv", sample, form)

    def mine(rows: Any, prediction: Any, sample: Any) -> Any:
        return sample.assign(label=["ab"[p.argmax()] for p in prediction])

    monkeypatch.setattr(competition, "write_submission", mine, raising=False)
    submission_lines()
    assert lines_of(empty) == wanted, "a hook of your own has a line of rows for each line of the sample"


def test_a_sample_that_repeats_ids_can_be_the_list_of_the_test_rows(empty: Path) -> None:
    test = {"table": "sample.csv", "image": "train/{id}.png"}
    table = lay(empty, "id,label\n8,a\n7,a\n8,a\n", test=test)
    assert table.frame["id"].tolist()[4:] == ["8", "7"]
    assert checked() == []
    put(empty, "train.csv", "id,label\n0,a\n1,b\n0,a\n")
    assert "train.csv:4: the id '0' occurs again" in error_line()


# --- names in two spellings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("disk", "table"), [(NFD, NFC), (NFC, NFD)])
def test_names_with_accents_in_either_spelling(empty: Path, disk: str, table: str) -> None:
    put(empty, f"{disk}/{disk}.png", image(10))
    put(empty, f"{disk}/y.png", image(90))
    put(empty, "train.csv", f"id,label\n{table},u\ny,v\n")
    put(empty, "sample.csv", f"id,label\n{disk},u\n")
    where = {"image": f"{table}/{{id}}.png"}
    put(empty, "test.csv", f"id\n{table}\n")
    declare(empty, train={"table": "train.csv"} | where, test={"table": "test.csv"} | where)
    made = prepared()
    assert made.frame["images"].iloc[0][0] == f"{disk}/{disk}.png", "as the disk spells it"
    assert int(opened(made)[0][0, 0, 0]) == 10
    assert checked() == [], "the sample's id is the table's in another spelling"
    declare(
        empty,
        train={"table": "train.csv", "image": f"{table}/{table[:3]}*.png"},
        test={"table": "test.csv"} | where,
    )
    assert prepared().frame["images"].iloc[1].tolist() == [f"{disk}/{disk}.png"]


@pytest.mark.parametrize(("disk", "table"), [(NFD, NFC), (NFC, NFD)])
@pytest.mark.parametrize("flag", [True, False])
def test_members_of_an_archive_in_either_spelling(empty: Path, disk: str, table: str, flag: bool) -> None:
    """macOS does not even set the flag that says that a name is UTF-8."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        info = zipfile.ZipInfo("deeper/" + ("x" * len(disk.encode()) if not flag else disk) + ".png")
        zipped.writestr(info, image(10))
    data = out.getvalue() if flag else out.getvalue().replace(b"x" * len(disk.encode()), disk.encode())
    put(empty, "train.zip", data)
    put(empty, "train.csv", f"id,label\n{table},u\n{table}2,v\n")
    put(empty, "sample.csv", f"id,label\n{table},u\n")
    where = {"image": "train.zip/{id}.png"}
    declare(empty, train={"table": "train.csv"} | where, test={"table": "sample.csv"} | where)
    assert int(opened(prepared())[0][0, 0, 0]) == 10
    (fault,) = checked()
    assert fault.startswith("data/raw/train.csv:3: image train.zip/")
    assert containers.members(empty / "data/raw/train.zip") == [f"deeper/{disk}.png"]


def test_folders_that_are_labels_in_another_spelling_than_the_sample(empty: Path) -> None:
    for label in ("é", "o"):
        for i in range(2):
            put(empty, f"train/{unicodedata.normalize('NFD', label)}/{i}.png", image(i))
    put(empty, f"test/{NFD}.png", image(3))
    put(empty, "sample.csv", f"id,é,o\n{NFC},0,0\n")
    form = {"sample": "sample.csv", "form": "probabilities"}
    declare(
        empty, train={"files": "train/{label}/{number}.png"}, test={"files": "test/{id}.png"}, submission=form
    )
    table = prepared()
    assert table.heads[0].classes == ("é", "o") and checked() == []
    assert table.truth(table.heads[0], table.positions("train")).tolist() == [0, 0, 1, 1]


def test_a_name_that_is_nowhere_is_left_alone(tmp_path: Path) -> None:
    for name in ("nowhere/a.png", f"{NFC}/a.png", f"{NFD}.csv"):
        assert unicode_names.on_disk(tmp_path, name) == name


def test_a_table_in_either_spelling_alone_and_in_an_archive(empty: Path) -> None:
    lay(empty, "id,label\n7,a\n8,a\n")
    raw = empty / "data/raw"
    (raw / "train.csv").rename(raw / f"{NFD}.csv")
    where = {"image": "train/{id}.png"}
    declare(empty, train={"table": f"{NFC}.csv"} | where, test={"table": "test.csv"} | where)
    assert len(prepared().frame) == 6
    with zipfile.ZipFile(raw / "tables.zip", "w") as zipped:
        zipped.write(raw / f"{NFD}.csv", f"{NFD}.csv")
    declare(empty, train={"table": f"tables.zip/{NFC}.csv"} | where, test={"table": "test.csv"} | where)
    assert len(prepared().frame) == 6


# --- labels that the host does not score --------------------------------------------------------------------


def test_of_several_labels_in_a_cell_the_samples_columns_decide(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(empty, "train.csv", "id,tags\n" + "".join(f"{i},{['rust scab', 'scab', 'rust mildew', 'mildew'][i % 4]}\n" for i in range(8)))  # fmt: skip
    put(empty, "sample.csv", "id,scab,rust\nx,0,0\n")
    declare(empty, target="tags", task="multilabel", metric="roc_auc", submission={"sample": "sample.csv", "form": "probabilities"})  # fmt: skip
    capsys.readouterr()
    table = prepared()
    printed = capsys.readouterr().out
    assert table.heads[0].outputs == ("scab", "rust") and not table.heads[0].graded
    assert (
        "1 of 3 labels of tags have no column in the sample submission" in printed and "mildew (4)" in printed
    )
    truth = table.truth(table.heads[0], table.positions("train"))
    assert truth.tolist()[:4] == [[1, 1], [1, 0], [0, 1], [0, 0]]
    faults = [fault for fault in checked() if "no such file" not in fault and "none of" not in fault]
    assert faults == [] and "mildew (4)" in capsys.readouterr().out
    write_run(table, {"tags": logits(0.2 + 0.6 * truth)}, {"tags": logits([[0.25, 0.5]])})
    assert submission_lines()[0] == "id,scab,rust"
    # Declared, the others are learned beside the scored ones.
    declare(empty, target="tags", task="multilabel", metric="roc_auc", classes=["mildew", "rust", "scab"], submission={"sample": "sample.csv", "form": "probabilities"})  # fmt: skip
    head = prepared().heads[0]
    assert head.outputs == ("mildew", "rust", "scab") and head.graded == ("scab", "rust")
    put(empty, "sample.csv", "id,x,y\nx,0,0\n")
    declare(empty, target="tags", task="multilabel", metric="roc_auc", submission={"sample": "sample.csv", "form": "probabilities"})  # fmt: skip
    line = error_line()
    assert (
        line.startswith("configs/competition.yaml:")
        and ": target: none of 3 labels of tags, like 'mildew'" in line
    )


# --- labels that the host calls another way -----------------------------------------------------------------

STEGO = {"Cover": 0, "JMiPOD": 1, "JUNIWARD": 1}


def folders(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        for i in range(2):
            put(root, f"{name}/{i}.png", image(10 * number + i))
    put(root, "Test/9.png", image(9))


def test_folders_become_the_hosts_classes(empty: Path) -> None:
    folders(empty, list(STEGO))
    put(empty, "sample.csv", "Id,Label\n9,0\n")
    files = {"files": "{label:Cover|J\\w+}/{number}.png"}
    binary = {
        "task": "binary",
        "metric": "roc_auc",
        "submission": {"sample": "sample.csv", "form": "probability"},
    }
    # Of numbers the larger is the positive class, in whichever order the mapping is written.
    for classes in (STEGO, dict(reversed(STEGO.items()))):
        declare(empty, train=files, test={"files": "Test/{id}.png"}, classes=classes, **binary)
        (head,) = prepared().heads
        assert head.classes == ("0", "1")
    table = samples.load()
    assert table.truth(head, table.positions("train")).tolist() == [0, 0, 1, 1, 1, 1]
    assert checked() == []
    record = write_run(
        table, {"label": logits([[0.2], [0.3], [0.6], [0.8], [0.9], [0.7]])}, {"label": logits([[0.9]])}
    )
    assert (
        record["oof"] == 1.0
        and submission_lines()[0] == "Id,Label"
        and float(submission_lines()[1].split(",")[1]) == pytest.approx(0.9)
    )
    # As labels they are written as the host calls them.
    binary["submission"] = {"sample": "sample.csv", "form": "label"}
    declare(
        empty, train=files, test={"files": "Test/{id}.png"}, classes=STEGO, **binary | {"metric": "accuracy"}
    )
    prepared()
    assert submission_lines() == ["Id,Label", "9,1"]


def test_labels_that_are_not_in_the_mapping_are_faults(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders(empty, [*STEGO, "UERD"])
    put(empty, "sample.csv", "Id,Label\n9,0\n")
    files = {"files": "{label:[A-SU]\\w+}/{number}.png"}
    binary = {
        "task": "binary",
        "metric": "roc_auc",
        "submission": {"sample": "sample.csv", "form": "probability"},
    }
    classes = STEGO | {"nsF5": 1}
    declare(empty, train=files, test={"files": "Test/{id}.png"}, classes=classes, **binary)
    assert cli.main(["check"]) == 2
    printed = capsys.readouterr().out
    assert "UERD/0.png: label: 'UERD' is not in competition.classes" in printed and "2 errors" in printed
    assert "note: competition.classes lists nsF5, which no row has as label" in printed
    assert "UERD/1.png: label: 'UERD' is not in competition.classes" in error_line()


def test_a_mapping_of_labels_in_tables_and_in_cells(empty: Path) -> None:
    put(empty, "train.csv", "id,label\n0,rust\n1,scab\n2,healthy\n3,rust\n")
    put(empty, "sample.csv", "id,label\n9,ok\n")
    declare(empty, classes={"rust": "ill", "scab": "ill", "healthy": "ok"}, task="multiclass")
    table = prepared()
    # In the order of the mapping unless they are numbers; `declare` writes it sorted: healthy is first.
    assert table.heads[0].classes == ("ok", "ill")
    assert table.truth(table.heads[0], table.positions("train")).tolist() == [1, 1, 0, 1]
    put(empty, "train.csv", "id,label\n0,a b\n1,b c\n2,\n3,a\n")
    put(empty, "sample.csv", "id,x,z\n9,0,0\n")
    form = {"sample": "sample.csv", "form": "probabilities"}
    declare(
        empty, classes={"a": "x", "b": "x", "c": "z"}, task="multilabel", metric="roc_auc", submission=form
    )
    table = prepared()
    assert table.targets(table.heads[0])[:4].tolist() == [[1, 0], [1, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"target": ["label", "other"], "task": "multilabel"},
            "classes: a mapping needs a single target",
        ),
        ({"task": "regression", "metric": "rmse"}, "classes: have no meaning for task: regression"),
    ],
)
def test_a_mapping_without_effect_is_refused(empty: Path, changes: dict[str, Any], part: str) -> None:
    declare(empty, classes={"a": 1, "b": 2}, **changes)
    line = error_line()
    assert line.startswith("configs/competition.yaml:") and part in line
