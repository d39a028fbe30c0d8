"""The practice competition: the same bytes every time, whole writers as test set, hidden labels that only
score reads."""

from __future__ import annotations

import csv
import hashlib
import itertools
from pathlib import Path

import pytest

from comp.engine.errors import UserError
from comp.engine.extras import practice
from comp.engine.store import artifacts, paths


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def fingerprint(folder: Path) -> str:
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            hashed.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()


def submit(labels: dict[str, str], header: str = "id,label") -> None:
    artifacts.write_text(
        paths.submission_file("trial"), "\n".join([header, *(f"{i},{v}" for i, v in labels.items())]) + "\n"
    )


def answers() -> dict[str, str]:
    return {row["id"]: row["label"] for row in rows(paths.path("data", "answers", "solution.csv"))}


def test_the_files_are_those_of_a_kaggle_download(project: Path) -> None:
    raw = project / "data" / "raw"
    train, test, sample = (rows(raw / f"{name}.csv") for name in ("train", "test", "sample_submission"))
    assert len(train) + len(test) == 1797
    assert list(train[0]) == ["id", "label", "writer", "pen"]
    assert [row["id"] for row in test] == [row["id"] for row in sample]
    assert "label" not in test[0] and "writer" not in test[0]
    assert sorted(p.stem for p in (raw / "train").iterdir()) == [row["id"] for row in train]
    assert sorted(p.stem for p in (raw / "test").iterdir()) == [row["id"] for row in test]
    assert {row["pen"] for row in train} == {row["pen"] for row in test} == set(practice.PENS)


def test_ids_keep_zeros_and_are_independent_of_writer_and_label(project: Path) -> None:
    train = rows(project / "data" / "raw" / "train.csv")
    assert any(row["id"].startswith("0") for row in train)
    for column in ("label", "writer"):
        values = [row[column] for row in train]
        same = sum(a == b for a, b in itertools.pairwise(values)) / len(values)
        assert same < 2 / len(set(values)), f"neighbouring ids share their {column}"


def test_the_test_set_is_whole_writers(project: Path) -> None:
    assert len(
        {row["writer"] for row in rows(project / "data" / "raw" / "train.csv")}
    ) == practice.WRITERS - len(practice.HIDDEN_WRITERS)


def test_same_bytes_again(project: Path) -> None:
    before = fingerprint(project / "data")
    (project / "data" / "raw" / "train" / "torn.png").write_bytes(b"")
    (project / "data" / "raw" / "train" / "torn.png").unlink()
    practice.make(project / "data" / "raw")
    assert fingerprint(project / "data") == before


def test_another_competition_is_not_overwritten(empty: Path) -> None:
    (empty / "data" / "raw").mkdir(parents=True)
    (empty / "data" / "raw" / "train.csv").write_text("mine")
    with pytest.raises(UserError, match="another competition"):
        practice.make(empty / "data" / "raw")
    assert (empty / "data" / "raw" / "train.csv").read_text() == "mine"


def test_the_host_scores(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = answers()
    submit(truth)
    assert practice.score("trial") == 1.0
    wrong = dict(truth)
    for id_ in list(wrong)[:36]:
        wrong[id_] = str((int(wrong[id_]) + 1) % 10)
    submit(wrong)
    assert practice.score("trial") == pytest.approx(1 - 36 / len(truth))
    assert f"accuracy {1 - 36 / len(truth):.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["lost", "extra", "twice", "zeros", "header", "none"])
def test_the_host_refuses(project: Path, damage: str) -> None:
    truth = answers()
    first = next(iter(truth))
    if damage == "lost":
        truth.pop(first)
    if damage == "extra":
        truth["99999"] = "0"
    if damage == "zeros":
        truth = {id_.lstrip("0"): label for id_, label in truth.items()}
    submit(truth, "id,digit" if damage == "header" else "id,label")
    if damage == "twice":
        file = paths.submission_file("trial")
        file.write_text(file.read_text() + f"{first},0\n")
    if damage == "none":
        paths.submission_file("trial").unlink()
    with pytest.raises(UserError, match=r"submissions/trial\.csv"):
        practice.score("trial")
