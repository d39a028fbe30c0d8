"""Whatever reads an artefact looks at its bytes first: one flipped bit, and its readers refuse it by name,
and nothing else is lost. And a submission whose checkpoints no longer say what is stored does not leave."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import QUICK
from kaggle_server import Server
from test_download import at_kaggle

from comp.engine import cli
from comp.engine.bank import bank, predictions
from comp.engine.data import folds, samples
from comp.engine.store import artifacts, paths

TRAIN = ["train", "exp001", *QUICK, "--as", "exp001"]
MERGE, VIEWS = ["predict", "exp001"], ["predict", "exp001", "--tta", "identity,vflip"]
BLEND, KERNEL = ["ensemble", "blend001"], ["kernel", "exp001"]
SEND, SEND_BLEND = ["submit", "exp001", "--dry-run"], ["submit", "blend001", "--dry-run"]
PRINT, PRINT_BLEND = ["bank", "--csv", "exp001"], ["bank", "--csv", "blend001"]
SLICES, EXPLAIN, LIST = ["slices", "exp001"], ["explain", "exp001"], ["bank"]

# what is damaged: who reads it
READERS = {
    "data/samples.parquet": [["folds"], TRAIN, MERGE, VIEWS, BLEND, KERNEL, SEND, LIST, PRINT, SLICES, EXPLAIN],
    "data/folds.parquet": [["folds"], TRAIN, MERGE, VIEWS, BLEND, KERNEL, SEND, LIST, PRINT, SLICES, EXPLAIN],
    "runs/exp001/config.yaml": [MERGE, VIEWS, KERNEL, SEND, EXPLAIN],
    "runs/exp001/seed0/fold0/weights.safetensors": [TRAIN, MERGE, VIEWS, BLEND, KERNEL, SEND, EXPLAIN],
    "runs/exp001/seed0/fold0/oof.arrow": [TRAIN, MERGE],
    "runs/exp001/seed0/fold0/test.arrow": [TRAIN, MERGE, SEND],
    "runs/exp001/oof.arrow": [BLEND, SLICES, EXPLAIN],
    "runs/exp001/test.arrow": [BLEND, KERNEL, SEND, PRINT],
    "ensembles/blend001/apply.json": [["kernel", "blend001"]],
    "ensembles/blend001/oof.arrow": [["slices", "blend001"]],
    "ensembles/blend001/test.arrow": [SEND_BLEND, PRINT_BLEND, ["kernel", "blend001"]],
}  # fmt: skip


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("victim", READERS)
def test_one_flipped_bit_is_refused_by_whoever_reads_it(
    trained: Path, victim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / victim
    whole = file.read_bytes()
    before = {each: artifacts.manifest_entry(each) for each in trained.rglob("*.arrow")}
    flipped(file)
    for arguments in READERS[victim]:
        assert cli.main(arguments) == 2, arguments
        assert victim in capsys.readouterr().err, arguments
    file.write_bytes(whole)
    assert before == {each: artifacts.manifest_entry(each) for each in before}, (
        "what was whole counts as before"
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    yield from at_kaggle(monkeypatch, tmp_path)


def test_predictions_that_the_checkpoints_do_not_repeat_are_not_sent(
    server: Server, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rightly sealed, of the right rows, valid as a submission: only asking the weights again shows that they
    are others'."""
    table = samples.load()
    split = folds.load(table)
    for number in range(5):
        file = paths.fold_folder("exp001", 0, number) / "test.arrow"
        said = bank.read(file, table, split)
        other = {name: values[::-1].copy() for name, values in said.heads.items()}
        bank.write(file, predictions.PredictionSet(said.row, None, other, said.meta))
    assert cli.main(MERGE) == 0
    capsys.readouterr()
    for arguments in (["--dry-run"], ["-m", "first"]):
        assert cli.main(["submit", "exp001", *arguments]) == 2
        said_ = capsys.readouterr().err
        assert (
            said_.startswith("exp001, seed 0, fold ")
            and "its checkpoint now predicts" in said_
            and len(said_.splitlines()) == 1
        )
    assert not server.submissions and not paths.submission_file("exp001").exists()


def test_other_views_that_do_not_fit_on_the_disk_are_refused_before_they_start(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(trained)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**28))
    for arguments, where in (
        (VIEWS, "runs/exp001/members/tta-identity-vflip"),
        (BLEND, "ensembles/blend001"),
    ):
        assert cli.main(arguments) == 2
        assert f"{where} will write " in (said := capsys.readouterr().err) and "comp clean" in said
    assert not (trained / "runs/exp001/members/tta-identity-vflip").exists()
