"""The refit on all data uses the schedule of CV: equal epochs and equal learning rates by share of the
run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import _enter, config
from forked import forked
from test_compare import few
from test_training import TINY, refusal

from comp import submission
from comp.engine import cli
from comp.engine.bank import bank
from comp.engine.data import folds, samples
from comp.engine.deliver import kernel, ledger, submit, wheels
from comp.engine.ensemble import latency, members
from comp.engine.run import runner, tracking
from comp.engine.store import artifacts, paths


def test_the_refit_sees_all_rows_for_as_many_epochs_and_has_no_oof(project: Path) -> None:
    told = [
        *TINY,
        "train.max_samples=null",
        "train.batch_size=64",
        "train.epochs=2",
        "predict.batch_size=256",
    ]
    for which in ("1", "full"):
        runner.train("exp001", told, fold=which, name="x")
    table = samples.load()
    split = folds.load(table)
    rows = {fold: len(split.split(fold)[0]) for fold in (1, "full")}
    assert rows["full"] == len(table.positions("train")) > rows[1]
    rates = {}
    for fold, count in rows.items():
        log = [line for line in tracking.read(paths.fold_folder("x", 0, fold) / "log.jsonl") if "lr" in line]
        assert len(log) == 2 * (count // 64)
        rates[fold] = [line["lr"] for line in log]
    for share in (0, 0.25, 0.5, 0.75):
        one, full = (rates[fold][round(share * len(rates[fold]))] for fold in rates)
        assert full == pytest.approx(one, rel=0.1)
    assert bank.find("x:full", "test").exists()
    assert not (paths.fold_folder("x", 0, "full") / "oof.arrow").exists()


# --- a run of which only the refit was trained --------------------------------------------------------------

KEPT = ["train.epochs=2", "train.max_samples=null", "snapshots.cycles=2", "train.ema_decay=0.9", "average.members=[raw, swa]", "average.swa_start=0"]  # fmt: skip
MADE = ["full", "full-last2", "full-raw", "full-snap1", "full-snap2", "full-swa"]


@pytest.fixture(scope="session")
def only_full(practice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run x: trained with --fold full alone, with snapshots and other averages. Nobody writes here."""
    root = tmp_path_factory.mktemp("only_full") / "project"
    shutil.copytree(practice, root)

    def work() -> None:
        few(root)
        sample = root / "data" / "raw" / "sample_submission.csv"
        asked = set(samples.load().frame["id"])
        head, *lines = sample.read_text().splitlines(keepends=True)
        sample.write_text(head + "".join(line for line in lines if line.split(",")[0] in asked))
        table = samples.load()
        samples.save(table.frame, table.heads, sample=artifacts.sha256(sample))
        with (root / "said").open("w") as opened, contextlib.redirect_stdout(opened):
            runner.train("exp001", [*TINY, *KEPT], fold="full", name="x")

    with pytest.MonkeyPatch.context() as patch:
        _enter(root, patch)
        assert forked(work) == 0
    paths.root.cache_clear()
    return root


@pytest.fixture
def refit(only_full: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    shutil.copytree(only_full, tmp_path / "project", ignore=shutil.ignore_patterns("raw"))
    (tmp_path / "project" / "data" / "raw").symlink_to(only_full / "data" / "raw")
    return enter(tmp_path / "project")


def test_it_says_its_loss_its_name_and_that_there_is_no_cv(refit: Path) -> None:
    said = (refit / "said").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("x seed 0 fold full: ")]
    last = [
        each for each in tracking.read(paths.fold_folder("x", 0, "full") / "log.jsonl") if "epoch" in each
    ][-1]
    assert f"train_loss {last['train_loss']:.4f}, " in line
    (about,) = [line for line in said.splitlines() if line.startswith("x:full: ")]
    assert "no CV" in about and "seed 0 fold 0, 1 missing" in about and "comp train x" in about
    assert said.splitlines()[-1] == "next: comp submit x:full --dry-run"


