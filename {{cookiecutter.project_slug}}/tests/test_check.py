"""comp check: every fault of tables, pictures and declaration at once, before a run meets it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import config
from test_prepare import lay

from comp import competition, samples
from comp.config import Refused
from comp.prepare import assign, check, making, tables
from comp.prepare.images import Damaged

# --- comp check ----------------------------------------------------------------------------------------------------------


def checked(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    capsys.readouterr()
    faults = check.check(config(experiment="base"))
    return faults, capsys.readouterr().out.splitlines()


def test_nothing_is_wrong_with_the_practice_competition(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults, printed = checked(capsys)
    assert faults == []
    assert "1797 images listed, 1797 found, 0 damaged" in printed
    assert any(line.startswith("hint: half of the images are 32 px") for line in printed)
    assert printed[-2:] == ["0 faults", "next: comp folds"]


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
        f"sample_submission.csv:4: the id {test[2]!r} stands there twice",
        f"test.csv:2: the test row {test[0]!r} is not in data/raw/sample_submission.csv",
        f"test.csv:3: the test row {test[1]!r} is not in data/raw/sample_submission.csv",
    }
    assert len(faults) == len(wanted)
    for part in wanted:
        assert any(part in fault for fault in faults), part
    assert printed[-1] == f"{len(wanted)} faults"
    assert (
        "note: 1 more files in test are listed by no test row, like test/stranger.png; they are left out"
        in printed
    )
    assert (project / "data" / "check.txt").read_text().splitlines()[-len(faults) :] == faults


def test_images_are_opened_once(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    picture = making.Making.picture

    def counting(self: making.Making, name: str, data: bytes | None = None) -> Any:
        opened.append(name)
        return picture(self, name, data)

    monkeypatch.setattr(making.Making, "picture", counting)
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


def test_a_wrong_template_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "configs/competition.yaml"
    file.write_text(file.read_text().replace("train/{id}.png", "train/{id}.jpg"))
    faults, _ = checked(capsys)
    assert faults == [
        "configs/competition.yaml: train.image: none of 1437 files exists, like train/00000.jpg; the nearest there is test/00001.png"
    ] or (len(faults) == 1 and "none of 1437 files exists, like train/00000.jpg" in faults[0])


def test_check_lists_what_is_in_force(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_image(row: dict[str, Any], decode: Callable[..., Any]) -> Any:
        if row["image"] == "train/00003.png":
            raise Damaged(row["image"], "nobody likes it")
        return decode(row["image"])

    monkeypatch.setattr(competition, "load_image", load_image, raising=False)
    monkeypatch.setattr(
        making.Making, "key", "test"
    )  # the source of a hook within a test is not the module's
    faults, printed = checked(capsys)
    assert "comp/competition.py: load_image in force" in printed
    assert faults == ["data/raw/train.csv:4: image train/00003.png: nobody likes it"]


def test_check_reads_the_declaration(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "configs/competition.yaml"
    text = file.read_text()
    for metric, line in {
        "acuracy": "nearest: accuracy",
        "rmse": "rmse does not fit task: multiclass",
        "metric": "wants a function",
    }.items():
        file.write_text(text.replace("metric: accuracy", f"metric: {metric}"))
        (fault,) = checked(capsys)[0]
        assert line in fault


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
        "data/raw/sample.csv:1: the column 'scap' is nothing that is predicted, the nearest is 'scab'",
        "data/raw/sample.csv:1: no column for the class 'scab'",
    ]


def test_check_sees_tables_that_moved_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "data/raw/train.csv"
    file.write_text(file.read_text().replace("bold", "heavy", 1))
    faults, printed = checked(capsys)
    assert (
        faults == [] and "note: data/samples.parquet is not what the tables say now: comp prepare" in printed
    )


def test_the_hash_of_samples_is_of_what_they_say_not_of_the_bytes(project: Path) -> None:
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
    tables.prepare(config(experiment="base"))
    assert "data/folds.parquet was made for the table as it was before" in capsys.readouterr().out
    with pytest.raises(Refused, match="the same ids, other values"):
        assign.make(config(experiment="base"), samples.load())
