"""load_image of competition.py gets columns that competition.yaml declares, for example to crop one file."""

from __future__ import annotations

import io
import json
import linecache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config
from PIL import Image
from test_layouts import declare, error_line, opened, prepared, put

from comp import competition
from comp.engine.bank import bank
from comp.engine.data import cache, folds, image_key, image_reader, make_folds, raw_tables
from comp.engine.errors import UserError
from comp.engine.extras import check
from comp.engine.store import paths

README = (Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}" / "README.md").read_text()
CROP = "def load_image" + README.partition("def load_image")[2].partition("```")[0]  # what people copy
BOX = ["x", "y", "w", "h"]
IN_TRAIN = {"table": "train.csv", "image": "slides/{slide}.png"}
IN_TEST = {"table": "test.csv", "image": "slides/{slide}.png"}


def in_force(patch: pytest.MonkeyPatch, code: str) -> None:
    """This load_image in competition.py; its source can be read, as that of a file can."""
    space: dict[str, Any] = {"__name__": competition.__name__}
    name = f"<competition {len(linecache.cache)}>"
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    exec(compile(code, name, "exec"), space)
    patch.setattr(competition, "load_image", space["load_image"], raising=False)


def slides(root: Path, number: int = 6) -> None:
    """Slides of two halves; the label of a row is the colour of its half, which only the box determines."""
    for i in range(number):
        whole = np.zeros((20, 40, 3), np.uint8)
        whole[:, :20] = (200 + i, 0, 0)
        whole[:, 20:] = (0, 200 + i, 0)
        out = io.BytesIO()
        Image.fromarray(whole).save(out, "PNG")
        put(root, f"slides/{i}.png", out.getvalue())
    lines = [f"{i}{side},{i},{20 * (side == 'r')},0,20,20" for i in range(number) for side in "lr"]
    train, test = lines[:-2], lines[-2:]
    put(root, "train.csv", "id,slide,x,y,w,h,label\n" + "".join(f"{each},{'red' if 'l,' in each else 'green'}\n" for each in train))  # fmt: skip
    put(root, "test.csv", "id,slide,x,y,w,h\n" + "\n".join(test) + "\n")
    put(root, "sample.csv", f"id,label\n{number - 1}l,red\n{number - 1}r,red\n")
    declare(root, train=IN_TRAIN, test=IN_TEST, image_columns=BOX)


# --- keys ---------------------------------------------------------------------------------------------------


def test_a_key_gives_back_its_files_and_its_row() -> None:
    row = {"x": "3", "name": 'a///"ü"+{}', "page": None}
    for files in (["a.png"], ["red/a+b.png", "green/ü {1}.png"]):
        key = image_key.joined(files)
        assert (image_key.files(key), image_key.row(key)) == (files, {})
        with_row = image_key.with_row(key, row)
        assert (image_key.files(with_row), image_key.row(with_row)) == (files, row)
        assert image_key.paths(with_row) == key
    assert image_key.joined(["train/a+b.png"]) == "train/a+b.png", "a plain path is its own key"


def test_a_plus_separates_files_if_both_sides_have_a_column() -> None:
    assert raw_tables.channels("{id}_r.png+{id}_g.png") == ["{id}_r.png", "{id}_g.png"]
    assert raw_tables.channels("v1+v2/{id}.png") == ["v1+v2/{id}.png"]
    assert raw_tables.channels("{a+b}.png") == ["{a+b}.png"]


# --- crops --------------------------------------------------------------------------------------------------