def test_its_snapshots_and_other_averages_are_members(refit: Path) -> None:
    assert bank.members() == [f"x:{name}" for name in MADE]
    table = samples.load()
    split = folds.load(table)
    sets = {name: bank.load(f"x:{name}", "test", table, split) for name in MADE}
    assert set(sets["full-snap1"].meta["weights"]) == {"x/seed0/foldfull/snap1"}
    assert set(sets["full-last2"].meta["weights"]) == {"x/seed0/foldfull/snap1", "x/seed0/foldfull/snap2"}
    head = table.heads[0].name
    for name in ("full-snap1", "full-raw", "full-swa"):
        assert not np.array_equal(sets[name].heads[head], sets["full"].heads[head]), name
    assert latency.seconds_per_image("x:full-snap1") > 0
    assert "comp train x --fold full" not in refusal(lambda: bank.find("x:full-snap9", "test"))


@pytest.mark.parametrize("name", ["x:full", "x:full-snap1"])
def test_it_is_submitted_without_a_cv_and_that_is_said(
    refit: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name}: trained on all rows")]
    assert "no CV" in line and "comp train x" in line
    assert len(paths.submission_file(name.replace(":", "-")).read_text().splitlines()) == 41
    facts = ledger.describe(config(), name)
    assert facts["cv"] is None
    submit.validate_score(name, [])


def test_it_is_predicted_again_under_other_views(refit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for address, views in (("x", "identity,hflip"), ("x:full", "vflip")):
        assert cli.main(["predict", address, "--tta", views]) == 0
        member = f"x:full-tta-{views.replace(',', '-')}"
        assert f"next: comp submit {member} --dry-run" in capsys.readouterr().out
        assert bank.read_meta(bank.find(member, "test"))["tta"] == views.split(",")
    assert cli.main(["submit", "x:full-tta-identity-hflip", "--dry-run"]) == 0
    assert cli.main(["predict", "x:full"]) == 0 and cli.main(["predict", "x:snap1"]) == 2


def test_it_is_bundled(refit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "of_imports", list)
    bundle = kernel.build("x:full-snap1") / "bundle"
    files = [str(file.relative_to(bundle)) for file in bundle.rglob("weights.safetensors")]
    assert files == ["runs/x/seed0/foldfull/snap1/weights.safetensors"]
    assert not list(bundle.rglob("score.json")), "there is no CV, and nothing is made up for it"
    assert submission.fitted_cuts("x:full-snap1") == {}


def test_a_blend_refuses_it_by_name_until_its_cv_is_there(
    refit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (refit / "configs/ensembles/b.yaml").write_text("members: ['x:full', 'x:full-snap1']\nmethod: greedy\n")
    assert cli.main(["ensemble", "b"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" takes its weight")[0].split()[-1] for line in lines] == ["x:full", "x:full-snap1"]
    assert all(
        "b.yaml:1" in line and "fold 0, 1 missing" in line and "comp train x" in line for line in lines
    )
    assert cli.main(["train", "x"]) == 0
    assert cli.main(["ensemble", "b"]) == 0
    recipe = artifacts.read_json(refit / "ensembles/b/apply.json")
    assert {each["address"] for each in recipe["members"]} <= {"x:full", "x:full-snap1"}
    assert cli.main(["submit", "b", "--dry-run"]) == 0
    capsys.readouterr()
    assert cli.main(["submit", "x:full", "--dry-run"]) == 0
    assert "the CV of x: accuracy" in capsys.readouterr().out
    cv = refit / "runs/x/oof.arrow"
    cv.write_bytes(cv.read_bytes()[:-1] + b"x")
    artifacts.add_to_manifest(cv)
    assert members.stale("b", artifacts.read_json(refit / "ensembles/b/score.json")), (
        "fitted on other OOF predictions"
    )
