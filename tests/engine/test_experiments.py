"""Every verb takes an experiment or a run, and lists missing folds with the command that trains them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from banked import declare, lay_out, member
from conftest import _enter
from forked import forked
from test_compare import TINY, few
from test_training import refusal

from comp.engine import cli
from comp.engine.bank import bank
from comp.engine.config import experiments
from comp.engine.config import resolve as configs
from comp.engine.extras import measure
from comp.engine.run import fingerprint, runner
from comp.engine.store import artifacts, paths


@pytest.fixture(scope="session")
def of_as(practice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the experiment tiny under names of their own: `a`, finished, and `half`, of which fold 1 is
    missing. Nobody writes here."""
    root = tmp_path_factory.mktemp("of_as") / "project"
    shutil.copytree(practice, root)

    def work() -> None:
        few(root)
        (root / "configs" / "tiny.yaml").write_text(TINY.replace("max_samples: 48, ", ""))
        runner.train("tiny", ["optim.lr=1e-3"], name="a")
        runner.train("tiny", ["optim.lr=2e-3"], name="half", fold="0")

    with pytest.MonkeyPatch.context() as patch:
        _enter(root, patch)
        assert forked(work) == 0
    paths.root.cache_clear()
    return root


@pytest.fixture
def named(of_as: Path, tmp_path: Path, enter: Callable[[Path], Path]) -> Path:
    shutil.copytree(of_as, tmp_path / "project", ignore=shutil.ignore_patterns("raw"))
    (tmp_path / "project" / "data" / "raw").symlink_to(of_as / "data" / "raw")
    return enter(tmp_path / "project")


# --- a run in the place of an experiment ----------------------------------------------------------


def test_a_run_is_the_source_of_its_config(named: Path) -> None:
    file = named / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("metric: accuracy", "metric: log_loss"))
    loaded = experiments.load("half", ["data.size=16"])
    lines = (named / "runs/half/config.yaml").read_text().splitlines()
    assert loaded.config.optim.lr == 2e-3 and loaded.config.data.size == 16
    assert loaded.origins["optim.lr"] == f"runs/half/config.yaml:{1 + lines.index('  lr: 0.002')}"
    assert loaded.origins["optim.momentum"].startswith("configs/base.yaml:"), "as base.yaml has it"
    assert loaded.config.competition.metric == "log_loss", "what is scored now"
    assert experiments.load("half", debug=True).config.train.max_samples == 64
    before = experiments.load("half", ["competition.metric=accuracy"]).config
    assert before == experiments.stored_config("half")


