"""Tables that do not hold one line a sample: a label a line, packed ones, parquet's own kinds of cells."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import config
from test_layouts import declare, error_line, opened, prepared, put
from test_submission_forms import logits, submission_lines, write_run

from comp.engine.data import raw_tables
from comp.engine.data.sample_submission import read_sample
from comp.engine.deliver.submission_format import cell_rules


def test_annotations_of_one_image_are_its_labels(empty: Path) -> None:
    notes = [{"id": 10 + i, "image_id": i // 2, "category_id": i % 3} for i in range(6)]
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    put(empty, "train.json", json.dumps({"images": images, "annotations": notes, "categories": []}))
    put(empty, "test.csv", "row,id\nx_0,x\nx_1,x\n")
    put(empty, "sample.csv", "id,category_id\nx,1\n")
    where = {
        "train": {"table": "train.json", "image": "{file_name}"},
        "test": {"table": "test.csv", "image": "{id}.png"},
    }
    declare(
        empty, **where, gather=True, target="category_id", task="multilabel", metric="f1_micro",
        submission={"sample": "sample.csv", "form": "labels"},
    )  # fmt: skip
    table = prepared()
    assert table.targets(table.heads[0])[:3].tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    assert [each.tolist() for each in table.frame["images"]] == [["0.png"], ["1.png"], ["2.png"], ["x.png"]]
    declare(empty, **where, gather=True, target="category_id")
    assert (
        error_line()
        .splitlines()[0]
        .startswith(
            "data/raw/train.json: row 1: category_id: '1', but '0' in data/raw/train.json: row 0, which "
            "has the same id"
        )
    )


@pytest.mark.parametrize("inside", ["", "/sample.csv"])
def test_a_sample_in_an_archive_is_written_like_any_other(empty: Path, inside: str) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("sample.csv", "id,label\n1,a\n2,b\n")
    put(empty, "sample.csv.zip", out.getvalue())
    put(empty, "train.csv.gz", gzip.compress(b"id,label\n07,a\n8,b\n9,a\n10,b\n"))
    sample = f"sample.csv.zip{inside}"
    declare(
        empty, train={"table": "train.csv.gz", "image": "{id}.png"}, test={"table": sample, "image": "{id}.png"},
        submission={"sample": sample, "form": "label"},
    )  # fmt: skip
    table = prepared()
    assert table.frame["id"].tolist() == ["07", "8", "9", "10", "1", "2"]
    truth = table.truth(table.heads[0], table.positions("train"))
    write_run(
        table, {"label": np.log(0.1 + 0.8 * np.eye(2)[truth])}, {"label": logits([[0.1, 0.9], [0.9, 0.1]])}
    )
    assert submission_lines() == ["id,label", "1,b", "2,a"]
    put(empty, "train.csv.gz", gzip.compress(b"id,label\n07,a\n")[:-6])
    assert "data/raw/train.csv.gz: is damaged and cannot be opened" in error_line()


def test_cells_of_parquet_are_the_text_that_a_csv_would_have(empty: Path) -> None:
    long = 123456789012345678
    put(empty, "train.csv", "id\n0\n")
    cells = {
        "id": [1, 2], "group": [long, None], "tags": [["a", "b"], None], "kind": pa.array(["u", "v"]).dictionary_encode(),
        "value": [0.5, 2.0],
    }  # fmt: skip
    pq.write_table(pa.table(cells), empty / "data/raw/train.parquet")
    frame = raw_tables.read(empty / "data/raw/train.parquet").frame
    assert frame.fillna("").to_numpy().tolist() == [
        ["1", str(long), "a b", "u", "0.5"],
        ["2", "", "", "v", "2.0"],
    ]


LONG = {
    "train": {"table": "train.csv", "image": "train/{id}.dcm", "long": {"column": "ID", "like": "{id}_{class}", "value": "Label"}},
    "test": {"table": "sample.csv", "image": "test/{id}.dcm", "long": {"column": "ID", "like": "{id}_{class}"}},
    "target": ["any", "in_any"], "task": "multilabel", "metric": "mean_column_log_loss",
    "submission": {"sample": "sample.csv", "form": "probability", "rows": "{id}_{class}"},
}  # fmt: skip


def test_a_training_table_with_a_line_for_each_class(empty: Path) -> None:
    lines = [
        f"ID_{i}_{name},{i % 2 if name == 'any' else i // 4}\n"
        for i in range(8)
        for name in ("in_any", "any")
    ]
    put(empty, "train.csv", "ID,Label\n" + "".join([*lines, lines[0]]))
    put(empty, "sample.csv", "ID,Label\nID_y_any,0\nID_y_in_any,0\nID_x_in_any,0\nID_x_any,0\n")
    declare(empty, **LONG)
    table = prepared()
    assert table.frame["id"].tolist() == [*(f"ID_{i}" for i in range(8)), "ID_y", "ID_x"]
    assert table.frame["images"].iloc[-1].tolist() == ["test/ID_x.dcm"]
    truth = table.truth(table.heads[0], table.positions("train"))
    assert truth.tolist()[:5] == [[0, 0], [1, 0], [0, 0], [1, 0], [0, 1]]
    write_run(table, {"labels": logits(0.2 + 0.6 * truth)}, {"labels": logits([[0.25, 0.5], [0.125, 0.75]])})
    assert [line.split(",")[0] for line in submission_lines()] == [
        "ID",
        "ID_y_any",
        "ID_y_in_any",
        "ID_x_in_any",
        "ID_x_any",
    ]
    assert np.allclose(
        [float(line.split(",")[1]) for line in submission_lines()[1:]], [0.25, 0.5, 0.75, 0.125]
    )
    put(empty, "train.csv", "ID,Label\n" + "".join([*lines, "ID_0_in_any,1\n"]))
    assert error_line() == "data/raw/train.csv:2: in_any: '0', but '1' in another line of its id"
    put(empty, "train.csv", "ID,Label\n" + "".join([*lines, "ID_9_any,1\n"]))
    assert error_line() == "data/raw/train.csv:18: in_any: the label is missing"
    put(empty, "train.csv", "ID,Label\n" + "".join([*lines, "ID_9_all,1\n"]))
    assert error_line().startswith(
        "data/raw/train.csv:18: ID: 'ID_9_all' does not match {id}_{class} with one of the targets any, "
        "in_any"
    )


def test_a_line_for_each_present_class(empty: Path) -> None:
    put(empty, "train.csv", "id,finding,age\na,y,5\na,x,5\nb,x,6\nc,y,7\nc,y,7\nd,x,8\n")
    put(empty, "sample.csv", "id,x,y\nq,0,0\n")
    declare(
        empty, train={"table": "train.csv", "image": "{id}.png", "long": {"column": "finding"}}, target=["x", "y"],
        task="multilabel", metric="mean_column_auc", submission={"sample": "sample.csv", "form": "probabilities"},
    )  # fmt: skip
    assert prepared().targets(prepared().heads[0])[:4].tolist() == [[1, 1], [1, 0], [0, 1], [1, 0]]


def test_labels_and_images_in_arrays(empty: Path) -> None:
    imgs, labels = io.BytesIO(), io.BytesIO()
    np.savez(imgs, np.stack([np.full((16, 16), i, np.uint8) for i in range(6)]))
    np.savez(labels, y=np.arange(6) % 2)
    put(empty, "imgs.npz", imgs.getvalue())
    put(empty, "labels.npz", labels.getvalue())
    put(empty, "sample.csv", "id,label\n3,1\n")
    declare(
        empty, train={"table": "labels.npz", "image": "imgs.npz/arr_0/{key}", "id": "key", "columns": {"label": "y"}},
        test={"table": "sample.csv", "image": "imgs.npz/arr_0/{id}"},
    )  # fmt: skip
    table = prepared()
    assert table.frame["target.label"].tolist()[:6] == [0, 1, 0, 1, 0, 1]
    assert [int(opened(table)[i].max()) for i in (0, 5, 6)] == [0, 5, 3]
    declare(empty, train={"table": "imgs.npz", "image": "{key}"})
    assert error_line() == (
        "data/raw/imgs.npz: holds arr_0 (6, 16, 16); columns are arrays of one dimension and of the same "
        "length"
    )


def test_other_peoples_tables_have_other_names(empty: Path) -> None:
    put(empty, "train.csv", "id,label\n0,a\n1,b\n")
    put(empty, "old.csv", "name,label,diagnosis\n7,old,b\n")
    put(empty, "sample.csv", "id,label\nx,a\n")
    declare(
        empty,
        extra=[{"table": "old.csv", "image": "{id}.png", "columns": {"id": "name", "label": "diagnosis"}}],
    )
    table = prepared()
    assert (table.heads[0].classes, table.frame["target.label"].iloc[-1]) == (("a", "b"), 1)
    assert table.frame["images"].iloc[-1].tolist() == ["7.png"]
    declare(empty, extra=[{"table": "old.csv", "image": "{id}.png", "columns": {"id": "nmae"}}])
    assert error_line() == (
        "configs/competition.yaml:1: extra.columns: data/raw/old.csv:1 has no column 'nmae'; did you mean "
        "'name'?"
    )


def test_a_line_for_each_target_with_a_column_for_each_class(empty: Path) -> None:
    put(
        empty,
        "train.csv",
        "id,left,right\n"
        + "".join(f"{i},{['mild', 'bad'][i % 2]},{['mild', 'bad'][i // 4]}\n" for i in range(8)),
    )
    put(empty, "test.csv", "id\np\nq\n")
    put(empty, "sample.csv", "row_id,mild,bad\nq_right,0,0\nq_left,0,0\np_left,0,0\np_right,0,0\n")
    declare(
        empty, target={"left": "multiclass", "right": "multiclass"}, task=None, metric="log_loss",
        test={"table": "test.csv", "image": "{id}.png"},
        submission={"sample": "sample.csv", "form": "probabilities", "rows": "{id}_{target}"},
    )  # fmt: skip
    table = prepared()
    assert table.heads[0].classes == ("bad", "mild")
    oof = {head.name: np.zeros((8, 2)) for head in table.heads}
    write_run(
        table,
        oof,
        {"left": np.log([[0.25, 0.75], [0.5, 0.5]]), "right": np.log([[0.875, 0.125], [0.0625, 0.9375]])},
    )
    lines = [line.split(",") for line in submission_lines()]
    assert [line[0] for line in lines] == ["row_id", "q_right", "q_left", "p_left", "p_right"]
    cells = np.array([line[1:] for line in lines[1:]], float)
    assert np.allclose(cells, [[0.9375, 0.0625], [0.5, 0.5], [0.75, 0.25], [0.125, 0.875]])
    assert cell_rules(
        config(experiment="base").competition.submission,
        table.heads,
        read_sample(empty / "data/raw/sample.csv"),
    ).sums_to_one
