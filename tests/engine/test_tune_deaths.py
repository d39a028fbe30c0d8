"""Studies whose processes are killed, crash or run out of memory: no trial is lost, none runs twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from optuna.trial import TrialState, create_trial
from studies import FOREVER, SMALL, join, run, states, with_space

from comp import train
from comp.engine import cli, hardware
from comp.engine.run import execute, fingerprint, loading, tracking
from comp.engine.store import artifacts
from comp.engine.tune import study, trial
from comp.engine.tune.study import OpenStudy


@pytest.fixture
def tuned(project: Path) -> Path:
    return with_space(project)


def test_a_killed_trial_resumes_in_its_folder_and_has_the_same_weights(tuned: Path) -> None:
    opened = join()

    def die() -> None:
        seen = 0

        def log(self: Any, record: Any) -> None:
            nonlocal seen
            seen += 1
            original(self, record)
            if "epoch" in record and "fold" not in record and seen > 4:
                os.kill(os.getpid(), signal.SIGKILL)

        original = tracking.RunLogger.log
        tracking.RunLogger.log = log  # type: ignore[method-assign]
        run(join())

    assert os.WIFSIGNALED(forked(die))
    assert states(opened)[0] == "RUNNING"
    assert run(opened) == TrialState.COMPLETE
    trials = opened.study.get_trials(deepcopy=False)
    again = next(t for t in trials if t.state == TrialState.COMPLETE)
    assert trials[0].state == TrialState.FAIL and again.user_attrs["retry_of"] == 0
    assert again.params == trials[0].params and again.user_attrs["folder"] == 0
    killed = {
        f.parent.name: artifacts.sha256(f)
        for f in (tuned / "runs/.studies/exp001-s/0000").rglob("weights.safetensors")
    }

    cfg = opened.config(study.setting_of(opened.space, again))
    context = loading.load_context(cfg)
    fingerprint.claim("whole", cfg, context.folds, "")
    for number in range(2):
        execute.run_fold(context, "whole", 0, number, stop=hardware.Stop(), search=True)
    whole = {
        f.parent.name: artifacts.sha256(f) for f in (tuned / "runs" / "whole").rglob("weights.safetensors")
    }
    assert killed == whole and len(whole) == 2


def test_only_trials_of_dead_processes_are_queued_again(tuned: Path) -> None:
    opened = join(20)
    living = study.next_trial(opened)
    assert living is not None
    forked(lambda: study.next_trial(join(20)))  # ends without telling the study
    queued = study.requeue_dead(opened)
    assert queued == [1] and states(opened)[:2] == ["RUNNING", "FAIL"]
    assert study.requeue_dead(opened) == [], "one successor each"
    taken = study.next_trial(opened)
    assert taken is not None and taken[0].user_attrs["retry_of"] == 1
    assert living[0].number == 0 and states(opened)[0] == "RUNNING"


def test_successors_come_before_known_settings_over_the_budget(tuned: Path) -> None:
    old = join()
    taken = study.next_trial(old)
    assert taken is not None
    old.study.tell(taken[0], 0.5)
    (tuned / "configs/tune/t.yaml").write_text("search:\n  optim.lr: {low: 1e-4, high: 0.1, log: true}\n")
    old.study.add_trial(_completed(old, 0.9))
    forked(lambda: study.next_trial(join(1, space="t")))  # the experiment's own; what exp001-s found waits
    opened = join(1, space="t")
    taken = study.next_trial(opened)
    assert taken is not None and taken[0].user_attrs["retry_of"] == 0
    opened.study.tell(taken[0], 0.5)
    assert study.next_trial(opened) is None
    taken = study.next_trial(join(2, space="t"))
    assert taken is not None and taken[0].user_attrs["from"] == "exp001-s"
    assert taken[1]["optim.lr"] == 2e-3


def _completed(opened: OpenStudy, value: float) -> Any:
    params = {"optim.lr": 2e-3, "model.drop_rate": 0.1}
    kinds = {knob.key: study.distribution(knob) for knob in opened.space.knobs}
    return create_trial(params=params, distributions=kinds, value=value)


def test_killed_between_closing_a_trial_and_queueing_its_successor(tuned: Path) -> None:
    opened = join(20)
    forked(lambda: study.next_trial(join(20)))
    frozen = opened.study.get_trials(deepcopy=False)[0]
    opened.storage.set_trial_state_values(frozen._trial_id, TrialState.FAIL)  # where the process was killed
    assert study.requeue_dead(opened) == [0]


def test_a_setting_that_kills_its_process_repeatedly_is_given_up(tuned: Path) -> None:
    opened = join(20)
    for _ in range(study.MAX_DEATHS):
        forked(lambda: study.next_trial(join(20)))
    study.requeue_dead(opened)
    last = opened.study.get_trials(deepcopy=False)[-1]
    assert last.state == TrialState.FAIL and last.user_attrs["error"]["kind"] == "killed"
    assert study.requeue_dead(opened) == []


def test_out_of_memory_is_recorded_and_not_tried_again_at_that_size(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tuned / "configs/tune/big.yaml").write_text(
        "search:\n  train.batch_size: [8, 16, 32, 64]\nfolds: 1\nsampler: grid\n"
    )
    opened = join(space="big")

    def fold(context: Any, *rest: Any, **more: Any) -> None:
        if context.cfg.train.batch_size >= 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        original(context, *rest, **more)

    original = train.train_fold
    monkeypatch.setattr(train, "train_fold", fold)
    ends = []
    while taken := study.next_trial(opened):
        ends.append(trial.run(opened, *taken, hardware.Stop(), FOREVER).name)
    trials = opened.study.get_trials(deepcopy=False)
    assert trials[0].params["train.batch_size"] == 32 and trials[0].user_attrs["error"]["kind"] == "memory"
    big = next(t for t in trials if t.params["train.batch_size"] == 64)
    assert big.user_attrs["skipped"] == "trial 0 ran out of memory, and this one is no smaller"
    assert ends == ["FAIL", "COMPLETE", "COMPLETE"]


def test_three_crashes_in_a_row_end_the_search(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("no such")

    monkeypatch.setattr(train, "train_fold", fail)
    assert cli.main(["tune", "exp001", "--space", "s", "--trials", "9", *SMALL]) == 2
    printed = capsys.readouterr()
    assert "3 trials in a row failed, the last with: 'no such'" in printed.err
    trials = join().study.get_trials(deepcopy=False)
    assert [t.user_attrs["error"]["kind"] for t in trials if "error" in t.user_attrs] == ["crash"] * 3
    assert "KeyError" in (tuned / "runs/.studies/exp001-s/0000/error.txt").read_text()
