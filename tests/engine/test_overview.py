"""comp runs, comp bank and comp config print what is on disk; comp clean deletes only what was named."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from banked import CLASSES, TEST, TRAIN, Project, declare, lay_out, member

from comp.engine import cli
from comp.engine.bank import bank, merge, score
from comp.engine.config import resolve
from comp.engine.ensemble.blend import blend
from comp.engine.extras import clean, list_bank, list_runs, run_status
from comp.engine.store import artifacts, locks, paths, process


@pytest.fixture
def project(empty: Path) -> Project:
    return lay_out(empty)


def row(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if line.split("  ")[0].strip() == name]
    return line


def fold(run: str, number: int | str = 0, seed: int = 0) -> Path:
    folder = paths.fold_folder(run, seed, number)
    folder.mkdir(parents=True)
    return folder


def sealed(file: Path, content: bytes = b"x" * 1000) -> Path:
    file.write_bytes(content)
    artifacts.add_to_manifest(file)
    return file


# --- runs -----------------------------------------------------------------------------------------


def test_an_empty_project(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs"]) == 0
    assert "next: comp train exp001" in capsys.readouterr().out
    assert cli.main(["bank"]) == 0
    assert "next: comp train exp001" in capsys.readouterr().out


def test_runs_and_ensembles_with_scores_and_differences(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    member(project, "exp001", noise=1.2)
    member(project, "exp002", noise=1.8, marks=["selected_on_fold"])
    cfg = resolve.load(project.root, "exp001", ["optim.lr=0.25", "machine.num_workers=7"]).config
    artifacts.write_text(paths.run_folder("exp002") / "config.yaml", resolve.to_yaml(cfg))
    artifacts.add_to_manifest(paths.run_folder("exp002") / "config.yaml")
    for number in range(3):
        sealed(fold("exp001", number) / "oof.arrow")
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: mean")
    blend("blend001")
    capsys.readouterr()

    assert cli.main(["runs"]) == 0
    out = capsys.readouterr().out
    scores = {
        name: artifacts.read_json(bank.folder(name) / "score.json")
        for name in ("exp001", "exp002", "blend001")
    }
    for name, record in scores.items():
        assert f"{record['mean']:.4f} ± {record['std']:.4f}" in row(out, name)
        assert f"{record['oof']:.4f}" in row(out, name)
    assert "3/5" in row(out, "exp001") and "unfinished" in row(out, "exp001")
    assert "optim.lr=0.25" in row(out, "exp002") and "num_workers" not in out
    assert "selected_on_fold" in row(out, "exp002") and "selected_on_fold" in row(out, "blend001")
    assert "0.50 exp001 0.50 exp002" in row(out, "blend001")
    best = max(scores, key=lambda name: scores[name]["oof"])
    assert f"best: {best}" in out and f"next: comp submit {best} --dry-run" in out


def test_a_start_that_saved_nothing_is_no_run(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "saved"):
        folder = fold(name)
        artifacts.write_text(paths.run_folder(name) / "config.yaml", resolve.to_yaml(project.cfg))
        artifacts.add_to_manifest(paths.run_folder(name) / "config.yaml")
        (folder / "log.jsonl").write_text("")
    sealed(paths.fold_folder("saved", 0, 0) / "state-00000005.pt")
    assert cli.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "empty" not in out and "0/5" in row(out, "saved")
    with locks.lock(paths.fold_folder("empty", 0, 0), "training"):
        assert cli.main(["runs"]) == 0
        assert "training now" in row(capsys.readouterr().out, "empty")


def test_folds_of_every_seed_are_counted(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    member(project, "exp001-seeds")
    for seed in (0, 1):
        for number in range(5):
            sealed(fold("exp001-seeds", number, seed) / "oof.arrow")
    list_runs.runs()
    out = capsys.readouterr().out
    assert "best: " not in out and "no scores yet\nnext: comp train exp001" in out  # made by comp compare
    line = row(out, "exp001-seeds")
    assert "10/10 of 2 seeds" in line and "unfinished" not in line
    shutil.rmtree(paths.fold_folder("exp001-seeds", 1, 4))
    list_runs.runs()
    line = row(capsys.readouterr().out, "exp001-seeds")
    assert "9/10 of 2 seeds" in line and "unfinished" in line


def test_the_next_step_of_a_finished_run(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """An ensemble is offered when all its members exist; runs of --debug and comp compare are not
    submitted."""
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: mean")
    for name, step in {
        "exp001": "next: comp submit exp001 --dry-run",
        "exp002": "next: comp submit exp002 --dry-run, or comp ensemble blend001",
        "exp003": "next: comp submit exp003 --dry-run",
        "exp001-debug": "next: comp train exp001",
        "exp001-seeds": "written: runs/exp001-seeds/oof.arrow, test.arrow, score.json",
    }.items():
        member(project, name)
        capsys.readouterr()
        merge.print_result(name)
        assert capsys.readouterr().out.splitlines()[-1] == step
    record = artifacts.read_json(paths.run_folder("exp001") / "score.json")
    assert f", OOF {record['oof']:.4f}" in score.summary(record)
    assert f", OOF {record['oof']:.4f} (3 seeds averaged)" in score.summary(record, 3)


def test_partial_scores_are_not_ranked(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    member(project, "exp001", noise=2.0)
    member(project, "exp001-debug", noise=0.1)
    file = paths.run_folder("exp001-debug") / "score.json"
    artifacts.write_json(file, artifacts.read_json(file) | {"marks": ["partial"]})
    artifacts.add_to_manifest(file)
    artifacts.write_json(
        paths.path("runs", "seed_noise.json"),
        {"run": "x-seeds", "experiment": "x", "metric": "accuracy", "seeds": 2, "mean": 0.5, "std": 0.01}
        | {"folds": artifacts.manifest_entry(paths.folds_file())},
    )
    list_runs.runs()
    out = capsys.readouterr().out
    assert "best: exp001," in out and "next: comp submit exp001 --dry-run" in out
    assert "  exp001: " in out and "  exp001-debug: " not in out


def test_a_smaller_loss_is_the_better_one(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = lay_out(empty, "regression")
    member(project, "exp001", noise=0.1)
    member(project, "exp002", noise=5.0)
    list_runs.runs()
    assert "best: exp001" in capsys.readouterr().out
    list_bank.bank()
    assert "best: exp001" in capsys.readouterr().out


def test_an_ensemble_is_stale_when_a_member_or_its_file_changed(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    member(project, "exp001")
    member(project, "exp002", seed=2)
    text = "members: [exp001, exp002]\nmethod: mean"
    declare(project, "blend001", text)
    blend("blend001")
    capsys.readouterr()

    def said() -> str:
        list_runs.runs()
        return row(capsys.readouterr().out, "blend001")

    assert "stale" not in said()
    declare(project, "blend001", text + "  # a comment changes nothing")
    assert "stale" not in said()
    declare(project, "blend001", text + "\nspace: logit")
    assert "stale" in said()
    declare(project, "blend001", text)
    member(project, "exp002", seed=3)
    assert "stale" in said()


def test_scores_on_other_folds_are_marked(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    member(lay_out(empty), "exp001")
    lay_out(empty, shift=1)
    list_runs.runs()
    assert "other folds" in row(capsys.readouterr().out, "exp001")


def test_a_damaged_run_is_one_line_and_hides_no_other(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    member(project, "exp001")
    member(project, "exp002")
    (paths.run_folder("exp001") / "config.yaml").write_text("nonsense")
    list_runs.runs()
    out = capsys.readouterr().out
    assert "damaged" in row(out, "exp001") and "±" in row(out, "exp002")


def test_training_time_leaves_out_the_pause_between_two_starts(project: Project) -> None:
    assert run_status.training_time(paths.run_folder("exp001")) == "-"
    days: list[list[float]] = [[0, 100, 200, 200 + 8 * 3600, 8 * 3600 + 300], [0.0, 65.5]]
    for number, clocks in enumerate(days):
        lines = [json.dumps({"clock": clock}) for clock in clocks]
        (fold("exp001", number) / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert run_status.training_time(paths.run_folder("exp001")) == "6m05"


def test_running_folds_are_listed(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    member(project, "exp001")
    with locks.lock(fold("exp001"), "training"):
        list_runs.runs()
        assert "training now" in row(capsys.readouterr().out, "exp001")
    list_runs.runs()
    assert "training now" not in row(capsys.readouterr().out, "exp001")


# --- bank -----------------------------------------------------------------------------------------


def test_the_bank_lists_all_with_the_errors_of_unreadable_sets(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    member(project, "exp001", noise=1.0, tta=["identity", "hflip"], weights={"exp001/seed0/fold0": "ab"})
    member(project, "exp001:seed1", noise=1.5, seed=2)
    member(project, "exp001:full", kinds=("test",))
    file = member(project, "exp002") / "oof.arrow"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    declare(project, "blend001", "members: [exp001, 'exp001:seed1']\nmethod: rank")
    blend("blend001")
    capsys.readouterr()
    list_bank.bank()
    out = capsys.readouterr().out
    assert "1 checkpoints, identity+hflip" in row(out, "exp001")
    assert row(out, "exp001:full").split()[1] == "test"
    assert "error: runs/exp002/oof.arrow: damaged" in row(out, "exp002")
    assert "rank of exp001, exp001:seed1" in row(out, "blend001") and "1.000" in row(out, "blend001")
    assert "best: blend001" in out


def test_one_set_as_csv(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    member(project, "exp001")
    assert cli.main(["bank", "--csv", "exp001"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == TRAIN + TEST and list(lines[0]) == ["id", "kind", "fold", *CLASSES]
    assert [line["fold"] for line in lines[:6]] == ["0", "1", "2", "3", "4", "0"] and lines[-1]["fold"] == ""
    assert lines[0]["id"] == "00000" and lines[-1]["kind"] == "test"
    said = np.array([[float(line[name]) for name in CLASSES] for line in lines if line["kind"] == "oof"])
    assert (
        said == bank.load("exp001", "oof", project.samples, project.folds).probability(project.head)
    ).all()


def test_csv_of_the_refit_and_of_an_unknown_member(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    member(project, "exp001:full", kinds=("test",))
    assert cli.main(["bank", "--csv", "exp001:full"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + TEST
    assert cli.main(["bank", "--csv", "exp01:full"]) == 2
    assert "the nearest are exp001:full" in capsys.readouterr().err


# --- config ---------------------------------------------------------------------------------------


def test_config_prints_the_origin_of_each_value(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "exp001", "optim.clip_grad=null"]) == 0
    out = capsys.readouterr().out
    assert "configs/exp001.yaml:" in row(out, "optim.lr=0.005")
    assert "configs/base.yaml:" in row(out, "optim.momentum=null")
    assert "optim.clip_grad=null" in row(out, "optim.clip_grad=null").split()[-1]
    assert "configs/competition.yaml:" in row(out, "competition.task=multiclass")
    assert out.startswith("key=value ") and any(line.endswith(" default") for line in out.splitlines())


def test_config_compares_two_experiments(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "exp002", "--diff", "exp001"]) == 0
    out = capsys.readouterr().out
    assert row(out, "model.name").split() == ["model.name", "test_resnet", "test_efficientnet"]
    assert len(out.splitlines()) == 2
    assert cli.main(["config", "exp001", "--diff", "exp001"]) == 0
    assert "the same" in capsys.readouterr().out


# --- clean ----------------------------------------------------------------------------------------


@pytest.fixture
def full(project: Project) -> dict[str, Path]:
    """One file of every kind that clean may delete."""
    done, begun = fold("exp001", 0), fold("exp001", 1)
    made = {
        "weights": sealed(done / "weights.safetensors"),
        "done": sealed(done / "state-00000010.pt"),
        "begun": sealed(begun / "state-00000005.pt"),
        "member": member(project, "exp002") / "oof.arrow",
    }
    cache = project.root / "data" / "cache" / "abc"
    cache.mkdir(parents=True)
    made["cache"] = sealed(cache / "pixels.bin")
    made["trash"] = artifacts.move_to_trash(fold("exp009").parent.parent)
    gone = process.own_id().replace(f"-{os.getpid()}-", "-4194999-")
    made["orphan"] = project.root / "runs" / "exp001" / f".oof.arrow.{gone}.part"
    made["orphan"].write_bytes(b"half")
    made["half"] = paths.path("kernels", "exp001", ".making")
    made["half"].mkdir(parents=True)
    (made["half"] / "script.py").write_text("half")
    return made


GOES = {"trash": {"trash", "orphan", "half"}, "cache": {"cache"}, "state": {"done"}}


@pytest.mark.parametrize("flag", GOES)
def test_only_what_the_flag_names_is_deleted(full: dict[str, Path], flag: str) -> None:
    assert cli.main(["clean", f"--{flag}"]) == 0
    assert {name for name, file in full.items() if not file.exists()} == GOES[flag]
    assert artifacts.manifest_entry(full["done"]) is None or full["done"].exists()


def test_without_a_flag_nothing_is_deleted(full: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clean"]) == 0
    assert all(file.exists() for file in full.values())
    out = capsys.readouterr().out
    assert "runs/exp001" in out and "next: comp clean --state --cache --trash" in out


def test_clean_refuses_while_a_job_is_running(
    full: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with locks.lock(paths.fold_folder("exp001", 0, 1), "training seed 0 fold 1"):
        assert cli.main(["clean", "--cache", "--state"]) == 2
        assert "training seed 0 fold 1" in capsys.readouterr().err
    assert all(file.exists() for file in full.values())


def test_a_linked_cache_is_emptied_not_followed(project: Project, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "abc").mkdir(parents=True)
    (project.root / "data" / "cache").symlink_to(disk)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (disk / "link").symlink_to(outside)
    clean.clean(cache=True)
    assert not list(disk.iterdir()) and (outside / "mine").exists()
