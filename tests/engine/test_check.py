"""comp check: all faults of tables, images and declaration at once, before a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import config
from PIL import Image
from test_layouts import declare, image, prepared, put
from test_prepare import lay
from test_submission import scored
from test_submission_forms import prediction_set
from test_submission_forms import submission_lines as submitted

from comp import competition
from comp.engine import cli
from comp.engine.bank import bank
from comp.engine.data import image_reader, make_folds, prepare, samples
from comp.engine.deliver.submission_format import TASKS_OF_FORM
from comp.engine.errors import UserError
from comp.engine.extras import check
from comp.engine.readers.arrays import DamagedImage
from comp.engine.tasks.kinds import TASKS

# --- comp check ---------------------------------------------------------------------------------------------


def checked(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    capsys.readouterr()
    faults = [fault.line for fault in check.run(config(experiment="base"))]
    return faults, capsys.readouterr().out.splitlines()


def test_nothing_is_wrong_with_the_practice_competition(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults, printed = checked(capsys)
    assert faults == []
    assert "1797 images listed, 1797 found, 0 damaged" in printed
    assert any(line.startswith("hint: half of the images are 32 px") for line in printed)
    assert printed[-2:] == ["0 errors", "next: comp train exp001"]
    (project / "data" / "folds.parquet").unlink()
    assert checked(capsys)[1][-1] == "next: comp folds"


def test_every_fault_of_images_and_sample_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = project / "data" / "raw"
    train = pd.read_csv(raw / "train.csv", dtype=str)["id"].tolist()
    test = pd.read_csv(raw / "test.csv", dtype=str)["id"].tolist()
    good = (raw / "train" / f"{train[0]}.png").read_bytes()

    def line(table: list[str], id_: str) -> int:
        return table.index(id_) + 2

    (raw / "train" / f"{train[1]}.png").unlink()
    (raw / "train" / f"{train[2]}.png").write_bytes(good[: len(good) // 2])
    (raw / "train" / f"{train[3]}.png").write_bytes(b"")
    (raw / "train" / f"{train[4]}.png").write_bytes(b"<html>not found</html>")
    (raw / "test" / f"{test[5]}.png").write_bytes(good[:-20])
    (raw / "test" / "stranger.png").write_bytes(good)
    sample = (raw / "sample_submission.csv").read_text().splitlines()
    sample[1], sample[2] = "99999,0", sample[3]
    (raw / "sample_submission.csv").write_text("\n".join(sample) + "\n")

    faults, printed = checked(capsys)
    wanted = {
        f"train.csv:{line(train, train[1])}: image train/{train[1]}.png: no such file",
        f"train.csv:{line(train, train[2])}: image train/{train[2]}.png: ",
        f"train.csv:{line(train, train[3])}: image train/{train[3]}.png: empty",
        f"train.csv:{line(train, train[4])}: image train/{train[4]}.png: ",
        f"test.csv:{line(test, test[5])}: image test/{test[5]}.png: ",
        "sample_submission.csv:2: the id '99999' is not among the test rows",
        f"test.csv:2: the test row {test[0]!r} is not in data/raw/sample_submission.csv",
        f"test.csv:3: the test row {test[1]!r} is not in data/raw/sample_submission.csv",
    }
    assert len(faults) == len(wanted)
    for part in wanted:
        assert any(part in fault for fault in faults), part
    assert printed[-1] == f"{len(wanted)} errors"
    assert any(line.startswith("note: ") and f"like {test[2]!r} in lines 3, 4" in line for line in printed)
    assert (
        "note: 1 more files in test, like test/stranger.png, are listed by no test row and not used"
        in printed
    )
    assert (project / "data" / "check.txt").read_text().splitlines()[-len(faults) :] == faults


def test_images_are_opened_once(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    image = image_reader.ImageReader.image

    def counting(self: image_reader.ImageReader, name: str, data: bytes | None = None) -> Any:
        opened.append(name)
        return image(self, name, data)

    monkeypatch.setattr(image_reader.ImageReader, "image", counting)
    assert checked(capsys)[0] == [] and len(opened) == 1797
    assert checked(capsys)[0] == [] and len(opened) == 1797

    file = project / "data/raw/train/00000.png"
    file.write_bytes(file.read_bytes()[:-30])  # another size
    assert len(checked(capsys)[0]) == 1 and opened[1797:] == ["train/00000.png"]
    assert len(checked(capsys)[0]) == 1 and len(opened) == 1798, "a damaged image is remembered too"

    other = project / "data/raw/train/00002.png"
    status = other.stat()
    other.write_bytes(b"\0" * status.st_size)  # another mtime
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(checked(capsys)[0]) == 2 and opened[1798:] == ["train/00002.png"]

    memory = next((project / "data/checked").glob("*.parquet"))
    memory.write_bytes(memory.read_bytes()[:-1] + b"!")
    assert len(checked(capsys)[0]) == 2 and len(opened) == 1799 + 1797, "a damaged memory is not believed"


def test_a_repeated_row_is_an_error_and_no_shared_image(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project / "data/raw/train.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[1]]) + "\n")
    capsys.readouterr()
    (fault,) = check.run(config(experiment="base"))
    assert fault.code == "id-repeated" and fault.where == f"data/raw/train.csv:{len(lines) + 1}"
    assert "gather: true" in fault.remedy and "share an image file" not in capsys.readouterr().out


def test_a_wrong_template_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "configs/competition.yaml"
    file.write_text(file.read_text().replace("train/{id}.png", "train/{id}.jpg"))
    faults, _ = checked(capsys)
    (fault,) = faults
    line = file.read_text().splitlines().index('train: {table: train.csv, image: "train/{id}.jpg"}') + 1
    assert fault.startswith(f"configs/competition.yaml:{line}: train.image: none of 1437 files exists")
    assert "train/00000.jpg" in fault and "did you mean t" in fault


def test_check_lists_what_competition_py_defines(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_image(row: dict[str, Any], decode: Callable[..., Any]) -> Any:
        if row["image"] == "train/00003.png":
            raise DamagedImage(row["image"], "not an image")
        return decode(row["image"])

    monkeypatch.setattr(competition, "load_image", load_image, raising=False)
    monkeypatch.setattr(
        image_reader.ImageReader, "key", "test"
    )  # the source of a hook within a test is not the module's
    faults, printed = checked(capsys)
    assert "comp/competition.py defines load_image" in printed
    assert faults == ["data/raw/train.csv:4: image train/00003.png: not an image"]


def test_check_reads_the_declaration(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "configs/competition.yaml"
    text = file.read_text()
    for metric, line in {
        "acuracy": "accuracy",
        "rmse": "rmse is not defined for the task multiclass",
        "metric": "defines no function named metric",
    }.items():
        file.write_text(text.replace("metric: accuracy", f"metric: {metric}"))
        (fault,) = checked(capsys)[0]
        assert line in fault
        number = next(i for i, each in enumerate(text.splitlines(), 1) if each.startswith("metric:"))
        assert fault.startswith(f"configs/competition.yaml:{number}: metric: ")


def test_check_compares_the_sample_with_the_classes(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    form = {"sample": "sample.csv", "form": "probabilities"}
    lay(
        empty,
        "id,rust,scab\na,0,1\nb,1,0\n",
        sample="id,rust,scap\n9,0,0\n",
        target=["rust", "scab"],
        submission=form,
    )
    faults = [fault for fault in checked(capsys)[0] if "sample.csv" in fault]
    assert faults == [
        "data/raw/sample.csv:1: scap: nothing is predicted for this column; did you mean 'scab'?",
        "data/raw/sample.csv:1: no column for the class 'scab'",
    ]


def test_check_notes_changed_tables(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "data/raw/train.csv"
    file.write_text(file.read_text().replace("bold", "heavy", 1))
    faults, printed = checked(capsys)
    assert faults == [] and "note: data/samples.parquet differs from the tables; run comp prepare" in printed


def test_the_hash_of_samples_is_of_their_content_not_of_the_file(project: Path) -> None:
    """Another pyarrow writes other bytes; runs, folds and blends must not turn stale for that."""
    table = samples.load()
    assert len(table.frame.columns) > 6
    assert table.hash == samples.content_hash(table.frame, table.heads)
    for column in table.frame.columns:
        changed = table.frame.copy()
        values = changed[column].to_numpy(object).copy()
        values[0] = ["else"] if column == "images" else "else" if isinstance(values[0], str) else 0.5
        changed[column] = pd.Series(values, changed.index).astype(changed[column].dtype)
        assert samples.content_hash(changed, table.heads) != table.hash, column


def test_prepare_says_when_folds_are_of_another_table(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project / "data/raw/train.csv"
    file.write_text(file.read_text().replace("bold", "heavy", 1))
    prepare.prepare(config(experiment="base"))
    assert "data/folds.parquet was made for the previous table" in capsys.readouterr().out
    with pytest.raises(UserError, match="the same ids with other values"):
        make_folds.make(config(experiment="base"), samples.load())


# --- errors that comp submit would raise --------------------------------------------------------------------

TEN = [f"c{i}" for i in range(10)]


def ten_classes(root: Path, form: str, sample: str, labels: list[str] = TEN, **changes: Any) -> None:
    for i in range(0 if (root / "data/raw/train").exists() else 20):
        put(root, f"train/{i}.png", image(10 * i))
    put(root, "train.csv", "id,label\n" + "".join(f"{i},{labels[i % len(labels)]}\n" for i in range(20)))
    put(root, "sample.csv", sample)
    put(root, "test.csv", "id\n18\n19\n")
    test = {"table": "test.csv", "image": "train/{id}.png"}
    declare(root, **{"test": test, "submission": {"sample": "sample.csv", "form": form}} | changes)


def test_an_unfit_form_is_reported_before_training(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ten_classes(empty, "probability", "id,label\n18,0\n19,0\n")
    assert cli.main(["check"]) == 2
    printed = capsys.readouterr().out
    assert (
        "competition.submission.form: the multiclass target 'label'" in printed
        and "cannot be written as probability" in printed
    )
    assert printed.endswith("1 error\n")


SAMPLES = {  # what a host that wants this form asks for
    "probabilities": {"multiclass": TEN, "retrieval": TEN, "multilabel": TEN, "binary": ["c0", "c1"]},
}
LABELS = {
    "binary": TEN[:2],
    "regression": ["1.5", "2", "4"],
    "ordinal": ["0", "1", "2"],
    "multilabel": ["c0 c1", *TEN[1:]],
}


@pytest.mark.parametrize("task", list(TASKS))
def test_check_and_submit_report_the_same_for_every_form(
    empty: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written from random predictions after a training, or refused: comp check has said so before."""
    draw, fine, stands = np.random.default_rng(0), [], ""
    scheme = {"scheme": "quantiles" if task == "regression" else "stratified", "k": 2, "seed": 0}
    for form in TASKS_OF_FORM:
        columns = SAMPLES.get(form, {}).get(task, ["label"])
        lines = [["id", *columns], *([each, *["0"] * len(columns)] for each in ("18", "19"))]
        sample = "".join(",".join(line) + "\n" for line in lines)
        metric = TASKS[task].metric
        ten_classes(empty, form, sample, LABELS.get(task, TEN), task=task, metric=metric, folds=scheme)
        table = prepared()
        reported = [fault.line for fault in check.run(config(experiment="base"))]
        if table.hash != stands:
            (empty / "data/folds.parquet").unlink(missing_ok=True)
            make_folds.make(config(experiment="base"), table)
            heads = {head.name: draw.normal(size=(2, len(head.outputs))) for head in table.heads}
            if TASKS[task].space == "value":
                heads = {name: np.clip(values, 0, 2) for name, values in heads.items()}
            bank.write(bank.folder("exp001") / "test.arrow", prediction_set(table, "test", heads))
            scored("exp001", {})
            stands = table.hash
        try:
            submitted()
        except UserError as error:
            assert reported and error.lines[0] in reported, form
        else:
            assert reported == [], form
            fine.append(form)
    assert fine == [form for form, tasks in TASKS_OF_FORM.items() if task in tasks]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("form", "sample", "changes", "part"),
    [
        ("value", "id,label\n18,0\n19,0\n", {"task": "regression", "metric": "rmse", "submission": {"sample": "sample.csv", "form": "value", "range": [50, 60]}}, "far outside the range"),
        ("labels", "id,label\n18,c0\n19,c0\n", {"task": "multilabel", "metric": "f1_micro", "separator": ","}, "class '0.5 0' contains one"),
        ("probabilities", "id,c0\n18,0\n19,0\n", {"submission": {"sample": "sample.csv", "form": "probabilities", "sums_to_one": True}, "classes": ["c0", "c1"]}, "no column for the class 'c1'"),
    ],
)  # fmt: skip
def test_other_errors_of_submit(
    empty: Path, form: str, sample: str, changes: dict[str, Any], part: str
) -> None:
    labels = (
        ["0.5 0", "1,0.5 0"] if form == "labels" else ["0.5", "1", "2"] if form == "value" else ["c0", "c1"]
    )
    ten_classes(empty, form, sample, [f'"{label}"' for label in labels], **changes)
    assert any(part in fault.line for fault in check.run(config(experiment="base")))


