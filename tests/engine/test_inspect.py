"""comp inspect: the competition.yaml that it writes is valid for comp prepare, and lists what is
ambiguous."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from conftest import config
from PIL import Image

from comp.engine.data import prepare, raw_tables, samples
from comp.engine.errors import UserError
from comp.engine.extras import check, infer_schema, inspect


def put(root: Path, name: str, data: bytes | str) -> None:
    file = root / "data" / "raw" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 12)).save(out, "JPEG")
    return out.getvalue()


def inspected(root: Path) -> samples.Samples:
    (root / "data").mkdir(exist_ok=True)
    inspect.inspect()
    prepare.prepare(config(experiment="base"))
    return samples.load()


def test_a_table_and_archives(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("train", "test"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as zipped:
            for i in range(30):
                zipped.writestr(f"{kind[:2]}{i}.jpg", jpeg())
        put(empty, f"{kind}.zip", out.getvalue())
    rows = "".join(f"tr{i}.jpg,{'abc'[i % 3]},patient{i // 2}\n" for i in range(30))
    put(empty, "train.csv", "file,kind,patient_id\n" + rows)
    put(empty, "sample_submission.csv", "file,kind\n" + "".join(f"te{i}.jpg,a\n" for i in range(30)))
    table = inspected(empty)
    competition = config(experiment="base").competition
    assert raw_tables.read(empty / "data/raw/train.csv").where(1).endswith("train.csv:3"), (
        "not what its column `file` says"
    )
    assert competition.train.image == ["train.zip/{file}"] and competition.test.image == ["test.zip/{file}"]
    assert (competition.target, competition.task, competition.group) == (["kind"], "multiclass", "patient_id")
    assert competition.folds.scheme == "stratified_group"
    assert table.heads[0].classes == ("a", "b", "c")
    written = (empty / "configs" / "competition.yaml").read_text()
    assert "15 values, by its name" in written and "ambiguous: metric" in written
    printed = capsys.readouterr().out
    assert "3 labels: a 10, b 10, c 10" in printed and "metric: accuracy; also balanced_accuracy" in printed
    assert "of 30 train images: 30 JPEG RGB, 12 x 12" in printed and "of 24 test images" in printed
    with Image.open(empty / "data" / "inspect.png") as sheet:
        assert sheet.height > 7 * 112, "30 training images and 24 of test, 8 in a row"
    assert (competition.slug, competition.title) == ("practice", "Practice"), "kept from the existing file"


def test_no_table_at_all(empty: Path) -> None:
    for i in range(4):
        put(empty, f"train/{'red' if i % 2 else 'blue'}/{i}.jpg", jpeg())
        put(empty, f"test/{i + 9}.jpg", jpeg())
    put(empty, "sample_submission.csv", "id,label\n" + "".join(f"{i + 9},0.5\n" for i in range(4)))
    assert inspected(empty).heads[0].classes == ("blue", "red")
    assert config(experiment="base").competition.train.files == "train/{label}/{id}.jpg"


def test_coco_with_another_id_in_the_sample(empty: Path) -> None:
    notes = [{"id": 500 + i, "image_id": f"k{i}", "category_id": i % 3} for i in range(40)]
    images = [{"id": f"k{i}", "file_name": f"x/{i % 4}/{i}.jpg"} for i in range(40)]
    put(empty, "train.json", json.dumps({"images": images, "annotations": notes, "categories": []}))
    put(empty, "test.json", json.dumps([{"id": f"q{i}", "file_name": f"y/{i}.jpg"} for i in range(5)]))
    for i in range(40):
        put(empty, f"train/x/{i % 4}/{i}.jpg", jpeg())
    for i in range(5):
        put(empty, f"test/y/{i}.jpg", jpeg())
    put(empty, "sample_submission.csv", "Id,Predicted\n" + "".join(f"q{i},0\n" for i in range(5)))
    table = inspected(empty)
    assert table.frame["images"].iloc[7].tolist() == ["train/x/3/7.jpg"]
    assert table.frame["row"].tolist()[-1] == "q4"
    assert table.heads[0].name == "category_id"


def test_labels_rankings_and_label_columns(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(30):
        put(empty, f"train/{i}.jpg", jpeg())
        put(empty, f"test/t{i}.jpg", jpeg())
    sample = "".join(f"t{i},1 2\n" for i in range(30))
    put(empty, "sample_submission.csv", "id,tags\n" + sample)
    put(empty, "train.csv", "id,tags\n" + "".join(f"{i},{'4 5' if i % 2 else '5'}\n" for i in range(30)))
    assert inspected(empty).heads[0].task == "multilabel"
    put(empty, "train.csv", "id,tags\n" + "".join(f"{i},{i % 7}\n" for i in range(30)))
    assert inspected(empty).heads[0].task == "retrieval"
    assert config(experiment="base").competition.submission.k == 2
    put(empty, "sample_submission.csv", "id,a,b\n" + "".join(f"t{i},0.5,0.5\n" for i in range(30)))
    put(empty, "train.csv", "id,a,b,c\n" + "".join(f"{i},{i % 2},{i // 2 % 2},1\n" for i in range(30)))
    head = inspected(empty).heads[0]
    assert (head.task, head.outputs, head.graded) == ("multilabel", ("a", "b", "c"), ("a", "b"))
    assert "2 labels: a 15, b 14" in capsys.readouterr().out
    put(empty, "sample_submission.csv", "id,size\n" + "".join(f"t{i},0.5\n" for i in range(30)))
    put(empty, "train.csv", "id,size\n" + "".join(f"{i},{i / 10}\n" for i in range(30)))
    assert inspected(empty).heads[0].task == "regression"
    assert "size: 0 to 2.9, median 1.45, 90 % from 0.145 to 2.755" in capsys.readouterr().out


def test_examples_are_of_every_class_with_their_labels(empty: Path) -> None:
    for i in range(60):
        put(empty, f"train/{i:02d}.jpg", jpeg())
    rows = "".join(f"{i:02d},{'common' if i < 57 else f'rare{i}'}\n" for i in range(60))
    put(empty, "train.csv", "id,kind\n" + rows)
    put(empty, "sample_submission.csv", "id,kind\n" + "".join(f"t{i},rare57\n" for i in range(9)))
    found = infer_schema.infer(empty / "data" / "raw")
    assert found.train.captions == ["common"] * 45 + ["rare57", "rare58", "rare59"]
    assert found.train.paths[-1] == "train/59.jpg" and found.test.paths[0] == "test/t0.jpg"


def test_a_folder_without_a_sample_submission_is_an_error(empty: Path) -> None:
    put(empty, "notes.txt", "hello")
    with pytest.raises(UserError, check=lambda error: error.code == "sample-missing"):
        inspect.inspect()


@pytest.mark.parametrize("mark", [",", ";"])
def test_a_sample_with_an_index_column_another_separator_and_repeated_ids(empty: Path, mark: str) -> None:
    for i in range(30):
        put(empty, f"{'test' if i > 24 else 'train'}/{i}.jpg", jpeg())
    lines = [f"{n},{i},a" for n, i in enumerate([25, 26, 27, 28, 29, 25])]
    put(empty, "sample_submission.csv", "\n".join([",Id,kind", *lines, ""]).replace(",", mark))
    put(empty, "train.csv", ",id,kind\n" + "".join(f"{i},{i},{'abc'[i % 3]}\n" for i in range(25)))
    table = inspected(empty)
    competition = config(experiment="base").competition
    assert (competition.id, competition.test.id, competition.target, competition.metadata) == (
        "id",
        "Id",
        ["kind"],
        [],
    )
    assert table.frame["row"].tolist()[25:] == ["25", "26", "27", "28", "29"]
    assert not check.run(config(experiment="base"))