def test_the_experiment_is_used_and_one_line_names_the_difference_of_the_run(
    named: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (named / "configs/a.yaml").write_text("base: tiny\noptim: {lr: 0.5}\n")
    assert cli.main(["config", "a"]) == 0
    out, err = capsys.readouterr()
    assert "optim.lr=0.5" in out
    (line,) = err.splitlines()
    assert all(word in line for word in ("runs/a", "optim.lr", "0.001 there", "0.5 in configs/a.yaml"))
    said = refusal(lambda: runner.train("a", [], fold="0"))
    assert "optim.lr: was trained with 0.001, now 0.5" in said and not capsys.readouterr().err
    (named / "configs/a.yaml").write_text("base: tiny\noptim: {lr: 0.001}\n")
    assert cli.main(["config", "a"]) == 0 and not capsys.readouterr().err, "it stands for the experiment"


def test_an_unknown_name_is_refused_with_the_nearest(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "seed-noise", "features", "tune", "schedule", "config", "cache", "model"):
        assert cli.main([verb, "halff"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "configs/halff.yaml" in line and "half" in line.split("nearest")[1]


def test_verbs_that_train_nothing_take_a_run(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    for given in (
        ["config", "tiny", "--diff", "a"], ["schedule", "a"], ["augment", "a"], ["cache", "a"],
        ["model", "a", "predict.batch_size=2"],
    ):  # fmt: skip
        assert cli.main(given) == 0, given


def test_verbs_that_train_take_a_run(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = artifacts.read_json(named / "runs/a/started.json")
    assert cli.main(["train", "a", "--fold", "full"]) == 0
    assert artifacts.manifest_entry(named / "runs/a/seed0/foldfull/weights.safetensors")
    assert artifacts.read_json(named / "runs/a/started.json") == before, "it goes on as it began"
    assert cli.main(["seed-noise", "a", "--seeds", "2"]) == 0
    assert cli.main(["compare", "a", "half", "--seeds", "1"]) == 0
    assert (
        experiments.stored_config("a-seeds").optim.lr == 1e-3
        and experiments.stored_config("half-seeds").optim.lr == 2e-3
    )
    assert cli.main(["features", "a", "--heads", "linear"]) == 0
    assert bank.find("a:linear", "oof").exists()
    assert cli.main(["train", "a", "--as", "b", "optim.lr=1e-4", "--fold", "0"]) == 0
    assert (
        experiments.stored_config("b").optim.lr == 1e-4
        and experiments.stored_config("b").augment.recipe == "none"
    )
    assert cli.main(["train", "half"]) == 0, "a run goes on by its name alone"
    began = fingerprint.resume_command("half")
    assert cli.main(["train", "half", "--fresh", "--fold", "1"]) == 0
    assert experiments.stored_config("half").optim.lr == 2e-3 and fingerprint.resume_command("half") == began
    assert "score.json" in capsys.readouterr().out


@pytest.mark.slow
def test_lr_range_and_tune_take_a_run(named: Path) -> None:
    (named / "configs" / "tune").mkdir()
    (named / "configs" / "tune" / "few.yaml").write_text("search:\n  optim.weight_decay: [0.0, 0.1]\n")
    assert cli.main(["lr-range", "a", "--steps", "20"]) == 0
    assert cli.main(["tune", "a", "--space", "few", "--trials", "1"]) == 0
    assert cli.main(["tune", "a", "--space", "few", "--export", "won"]) == 0
    exported = configs.load(named, "won").config
    assert exported.optim.lr == 1e-3 and exported.train.epochs == 1, "there is no configs/a.yaml to build on"
    assert cli.main(["train", "won"]) == 0


def test_other_folds_in_competition_yaml_have_to_be_made_first(
    named: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained on other folds than those that are declared, whatever the name."""
    file = named / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("k: 2, seed: 0", "k: 3, seed: 1"))
    (number,) = [i for i, line in enumerate(file.read_text().splitlines(), 1) if line.startswith("folds:")]
    for given in (
        ["train", "tiny"], ["train", "half"], ["schedule", "tiny"], ["seed-noise", "tiny"], ["lr-range", "tiny"], ["features", "tiny"],
        ["tune", "tiny", "--space", "few"], ["compare", "tiny", "a"],
    ):  # fmt: skip
        (named / "configs" / "tune").mkdir(exist_ok=True)
        (named / "configs" / "tune" / "few.yaml").write_text("search:\n  optim.lr: [1e-3, 1e-2]\n")
        assert cli.main(given) == 2, given
        k, seed = capsys.readouterr().err.splitlines()
        where = f"configs/competition.yaml:{number}: "
        assert k.startswith(f"{where}folds.k: is 3") and "made with 2" in k
        assert (
            seed.startswith(f"{where}folds.seed: is 1")
            and "made with 0" in seed
            and "comp folds --remake" in seed
        )
    assert sorted(p.name for p in (named / "runs").iterdir() if p.is_dir()) == ["a", "half"]
    assert cli.main(["folds", "--remake"]) == 0
    assert cli.main(["train", "tiny", "--fold", "2"]) == 0, "the remedy"


# --- not trained, or not finished -----------------------------------------------------------------

READERS = (
    ["submit", "{}", "--dry-run"], ["explain", "{}"], ["export", "{}"], ["slices", "{}"], ["label-errors", "{}"], ["kernel", "{}"],
    ["pseudo", "{}", "--share", "0.2"], ["tta", "{}"], ["audit", "--drift", "{}"], ["bank", "--csv", "{}"], ["predict", "{}", "--tta", "hflip"],
    ["predict", "{}", "--last-look"],
)  # fmt: skip


def test_an_untrained_experiment_lists_its_folds_and_the_command(
    named: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in READERS:
        assert cli.main([each.format("exp002") for each in given]) == 2, given
        (line,) = capsys.readouterr().err.splitlines()
        assert "seed 0 fold 0, 1" in line and line.endswith("comp train exp002"), (given, line)


def test_an_unfinished_run_lists_missing_folds(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_less = (
        ["explain", "{}"],
        ["export", "{}"],
        ["predict", "{}", "--last-look"],
    )  # what is there is enough
    for given in READERS:
        if given in with_less:
            continue
        assert cli.main([each.format("half") for each in given]) == 2, given
        (line,) = capsys.readouterr().err.splitlines()
        assert "fold 1" in line and "comp train half" in line and "no such" not in line, (given, line)
    assert cli.main(["explain", "half", "--count", "1"]) == 0
    assert "seed 0 fold 1" in capsys.readouterr().out
    shutil.rmtree(named / "runs/half/seed0")
    for given in (["explain", "half"], ["pseudo", "half"]):
        assert cli.main(given) == 2, given
        assert "seed 0 fold 0, 1 missing; comp train half" in capsys.readouterr().err, given


def test_missing_inputs_name_the_verb_that_makes_them(empty: Path) -> None:
    project = lay_out(empty)
    member(project, "exp001", kinds=("test",))
    declare(project, "blend001", "members: [exp001]\nmethod: mean")
    assert "comp ensemble blend001" in refusal(lambda: bank.find("blend001", "test"))
    assert "comp train exp001 --fold full" in refusal(lambda: bank.find("exp001:full", "test"))