def test_functions_of_your_own_write_a_made_up_submission_too(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten_classes(empty, "label", "id,label\n18,0\n19,0\n")

    def write_submission(rows: pd.DataFrame, prediction: Any, sample: pd.DataFrame) -> pd.DataFrame:
        return sample.assign(label=[str(row["meta.age"]) for row in rows.to_dict("records")])

    monkeypatch.setattr(competition, "write_submission", write_submission, raising=False)
    (fault,) = check.run(config(experiment="base"))
    assert (
        fault.line.startswith("comp/competition.py:")
        and "write_submission" in fault.line
        and "'meta.age'" in fault.line
    )
    monkeypatch.setattr(
        competition, "write_submission", lambda rows, prediction, sample: sample.assign(label="c99")
    )
    (fault,) = check.run(config(experiment="base"))
    assert "made-up predictions:2: row '18', column 'label': 'c99'" in fault.line


# --- as an experiment decodes -------------------------------------------------------------------------------


def test_check_decodes_as_the_experiment_says(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [Image.fromarray(np.full((16, 16), 10 * i, np.uint8)) for i in range(6)]
    for name in ("0", "1", "18", "19"):
        file = empty / "data/raw/train" / f"{name}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(file, save_all=True, append_images=pages[1:])
    put(empty, "train.csv", "id,label\n0,a\n1,b\n")
    put(empty, "sample.csv", "id,label\n18,a\n19,a\n")
    where = {"image": "train/{id}.tif"}
    declare(empty, train={"table": "train.csv"} | where, test={"table": "sample.csv"} | where)
    assert cli.main(["check", "exp001", "data.channels=5"]) == 2
    assert "data/raw/train.csv:2: image train/0.tif: " in capsys.readouterr().out
    file = empty / "configs/exp001.yaml"
    file.write_text(file.read_text().replace("{size: 16}", "{size: 16, channels: 6}"))
    assert cli.main(["check", "exp001"]) == 0
    # A line of pixels, its shorter side brought to data.size, is more than fits: by cover alone.
    Image.new("L", (20_000, 1)).save(empty / "data/raw/train/0.tif")
    small = ["data.channels=1", "data.size=512"]
    assert cli.main(["check", "exp001", *small]) == 0
    capsys.readouterr()
    assert cli.main(["check", "exp001", *small, "data.resize=cover"]) == 2
    assert "data/raw/train.csv:2: image train/0.tif: " in capsys.readouterr().out