def test_two_rows_that_crop_one_file_are_two_images_of_the_cache(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slides(empty)
    in_force(monkeypatch, CROP)
    table = prepared()
    keys = [each[0] for each in table.frame["images"]]
    assert len(set(keys)) == 12 and {image_key.paths(key) for key in keys} == {
        f"slides/{i}.png" for i in range(6)
    }
    read = opened(table)
    assert (
        isinstance(read, cache.CachedImages) and len(set(read.rows.tolist())) == 12 and (read.rows >= 0).all()
    )
    direct = image_reader.from_config(config())
    for at, key in enumerate(keys):
        left = at % 2 == 0
        assert (
            read[at].shape == (16, 16, 3)
            and (read[at] == [(200 + at // 2) * left, (200 + at // 2) * (not left), 0]).all()
        )
        assert np.array_equal(read[at], direct.image(key))
    # Another box in the table is another image; the others stay as they are.
    put(
        empty,
        "test.csv",
        (empty / "data/raw/test.csv").read_text().replace("5r,5,20,0,20,20", "5r,5,0,0,9,9"),
    )
    capsys.readouterr()
    again = opened(prepared())
    assert ": 1 images of 16 px" in capsys.readouterr().out and again[11].argmax(axis=2).max() == 0
    assert not check.run(config(experiment="base"))


def test_all_is_the_whole_row_without_its_targets(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides(empty)
    declare(empty, train=IN_TRAIN, test=IN_TEST, image_columns="all")
    in_force(monkeypatch, CROP)
    table = prepared()
    rows = [image_key.row(each[0]) for each in table.frame["images"]]
    assert all(set(row) == {"id", "slide", *BOX} for row in rows)
    assert [row["x"] for row in rows] == ["0", "20"] * 6
    read = opened(table)
    assert [int(read[at].reshape(-1, 3).mean(axis=0).argmax()) for at in range(12)] == [0, 1] * 6


def test_without_load_image_nothing_changes_in_the_keys(empty: Path) -> None:
    slides(empty)
    declare(empty, train=IN_TRAIN, test=IN_TEST)
    assert [each.tolist() for each in prepared().frame["images"]][:3] == [
        ["slides/0.png"],
        ["slides/0.png"],
        ["slides/1.png"],
    ]


def test_load_image_gets_only_declared_columns(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides(empty)
    line = error_line()
    assert line.startswith("configs/competition.yaml:") and ": image_columns: " in line
    assert "load_image(row, decode)" in line
    in_force(monkeypatch, CROP)
    declare(empty, train=IN_TRAIN, test=IN_TEST)
    table = prepared()
    with pytest.raises(UserError) as caught:
        opened(table)
    (line,) = caught.value.lines
    assert (
        line.startswith("comp/competition.py:3: ") and "slides/0.png" in line and "image_columns: [x]" in line
    )
    declare(empty, train=IN_TRAIN, test=IN_TEST, image_columns=["x", "depth"])
    assert "image_columns: data/raw/train.csv:1 has no column 'depth'" in error_line()
    for wrong in ("label", "file"):
        declare(empty, train=IN_TRAIN, test=IN_TEST, image_columns=[wrong])
        assert "image_columns" in error_line() and "competition.yaml" in error_line()


def test_an_empty_crop_is_a_damaged_image_with_its_row(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides(empty)
    in_force(monkeypatch, CROP)
    file = empty / "data/raw/train.csv"
    file.write_text(file.read_text().replace("1l,1,0,0,20,20", "1l,1,0,0,0,20"))
    (fault,) = check.run(config(experiment="base"))
    assert (fault.code, fault.where) == ("image-damaged", "data/raw/train.csv:4")
    assert fault.what.startswith("image slides/1.png (x=0, y=0, w=0, h=20): ")


def test_rows_gathered_into_one_sample_keep_a_crop_each(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides(empty)
    in_force(monkeypatch, CROP)
    declare(
        empty,
        train=IN_TRAIN,
        test=IN_TEST,
        image_columns=BOX,
        gather=True,
        id="slide",
        target="slide",
        task="multiclass",
    )
    put(empty, "sample.csv", "slide,label\n5,0\n")
    sample = prepared().frame.iloc[0]
    assert [image_key.row(key)["x"] for key in sample["images"]] == ["0", "20"]


def test_crops_from_prepare_to_the_kernel(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp.engine.deliver import dry_run, kernel, kernel_inputs, kernel_models, kernel_predict, wheels
    from comp.engine.run import runner

    slides(empty)
    in_force(monkeypatch, CROP)
    table = prepared()
    make_folds.make(config(), table)
    runner.train("exp001", [])
    split = folds.load(table)
    stored = bank.load("exp001", "test", table, split)
    left, right = stored.heads["label"]
    assert np.abs(left - right).max() > 1e-3, "two rows of one file, and two predictions"
    submitted = dry_run.write("exp001").read_bytes()
    monkeypatch.setattr(wheels, "of_imports", list)
    bundle = kernel.build("exp001") / "bundle"
    about = json.loads((bundle / "bundle.json").read_text())
    monkeypatch.setenv("COMP_ROOT", str(bundle))
    paths.root.cache_clear()
    base = config(experiment="base")
    home = base.competition.model_copy(update={"raw": str(empty / "data/raw")})
    at_home = base.model_copy(update={"competition": home})
    hidden = kernel_inputs.test_rows(
        at_home, tuple(map(kernel_inputs.head_of, about["heads"])), about["multi_image"]
    )
    predicted, damaged, _ = kernel_models.predict_runs(about, home, hidden, hidden.positions("test"))
    assert not damaged and predicted["exp001"]["label"] == pytest.approx(stored.heads["label"], abs=1e-5)
    assert (
        kernel_predict.write(at_home, hidden, "exp001", predicted["exp001"], bundle / "working").read_bytes()
        == submitted
    )


# --- a plus in a name ---------------------------------------------------------------------------------------


def test_a_plus_in_the_name_of_a_file_is_part_of_it(empty: Path) -> None:
    for name, level in {
        "a.png+b": 10,
        "a": 90,
        "b": 90,
        "x+1_r": 20,
        "x+1_g": 30,
        "y_r": 40,
        "y_g": 50,
    }.items():
        grey = io.BytesIO()
        Image.new("L", (20, 16), level).save(grey, "PNG")
        put(empty, f"train/{name}.png", grey.getvalue())
    put(empty, "train.csv", "id,label\na.png+b,u\na,v\nb,v\n")
    put(empty, "sample.csv", "id,label\na.png+b,u\n")
    declare(empty, test={"table": "sample.csv", "image": "train/{id}.png"})
    table = prepared()
    read = opened(table)
    assert [int(read[i][0, 0, 0]) for i in (0, 1)] == [10, 90]
    assert check.run(config(experiment="base")) == []
    # The + of the declaration parts files, that of the row's own id does not.
    put(empty, "train.csv", "id,label\nx+1,u\ny,v\n")
    put(empty, "sample.csv", "id,label\nx+1,u\n")
    both = "train/{id}_r.png+train/{id}_g.png"
    declare(empty, train={"table": "train.csv", "image": both}, test={"table": "sample.csv", "image": both})
    table = prepared()
    reader = image_reader.from_config(config("data.channels=2"))
    assert reader.image(table.frame["images"].iloc[0][0])[0, 0].tolist() == [20, 30]
    assert image_key.files(table.frame["images"].iloc[0][0]) == ["train/x+1_r.png", "train/x+1_g.png"]
    (empty / "data/raw/train/y_g.png").unlink()
    faults = check.run(config(experiment="base"))
    missing = [fault.what for fault in faults if fault.where == "data/raw/train.csv:3"]
    assert missing == ["image train/y_r.png + train/y_g.png: no such file"]


def test_several_images_of_an_archive_are_channels_too(empty: Path) -> None:
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        for name in ("1+2_r", "1+2_g"):
            grey = io.BytesIO()
            Image.new("L", (16, 16), 100 if name.endswith("g") else 0).save(grey, "PNG")
            zipped.writestr(f"{name}.png", grey.getvalue())
    put(empty, "train.zip", out.getvalue())
    put(empty, "train.csv", "id,label\n1+2,u\n1+2b,v\n")
    put(empty, "sample.csv", "id,label\n1+2,u\n")
    both = "train.zip/{id}_r.png+train.zip/{id}_g.png"
    declare(empty, train={"table": "train.csv", "image": both}, test={"table": "sample.csv", "image": both})
    key = prepared().frame["images"].iloc[0][0]
    assert image_reader.from_config(config("data.channels=2")).image(key)[0, 0].tolist() == [0, 100]
