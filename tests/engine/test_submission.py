"""Submission files: columns, order, ids and values for every form. Damaged files are in
test_submission_damage.py."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from conftest import config

from comp import competition, submission
from comp.engine.bank import bank
from comp.engine.bank import predictions as predictions_of
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.samples import Samples
from comp.engine.deliver import dry_run
from comp.engine.deliver.validate import validate_file
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

IDS = ["0012", "0007", "a_3", "0100", "b-5.x", "1.2.840", "00a", "9"]
DOGS = ("0012", "borzoi", "Saint, Bernard")
HEADS = {
    "probability": Head("target", "binary", ("target",), ("target.target",), ("benign", "malignant")),
    "probabilities": Head("breed", "multiclass", DOGS, ("target.breed",), DOGS),
    "label": Head("breed", "multiclass", DOGS, ("target.breed",), DOGS),
    "value": Head("score", "regression", ("score",), ("target.score",)),
}
COLUMNS = {"probability": ["target"], "probabilities": list(DOGS), "label": ["breed"], "value": ["score"]}
RANGES = {"probability": [0.0, 1.0], "probabilities": [0.0, 1.0], "label": None, "value": [1.0, 100.0]}


@dataclass
class Case:
    form: str
    cfg: Config
    table: Samples
    sample: Path

    def write(self, prediction: PredictionSet, name: str = "exp001") -> Path:
        if ":" not in name and not bank.folder(name).exists():
            scored(name, {})
        return submission.write(self.cfg, self.table, name, prediction)

    def validate(self, file: Path) -> None:
        rules = self.cfg.competition.submission
        classes = [each for head in self.table.heads for each in head.classes]
        assert isinstance(rules.form, str)
        validate_file(file, self.sample, rules.form, rules.range, rules.form == "probabilities", classes)


def lay_out(
    form: str,
    ids: list[str] = IDS,
    heads: tuple[Head, ...] = (),
    columns: list[str] | None = None,
    unlimited: bool = False,
    quoting: Literal[0, 1] = csv.QUOTE_MINIMAL,
    end: str = "\n",
    encoding: str = "utf-8",
    rows: list[str] | None = None,
    shuffle: bool = True,
) -> Case:
    """Samples on disk, in another order than the sample file. `rows` are the keys of the test samples, where
    several share one."""
    heads = heads or (HEADS[form],)
    keys = rows or (sorted(ids, reverse=True) if shuffle else ids)
    train = [f"train{i}" for i in range(3)]
    frame = pd.DataFrame({
        "id": train + [f"{key}#{i}" for i, key in enumerate(keys)], "row": train + keys, "weight": 1.0,
        "source": ["train"] * 3 + ["test"] * len(keys), "images": [["x.png"]] * (3 + len(keys)),
    })  # fmt: skip
    file = paths.path("data", "raw", "sample_submission.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = ["image_id", *(columns or COLUMNS[form])]
    with file.open("w", newline="", encoding=encoding) as opened:
        writer = csv.writer(opened, quoting=quoting, lineterminator=end)
        writer.writerows([columns, *([each] + [""] * (len(columns) - 1) for each in ids)])
    samples.save(frame, heads, sample=artifacts.sha256(file))
    overrides = [
        f"competition.task={heads[0].task}", f"competition.submission.form={form}", "competition.id=image_id",
        f"competition.submission.range={'null' if unlimited else RANGES[form] or 'null'}",
    ]  # fmt: skip
    return Case(form, config(*overrides, experiment="base"), samples.load(), file)


def scored(name: str, cuts: dict[str, list[float]]) -> None:
    """The parts of a run that a submission needs."""
    file = bank.folder(name) / "score.json"
    artifacts.write_json(file, {"cuts": cuts})
    artifacts.add_to_manifest(file)


def predictions(case: Case, seed: int = 0, spread: float = 3.0) -> PredictionSet:
    draw = np.random.default_rng(seed)
    rows = case.table.positions("test").astype(np.int32)
    draw.shuffle(rows)
    heads = {}
    for head in case.table.heads:
        values = draw.normal(scale=spread, size=(len(rows), len(head.outputs)))
        if head.spec.space == "value":
            values = np.clip(50 + 12 * values, 1, 100)
        heads[head.name] = values.astype(np.float32)
    return PredictionSet(rows, None, heads, {})


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        run()
    assert len(caught.value.lines) == 1 and "\n" not in caught.value.lines[0], caught.value.lines
    return caught.value.lines[0]


@pytest.fixture(params=list(HEADS))
def case(request: pytest.FixtureRequest, empty: Path) -> Case:
    return lay_out(request.param)


# --- what is written ----------------------------------------------------------------------------------------


def test_columns_order_and_ids_are_those_of_the_sample(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    file = case.write(predictions(case))
    assert file == paths.path("submissions", "exp001.csv")
    data = file.read_bytes()
    assert data.endswith(b"\n") and b"\r" not in data and not data.startswith(b"\xef\xbb\xbf")
    header, *rows = list(csv.reader(io.StringIO(data.decode())))
    assert header == ["image_id", *COLUMNS[case.form]]
    assert [row[0] for row in rows] == IDS
    entry = artifacts.manifest_entry(file)
    assert (
        entry is not None and entry["sample"] == artifacts.sha256(case.sample) and entry["form"] == case.form
    )
    last = capsys.readouterr().out.splitlines()
    assert (
        "submissions/exp001.csv" in last[-2]
        and "8 rows" in last[-2]
        and artifacts.sha256(file)[:12] in last[-2]
    )
    assert last[-1] == 'next: comp submit exp001 -m "…"'


def test_every_row_gets_its_own_prediction_in_full_precision(case: Case) -> None:
    prediction = predictions(case)
    head = case.table.heads[0]
    expected = head.spec.to_probability(prediction.heads[head.name].astype(np.float64))
    keys = case.table.frame["row"].to_numpy()[prediction.row]
    written = list(csv.reader(case.write(prediction).open()))[1:]
    for cells in written:
        mine = expected[list(keys).index(cells[0])]
        if case.form == "label":
            assert cells[1:] == [DOGS[mine.argmax()]]
        else:
            assert [float(cell) for cell in cells[1:]] == mine.tolist()  # the same float64, not a rounded one
            assert case.form != "probabilities" or abs(math.fsum(map(float, cells[1:])) - 1) < 1e-15


def test_fifty_valid_files_are_written_and_accepted(empty: Path) -> None:
    draw = np.random.default_rng(7)
    accepted = 0
    names = ["Ä ö", "x,y", 'say "hi"', "0", "007", "1e3", "c lass", "ß", "N-1", "nan", "no", "3.0"]
    for number in range(52):
        form = list(HEADS)[number % 4]
        kind = number // 4 % 3
        count = int(draw.integers(1, 40))
        ids = [[f"{i:05d}", f"{i}.jpg", f"dir/ü {i}, x"][kind] for i in draw.permutation(count)]
        chosen = tuple(draw.permutation(names)[: draw.integers(2, len(names))].tolist())
        head = HEADS[form]
        if head.classes and head.task == "multiclass":
            head = Head("breed", "multiclass", chosen, ("target.breed",), chosen)
        lay = lay_out(
            form, ids, (head,), list(reversed(chosen)) if form == "probabilities" else None,
            quoting=csv.QUOTE_ALL if number % 2 else csv.QUOTE_MINIMAL, end=["\n", "\r\n"][number // 2 % 2],
            encoding=["utf-8", "utf-8-sig"][number // 3 % 2],
        )  # fmt: skip
        file = lay.write(predictions(lay, number, spread=[0.01, 3, 60][number % 3]), f"s{number}")
        lay.validate(file)
        assert [row[0] for row in csv.reader(file.open(encoding="utf-8"))][1:] == ids
        accepted += 1
    assert accepted >= 50


def test_a_column_of_ints_and_one_of_text_keep_their_type(empty: Path) -> None:
    for classes in (("0", "1", "2"), ("0012", "012", "12"), ("True", "False", "1.0")):
        lay = lay_out(
            "label", heads=(Head("y", "multiclass", classes, ("target.y",), classes),), columns=["y"]
        )
        labels = [row[1] for row in csv.reader(lay.write(predictions(lay)).open())][1:]
        assert set(labels) <= set(classes) and len(set(labels)) > 1


def test_extreme_logits_stay_valid(empty: Path) -> None:
    for form in ("probability", "probabilities"):
        lay = lay_out(form)
        prediction = predictions(lay)
        head = lay.table.heads[0].name
        huge = prediction.heads[head]
        huge[:] = np.where(np.arange(huge.size) % 2, 3e4, -3e4).reshape(huge.shape)
        lay.write(prediction)


def test_predictions_of_one_row_are_averaged(empty: Path) -> None:
    lay = lay_out("probability", ["A_L", "A_R"], rows=["A_R", "A_L", "A_L", "A_R", "A_L"])
    prediction = predictions(lay)
    keys = lay.table.frame["row"].to_numpy()[prediction.row]
    p = 1 / (1 + np.exp(-prediction.heads["target"][:, 0].astype(np.float64)))
    written = {row[0]: float(row[1]) for row in list(csv.reader(lay.write(prediction).open()))[1:]}
    for key in ("A_L", "A_R"):
        assert written[key] == pytest.approx(p[keys == key].mean(), abs=1e-15)


def test_binary_columns_per_class(empty: Path) -> None:
    lay = lay_out("probabilities", heads=(HEADS["probability"],), columns=["malignant", "benign"])
    prediction = predictions(lay)
    best = lay.table.frame["row"].iloc[prediction.row[prediction.heads["target"][:, 0].argmax()]]
    row = next(row for row in csv.reader(lay.write(prediction).open()) if row[0] == best)
    assert float(row[1]) > 0.5 > float(row[2])


def test_binary_targets_in_the_order_of_the_samples_columns(empty: Path) -> None:
    heads = tuple(Head(n, "binary", (n,), (f"target.{n}",), ("0", "1")) for n in ("a", "b", "c"))
    lay = lay_out("probability", heads=heads, columns=["c", "a"])
    header, *rows = list(csv.reader(lay.write(predictions(lay)).open()))
    assert header == ["image_id", "c", "a"] and len(rows) == len(IDS)


def test_values_slightly_outside_the_range_are_clipped(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay = lay_out("value")
    prediction = predictions(lay)
    prediction.heads["score"][:2, 0] = [-3.0, 104.0]
    values = sorted(float(row[1]) for row in list(csv.reader(lay.write(prediction).open()))[1:])
    assert values[0] == 1.0 and values[-1] == 100.0
    assert "2 of 8 values" in capsys.readouterr().out
    prediction.heads["score"][3, 0] = 1000.0
    line = refusal(lambda: lay.write(prediction))
    assert "1000" in line and "'score'" in line


def test_ordinal_labels_use_the_cuts_of_the_cv(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grades = ("none", "mild", "severe")
    lay = lay_out(
        "label", heads=(Head("grade", "ordinal", ("grade",), ("target.grade",), grades),), columns=["y"]
    )
    prediction = predictions(lay)
    prediction.heads["grade"][:, 0] = [-1.0, 0.2, 0.25, 0.4, 0.9, 1.4, 1.75, 5.0]
    place = {key: i for i, key in enumerate(lay.table.frame["row"].iloc[prediction.row])}

    def written(name: str) -> list[str]:
        by_id = {row[0]: row[1] for row in list(csv.reader(lay.write(prediction, name).open()))[1:]}
        return [by_id[key] for key in place]

    scored("cut", {"grade": [0.25, 1.75]})
    assert written("cut") == ["none"] * 2 + ["mild"] * 4 + ["severe"] * 2
    assert "0.25, 1.75" in capsys.readouterr().out
    scored("rounded", {})  # the metric did not ask for grades
    assert written("rounded") == ["none"] * 4 + ["mild"] * 2 + ["severe"] * 2
    assert written("cut:full") == written("cut")  # the refit has no OOF rows of its own
    assert paths.submission_file("cut-full").exists()
    (bank.folder("cut") / "score.json").write_text('{"cuts": {"grade": [0.0, 0.1]}}')
    assert "score.json" in refusal(lambda: lay.write(prediction, "cut"))


def test_binary_labels_use_half_or_the_fitted_threshold(empty: Path) -> None:
    lay = lay_out("label", heads=(HEADS["probability"],), columns=["y"])
    prediction = predictions(lay)
    prediction.heads["target"][:, 0] = np.linspace(-2, 2, 8)
    for cuts, positive in (({}, 4), ({"target": [0.2]}, 6)):
        scored(f"s{positive}", cuts)
        labels = [row[1] for row in csv.reader(lay.write(prediction, f"s{positive}").open())][1:]
        assert labels.count("malignant") == positive and labels.count("benign") == 8 - positive


def test_dry_run_needs_only_a_name(empty: Path) -> None:
    """Predictions, samples, folds and competition.yaml are on disk."""
    file = paths.path("configs", "competition.yaml")
    lay = lay_out("label")
    file.write_text(file.read_text().replace("id: id", "id: image_id"))
    train = pd.DataFrame({"id": [f"train{i}" for i in range(3)], "repeat": 0, "fold": [0, 1, 0]})
    folds.save(
        train,
        {
            "scheme": "kfold",
            "k": 2,
            "repeats": 1,
            "seed": 0,
            "rule": "others",
            "gap": 0.0,
            "samples": lay.table.hash,
        },
    )
    split = folds.load(lay.table)
    whole = replace(
        predictions(lay), meta=predictions_of.build_meta("test", lay.table, split, {"run": "exp001"})
    )
    scored("exp001", {})
    bank.write(paths.run_folder("exp001") / "test.arrow", whole)
    assert dry_run.write("exp001").read_bytes() == lay.write(whole, "again").read_bytes()
    assert "exp001" in refusal(lambda: dry_run.write("exp01"))


# --- competition.py -----------------------------------------------------------------------------------------


def test_postprocess_gets_rows_in_order_and_its_result_is_validated(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay = lay_out("value")
    prediction = predictions(lay)

    def ranked(rows: pd.DataFrame, prediction: np.ndarray) -> np.ndarray:
        assert list(rows["row"]) == IDS and prediction.shape == (len(IDS), 1)
        return np.arange(1.0, len(rows) + 1)[:, None]

    monkeypatch.setattr(competition, "postprocess", ranked, raising=False)
    assert [row[1] for row in csv.reader(lay.write(prediction).open())][1:] == [f"{i}.0" for i in range(1, 9)]
    monkeypatch.setattr(competition, "postprocess", lambda rows, prediction: prediction[1:])
    assert "shape (7, 1)" in refusal(lambda: lay.write(prediction))
    monkeypatch.setattr(competition, "postprocess", lambda rows, prediction: prediction * np.nan)
    assert "not a number" in refusal(lambda: lay.write(prediction))


def test_write_submission_is_written_without_index_and_validated(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay = lay_out("label")
    prediction = predictions(lay)

    def mine(rows: pd.DataFrame, prediction: np.ndarray, sample: pd.DataFrame) -> pd.DataFrame:
        assert list(sample["image_id"]) == IDS
        sample["breed"] = "borzoi"
        return sample.set_index(np.arange(5, 13))

    monkeypatch.setattr(competition, "write_submission", mine, raising=False)
    assert lay.write(prediction).read_text() == "image_id,breed\n" + "".join(
        f"{each},borzoi\n" for each in IDS
    )

    def numbered(rows: pd.DataFrame, prediction: np.ndarray, sample: pd.DataFrame) -> pd.DataFrame:
        return mine(rows, prediction, sample).assign(image_id=range(8))

    for hook, words in (
        (lambda rows, prediction, sample: sample, ": empty"),
        (lambda rows, prediction, sample: mine(rows, prediction, sample).iloc[::-1], "order"),
        (lambda rows, prediction, sample: sample.to_csv(), "DataFrame"),
        (numbered, "no such id"),
    ):
        monkeypatch.setattr(competition, "write_submission", hook)
        assert words in refusal(lambda: lay.write(prediction))
