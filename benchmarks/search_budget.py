"""Whether a search that prunes finds better settings than random search for the same epochs: the practice digits, 20 % of the labels
flipped, and a network so small that a fold trains in about a second.

    .venv/bin/python benchmarks/search_budget.py [--repetitions 5]

The rule. Both arms search the same space from the same first setting, the experiment's own, and may spend as many epochs as 60 fold
trainings of full length: `random` trains all five folds of every setting, so it sees 12; `pruned` is what configs/tune/quick.yaml
says (tpe, median). A trial that would end beyond the budget is cut off and does not count. Each arm chooses the completed trial
with the best OOF log loss; that setting is trained on three fresh seeds, all folds, and the mean of their OOF log losses is the
arm's result. The first setting is retrained the same way, to see what searching was worth at all. Each repetition flips other labels
and begins with another seed; samplers are not seeded. A table and JSON come out; lower is better. Bar: the pruned arm better on
average over the repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"))

import numpy as np
import torch
from optuna.trial import TrialState
from torch import Tensor, nn

from comp import competition
from comp.engine import hardware
from comp.engine.config import resolve
from comp.engine.data import make_folds, prepare, samples
from comp.engine.extras import practice
from comp.engine.run import execute, fingerprint, loading
from comp.engine.run.distributed import Pruned
from comp.engine.store import paths
from comp.engine.tune import confirm, objective, study, trial
from comp.engine.tune.open_study import open_study

PROJECT = Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"
EPOCHS, FOLD_TRAININGS, FLIPPED = 6, 60, 0.2
BUDGET = FOLD_TRAININGS * EPOCHS
COMPETITION = """
slug: practice
title: Practice
raw: data/raw
train: {table: train.csv, image: "train/{id}.png"}
test: {table: test.csv, image: "test/{id}.png"}
id: id
target: label
task: multiclass
metric: log_loss
group: writer
folds: {scheme: stratified_group, k: 5, seed: 0}
submission: {sample: sample_submission.csv, form: label}
"""
EXPERIMENT = f"""
base: base
data: {{size: 16, channels: 1}}
augment: {{recipe: none}}
train: {{epochs: {EPOCHS}, batch_size: 64}}
machine: {{device: cpu, num_workers: 0, progress: false}}
track: {{mode: none}}
"""
SPACE = """
search:
  optim.lr: {low: 1e-4, high: 3e-2, log: true}
  optim.weight_decay: {low: 1e-3, high: 0.5, log: true}
  model.drop_rate: {low: 0.0, high: 0.6}
  loss.label_smoothing: {low: 0.0, high: 0.3}
