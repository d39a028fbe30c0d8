"""The queue of a study, pruning, stopping, --confirm and --export. Dead processes are in
test_tune_deaths.py."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb_reader
from conftest import config
from optuna.trial import TrialState
from studies import FOREVER, SMALL, join, run, states, with_space

from comp.engine import cli, hardware
from comp.engine.bank import bank
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import execute, fingerprint, loading, runner
from comp.engine.store import paths
from comp.engine.tune import confirm, export, live, objective, report, search, storage, study, trial
from comp.engine.tune.open_study import open_study


@pytest.fixture
def tuned(project: Path) -> Path:
    return with_space(project)


def test_search_report_and_export(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "exp001", "--space", "s", "--trials", "3", *SMALL]) == 0
    opened = join()
    trials = opened.study.get_trials(deepcopy=False)
    ended = [t for t in study.budgeted(trials) if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(ended) == 3
    assert trials[0].user_attrs["from"] == "exp001" and trials[0].params["optim.lr"] == 5e-3
    for name in ("history.png", "slice.png", "report.html"):
        assert (opened.folder / name).stat().st_size > 1000, name
    capsys.readouterr()
    report.print_studies(None)
    assert "exp001-s" in capsys.readouterr().out

    export.export(opened, "exp014", None)
    best = opened.ranked()[0]
    text = (tuned / "configs" / "exp014.yaml").read_text()
    assert f"trial {best.number} of" in text and "base: exp001" in text and "batch_size" not in text
    assert config(experiment="exp014").optim.lr == best.params["optim.lr"]
    # What the trial trained is not trained again; its OOF is what the run would have written itself.
    before = (paths.fold_folder("exp014", 0, 0) / "weights.safetensors").stat().st_mtime_ns
    runner.train("exp014", ["track=none"], fold="0")
    assert (paths.fold_folder("exp014", 0, 0) / "weights.safetensors").stat().st_mtime_ns == before
    table = samples.load()
    assert (
        bank.read(paths.fold_folder("exp014", 0, 0) / "oof.arrow", table, folds.load(table)).meta["run"]
        == "exp014"
    )
    with pytest.raises(UserError, match=r"configs/exp014.yaml exists already"):
        export.export(opened, "exp014", None)
    with pytest.raises(UserError, match="--trial 99: not a completed trial"):
        export.export(opened, "exp015", 99)


def test_no_setting_runs_twice_and_a_finite_space_ends(tuned: Path) -> None:
    (tuned / "configs/tune/few.yaml").write_text("search:\n  model.drop_rate: [0.0, 0.1, 0.2]\nfolds: 1\n")
    opened = join(space="few")
    seen = []
    while taken := study.next_trial(opened):
        seen.append(taken[1]["model.drop_rate"])
        opened.study.tell(taken[0], 0.5)
    assert sorted(seen) == [0.0, 0.1, 0.2] and seen[0] == 0.0
    skipped = [
        t.user_attrs["skipped"] for t in opened.study.get_trials(deepcopy=False) if "skipped" in t.user_attrs
    ]
    assert all(text.startswith("the same setting as trial") for text in skipped)


def test_the_best_setting_of_an_earlier_study_is_queued(tuned: Path) -> None:
    old = join()
    for value in (0.1, 0.9, 0.2):
        taken = study.next_trial(old)
        assert taken is not None
        old.study.tell(taken[0], value)
    best = storage.best_trial(old.study)
    (tuned / "configs/tune/t.yaml").write_text("search:\n  optim.lr: {low: 1e-4, high: 0.1, log: true}\n")
    new = join(space="t")
    queued = [t.user_attrs["from"] for t in new.study.get_trials(deepcopy=False)]
    assert queued == ["exp001", "exp001-s"]
    study.next_trial(new)
    taken = study.next_trial(new)
    assert best is not None and taken is not None and taken[1]["optim.lr"] == best.params["optim.lr"]


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband", "wilcoxon"])
def test_a_bad_setting_is_pruned(tuned: Path, monkeypatch: pytest.MonkeyPatch, pruner: str) -> None:
    (tuned / "configs/tune/p.yaml").write_text(
        f"search:\n  optim.lr: {{low: 1e-3, high: 2e-2, log: true}}\npruner: {pruner}\nsampler: random\n"
    )
    opened = join(8, space="p")
    cost: list[int] = []

    def one_fold(context: Any, name: str, seed: int, number: int, on_epoch: Any, **_: Any) -> None:
        """A fold with a fixed metric, which is low from the seventh trial on."""
        metric = 0.3 if len(cost) > 6 else 0.8 + len(cost) / 100
        with (paths.fold_folder(name, seed, number) / "log.jsonl").open("w") as log:
            for epoch in range(1, 3):
                log.write(f'{{"epoch": {epoch}, "valid_metric": {metric + number / 100}}}\n')
                cost[-1] += 1
                on_epoch({"epoch": epoch, "valid_metric": metric + number / 100})

    def begun(*_: Any) -> None:
        assert taken is not None
        for number in range(5):
            paths.fold_folder(opened.run_name(taken[0]), 0, number).mkdir(parents=True, exist_ok=True)

    context = loading.load_context(opened.config({}))
    monkeypatch.setattr(loading, "load_context", lambda *_: context)
    monkeypatch.setattr(execute, "run_fold", one_fold)
    monkeypatch.setattr(objective, "cv_score", lambda *_: {"value": 0.8, "text": ""})
    monkeypatch.setattr(fingerprint, "claim", lambda *_, **__: begun())
    ends = []
    while taken := study.next_trial(opened):
        cost.append(0)
        ends.append(trial.run(opened, *taken, hardware.Stop(), FOREVER).name)
    assert ends[-1] == "PRUNED" and cost[-1] < 10, (ends, cost)
    assert ends[0] == "COMPLETE" and cost[0] == 10


def test_a_stopped_trial_continues_from_its_checkpoint(tuned: Path) -> None:
    opened, stop = join(), hardware.Stop()
    taken = study.next_trial(opened)
    assert taken is not None
    stop.requested = True
    with pytest.raises(KeyboardInterrupt, match="saved at step 1"):
        trial.run(opened, *taken, stop, FOREVER)
    taken = study.next_trial(opened)
    assert taken is not None and taken[0].user_attrs["retry_of"] == 0
    with pytest.raises(KeyboardInterrupt):  # the night is over
        trial.run(opened, *taken, hardware.Stop(), time.time())
    assert run(opened) == TrialState.COMPLETE
    trials = opened.study.get_trials(deepcopy=False)
    again = next(t for t in trials if t.state == TrialState.COMPLETE)
    assert again.user_attrs["retry_of"] == taken[0].number and again.user_attrs["deaths"]["times"] == 0
    assert 0 < search._deadline(None, "07:30") - time.time() <= 24 * 3600


def test_ctrl_c_twice_stops_at_once_and_loses_no_trial(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = join()
    assert run(opened) == TrialState.COMPLETE
    taken, stop = study.next_trial(opened), hardware.Stop()
    assert taken is not None

    def pressed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial.EpochReporter, "epoch", pressed)
        trial.run(opened, *taken, stop, FOREVER)
    assert states(opened)[0] == "COMPLETE" and states(opened)[taken[0].number] == "FAIL"
    assert run(opened) in (TrialState.COMPLETE, TrialState.PRUNED)
    again = opened.study.get_trials(deepcopy=False)[-1]
    assert again.user_attrs["retry_of"] == taken[0].number and again.params == taken[0].params


@pytest.mark.slow
def test_wandb_runs_of_trials_and_optuna_dashboard(tuned: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    (tuned / "configs/tune/few.yaml").write_text(
        "search:\n  model.drop_rate: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]\nfolds: 1\npruner: none\n"
    )
    small = ["machine.num_workers=0", "train.epochs=1", "train.max_samples=32", "schedule.warmup=0"]
    assert cli.main(["tune", "exp001", "--space", "few", "--trials", "4", *small]) == 0
    parts = [wandb_reader.read(part) for part in sorted((tuned / "wandb").glob("offline-run-*"))]
    assert {part.run.run_group for part in parts} == {"exp001-few"}
    assert sorted(part.run.job_type for part in parts) == ["study", *["trial"] * 4]
    whole = next(part for part in parts if part.run.job_type == "study")
    for name in ("history", "slice", "importance"):
        assert (tuned / "studies" / "exp001-few" / f"{name}.png").is_file()
        assert any(name in file for file in whole.files), whole.files
    assert whole.summary["best_value"] == pytest.approx(
        open_study("exp001", small, "few", None).study.best_value
    )

    from optuna_dashboard import wsgi

    app, printed = wsgi(f"sqlite:///{tuned}/studies/exp001-few/study.db"), list[str]()
    asked = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr,
             "SERVER_NAME": "", "SERVER_PORT": "0", "wsgi.url_scheme": "http", "QUERY_STRING": "", "SCRIPT_NAME": ""}  # fmt: skip
    body = b"".join(app(asked, lambda status, headers, *_: printed.append(status)))
    assert (
        printed[0].startswith("200") and json.loads(body)["study_summaries"][0]["study_name"] == "exp001-few"
    )


def test_confirm_compares_the_best_trial_with_the_baseline_on_new_seeds(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tuned / "configs/tune/one.yaml").write_text(
        "search:\n  optim.lr: {low: 1e-5, high: 2e-2, log: true}\nfolds: 1\npruner: none\n"
    )
    monkeypatch.setattr(confirm, "SEEDS", 2)
    monkeypatch.setattr(report, "write", lambda opened: [])  # looked at elsewhere
    opened = open_study("exp001", SMALL, "one", None)
    opened.study.enqueue_trial({"optim.lr": 1.2e-2})
    for value in (0.5, 0.9):
        taken = study.next_trial(opened)
        assert taken is not None
        taken[0].set_user_attr("result", {"text": f"accuracy {value}"})
        opened.study.tell(taken[0], value)
    taken = study.next_trial(opened)
    assert taken is not None
    table = live.table(opened, time.time() + 60)
    assert "2 done, 0 pruned, 0 failed, 1 running, 3 of 50; about " in table[0] and "left" in table[0]
    assert table[1].startswith("  best") and table[2].startswith("  running     2")
    opened.study.tell(taken[0], state=TrialState.PRUNED)
    begun, best = opened.study.get_trials()[:2]
    before = report.summary(opened)[-1]
    assert "0.4000 ahead of exp001 (0.5000) on one seed" in before and "--confirm 3" in before
    confirm.confirm(opened, 1)
    fresh = report.confirmed_scores(opened)
    assert fresh.keys() == {begun.number, best.number} and len(fresh[best.number]) == 2
    folder = paths.run_folder(opened.run_name(best))
    assert all((folder / f"seed{seed}").is_dir() for seed in confirm.new_seeds(opened))
    printed = capsys.readouterr().out
    assert f"trial {best.number} against exp001 on 2 new seeds" in printed
    for ours, word in (((0.9, 0.91), "better, beyond the noise"), ((0.9, 0.1), "within the noise"), ((0.1, 0.11), "worse, beyond the noise")):  # fmt: skip
        given = {best.number: list(ours), begun.number: [0.5, 0.5]}
        assert word in report.compared_on_seeds(opened, best.number, begun.number, given)


def test_conditional_knobs(tuned: Path) -> None:
    (tuned / "configs/tune/c.yaml").write_text(
        "search:\n  model.name: [test_resnet, test_efficientnet, test_convnext]\n"
        "  model.drop_path_rate: "
        "{low: 0.0, high: 0.3, when: {model.name: [test_efficientnet, test_convnext]}}\n"
        "  optim.clip_grad: {low: 0.3, high: 3.0, log: true, when: {model.name: test_convnext}}\nfolds: 1\n"
    )
    opened = join(14, space="c")
    own = {"test_resnet": 0, "test_efficientnet": 1, "test_convnext": 2}
    seen = set()
    while taken := study.next_trial(opened):
        name = taken[1]["model.name"]
        assert len(taken[1]) == 1 + own[name] == len(taken[0].params)
        opened.study.tell(taken[0], own[name] + taken[1].get("model.drop_path_rate", 0.0))
        seen.add(name)
    assert seen == own.keys() and opened.study.sampler._group  # type: ignore[union-attr]


def test_a_study_rejects_another_config(tuned: Path) -> None:
    join()
    with pytest.raises(UserError, match=r"was started with another train.batch_size"):
        join(None, "train.batch_size=16")
    join(None, "machine.gpu_cache_mb=0")  # changes no result


def test_two_objectives_have_a_pareto_front(tuned: Path) -> None:
    (tuned / "configs/tune/two.yaml").write_text(
        "search:\n  model.name: [test_resnet, test_efficientnet]\n"
        "objectives: [score, time]\npruner: none\nfolds: 1\n"
    )
    opened = join(2, space="two")
    assert run(opened) == run(opened) == TrialState.COMPLETE
    assert all(t.values[1] > 0 for t in opened.study.trials if t.values)
    assert opened.folder / "pareto.png" in report.write(opened)


@pytest.mark.parametrize(
    "name",
    ["tpe", "qmc", "random", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cmaes", "gp"))],
)
def test_samplers_by_name(tuned: Path, name: str) -> None:
    if name == "cmaes":
        pytest.importorskip("cmaes")
    (tuned / "configs/tune/n.yaml").write_text(
        "search:\n  optim.lr: {low: 1e-3, high: 2e-2, log: true}\n  model.drop_rate: {low: 0, high: 0.5}\n"
        f"sampler: {name}\n"
    )
    opened = join(14, space="n")
    seen = set()
    while taken := study.next_trial(opened):
        opened.study.tell(taken[0], -abs(taken[1]["optim.lr"] - 3e-3))
        seen.add(taken[1]["optim.lr"])
    assert len(seen) == 14