"""
ARMS = {
    "random": "sampler: random\npruner: none\ntrials: 1000\n",
    "pruned": "sampler: tpe\npruner: median\ntrials: 1000\n",
}


class Small(nn.Module):
    def __init__(self, drop_rate: float, outputs: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 3, 2, 1), nn.Conv2d(12, 24, 3, 2, 1)
        self.norm, self.drop = nn.BatchNorm2d(24), nn.Dropout(drop_rate)
        self.last = nn.Linear(24 * 4 * 4, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 16, 16)
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(x)))
        return self.last(self.drop(x.flatten(1)))


def lay_out(root: Path, raw: Path, repetition: int) -> None:
    """A project with its own flipped labels."""
    (root / "configs" / "tune").mkdir(parents=True)
    shutil.copy(PROJECT / "configs" / "base.yaml", root / "configs")
    (root / "configs" / "competition.yaml").write_text(COMPETITION)
    (root / "configs" / "exp001.yaml").write_text(f"{EXPERIMENT}\n")
    for arm, how in ARMS.items():
        (root / "configs" / "tune" / f"{arm}.yaml").write_text(SPACE + how)
    shutil.copytree(raw, root / "data" / "raw")
    random = np.random.default_rng(repetition)
    table = root / "data" / "raw" / "train.csv"
    with table.open() as opened:
        rows = list(csv.DictReader(opened))
    for row in rows:
        if random.random() < FLIPPED:
            row["label"] = str((int(row["label"]) + random.integers(1, 10)) % 10)  # never the right one
    with table.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    enter(root)
    prepare.prepare(resolve.load(root, "base").config)
    make_folds.make(resolve.load(root, "base").config, samples.load())


def enter(root: Path) -> None:
    os.environ["COMP_ROOT"] = str(root)
    os.chdir(root)
    paths.root.cache_clear()


def one_arm(arm: str, repetition: int) -> dict[str, Any]:
    """A search until the epochs are spent, through what `comp tune` calls itself."""
    opened = open_study("exp001", [f"train.seeds=[{repetition}]"], arm, None)
    spent, original = 0, trial.EpochReporter.epoch

    def counting(self: trial.EpochReporter, record: dict[str, Any]) -> None:
        nonlocal spent
        spent += 1
        if spent > BUDGET:
            raise Pruned
        original(self, record)

    trial.EpochReporter.epoch = counting
    try:
        while spent < BUDGET:
            taken = study.next_trial(opened)
            assert taken is not None
            trial.run(opened, *taken, hardware.Stop(), float("inf"))
    finally:
        trial.EpochReporter.epoch = original
    ended = opened.study.get_trials(deepcopy=False)
    assert not any(t.state == TrialState.FAIL for t in ended), [t.user_attrs for t in ended]
    done = [t for t in ended if t.state == TrialState.COMPLETE]
    best = opened.ranked()[0]
    own = next(t for t in done if t.user_attrs.get("from") == "exp001")
    retrained = {
        name: float(np.mean(retrain(opened, f"{arm}-{name}", study.setting_of(opened.space, each))))
        for name, each in (("chosen", best), ("first", own))
        if name == "chosen" or arm == "random"
    }
    return {
        "settings": len(ended),
        "completed": len(done),
        "epochs": spent,
        "in_search": best.values[0],
        "setting": study.setting_of(opened.space, best),
        **retrained,
    }


def retrain(opened: study.OpenStudy, name: str, setting: dict[str, Any]) -> list[float]:
    cfg = opened.config(setting)
    context = loading.load_context(cfg)
    fingerprint.claim(name, cfg, context.folds, "")
    values = []
    for seed in confirm.new_seeds(opened):
        for number in range(context.folds.count):
            execute.run_fold(context, name, seed, number, stop=hardware.Stop(), search=True)
        values.append(objective.cv_score(opened, context, name, seed)["value"])
    return values


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    competition.model = lambda cfg, outputs: Small(cfg.model.drop_rate, outputs)
    lines: list[dict[str, Any]] = []
    print("repetition  first   random (completed of tried)  pruned (completed of tried)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name in ("configs", "raw"):
            (Path(folder) / name).mkdir()
        shutil.copy(PROJECT / "configs" / "base.yaml", Path(folder) / "configs")
        enter(Path(folder))
        practice.make(Path(folder) / "raw")
        for repetition in range(args.repetitions):
            lay_out(Path(folder) / str(repetition), Path(folder) / "raw", repetition)
            arms = {arm: one_arm(arm, repetition) for arm in ARMS}
            lines.append({"repetition": repetition, **arms})
            told = "  ".join(
                f"{a['chosen']:.4f} ({a['completed']:2d} of {a['settings']:2d})          "
                for a in arms.values()
            )
            print(f"{repetition:10d}  {arms['random']['first']:.4f}  {told}", file=sys.stderr, flush=True)
    gains = [line["random"]["chosen"] - line["pruned"]["chosen"] for line in lines]
    report = {
        "what": f"OOF log loss on fresh seeds of the setting chosen for {FOLD_TRAININGS} fold trainings, {len(lines)} repetitions",
        "first": round(float(np.mean([line["random"]["first"] for line in lines])), 4),
        "random": round(float(np.mean([line["random"]["chosen"] for line in lines])), 4),
        "pruned": round(float(np.mean([line["pruned"]["chosen"] for line in lines])), 4),
        "gain": round(float(np.mean(gains)), 4),
        "gain_std": round(float(np.std(gains, ddof=1)), 4) if len(gains) > 1 else None,
        "pruned_better_in": f"{sum(g > 0 for g in gains)} of {len(gains)}",
        "repetitions": lines,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
