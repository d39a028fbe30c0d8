"""Regression targets: standardized by the training rows of the fold, predicted and logged in their own
unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import config
from safetensors.torch import load_file
from test_losses import samples_of

from comp import competition, losses
from comp.engine.bank import bank, score
from comp.engine.config import experiments
from comp.engine.data import folds, make_folds, prepare, samples
from comp.engine.run import loading, runner, tracking
from comp.engine.store import artifacts, paths

FORTY_STEPS = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "train.ema_decay=null", "train.max_samples=160", "train.batch_size=16",
    "train.epochs=4", "augment=none",
]  # fmt: skip


def declare_values(
    project: Path, scale: float, shift: float, task: str = "regression", metric: str = "r2"
) -> None:
    """The project's target becomes the digit in some unit: with 1000 and 9500 a value of 5,000 to 14,000."""
    raw, file = pd.read_csv(project / "data/raw/train.csv", dtype=str), project / "configs/competition.yaml"
    if task == "regression":
        raw["label"] = [repr(scale * (int(label) - 4.5) + shift) for label in raw["label"]]
        raw.to_csv(project / "data/raw/train.csv", index=False)
    text = file.read_text().replace("task: multiclass", f"task: {task}")
    file.write_text(
        text.replace("metric: accuracy", f"metric: {metric}").replace("form: label", "form: value")
    )
    prepare.prepare(config(experiment="base"))
    make_folds.make(config(experiment="base"), samples.load(), remake=True)


def learn(
    project: Path, scale: float, shift: float, *overrides: str, task: str = "regression", metric: str = "r2"
) -> float:
    """The score of fold 0, whose target is the digit in some unit. The run is x."""
    declare_values(project, scale, shift, task, metric)
    runner.train("exp001", [*FORTY_STEPS, *overrides], fold="0", name="x")
    table = samples.load()
    oof = bank.read(paths.fold_folder("x", 0, 0) / "oof.arrow", table, folds.load(table))
    head = table.heads[0]
    return score.validation_score(config(), head, oof.heads[head.name], table, oof.row.astype(np.int64))


R2: list[float] = []


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (10.0, 45.0), (1000.0, 9500.0)])
def test_training_does_not_depend_on_the_unit_of_the_target(
    project: Path, scale: float, shift: float
) -> None:
    """The logged loss is in that unit: the mean squared error of the predictions."""
    R2.append(learn(project, scale, shift))
    assert R2[-1] > 0.2
    assert abs(R2[-1] - R2[0]) < 0.02
    *_, epoch = [e for e in tracking.read(paths.fold_folder("x", 0, 0) / "log.jsonl") if "valid_loss" in e]
    table = samples.load()
    oof = bank.read(paths.fold_folder("x", 0, 0) / "oof.arrow", table, folds.load(table))
    assert len(oof.row) == 160
    away = oof.heads["label"][:, 0].astype(np.float64) - table.targets(table.heads[0])[oof.row, 0]
    assert epoch["valid_loss"] == pytest.approx((away**2).mean(), rel=1e-4)
    assert 0.2 * scale**2 < epoch["train_loss"] < 9 * scale**2


def test_mean_and_std_of_training_rows_are_stored_with_every_set_of_weights(project: Path) -> None:
    kinds = ["raw", "swa", "tail", "uniform", "greedy"]
    learn(
        project, 1000.0, 9500.0, "train.ema_decay=0.9", f"average.members=[{','.join(kinds)}]", "snapshots.cycles=2",
        "average.tail_epochs=2", "train.max_samples=96",
    )  # fmt: skip
    table = samples.load()
    train_rows = folds.load(table).inner_split(0, config().select.validation_fraction)[0][:96]
    values = table.targets(table.heads[0])[train_rows, 0]
    for inside in ("", *kinds, "snap1"):
        place = paths.fold_folder("x", 0, 0) / inside
        found = load_file(place / "weights.safetensors")
        assert found["target_mean"].tolist() == pytest.approx([values.mean()], rel=1e-6), inside
        assert found["target_std"].tolist() == pytest.approx([values.std()], rel=1e-6), inside
        oof = bank.read(place / "oof.arrow", table, folds.load(table))
        assert abs(oof.heads["label"].mean() - values.mean()) < 2 * values.std(), inside
    runner.train(
        "exp001", [*FORTY_STEPS, "model.pretrained=run:x", "train.max_samples=64"], fold="0", name="y"
    )
    again = load_file(paths.fold_folder("y", 0, 0) / "weights.safetensors")["target_mean"]
    own = table.targets(table.heads[0])[folds.load(table).split(0)[0][:64], 0]
    assert again.tolist() == pytest.approx([own.mean()], rel=1e-6), "measured anew, not taken over"


def test_the_audit_recomputes_target_statistics(project: Path) -> None:
    from safetensors.torch import save_file

    from comp.engine.extras import audit_statistics
    from comp.engine.extras.findings import Leak
    from comp.engine.run import target_scaler

    learn(project, 1000.0, 9500.0, "train.epochs=1", "schedule.warmup=0", "train.max_samples=48")
    table = samples.load()
    split, place = folds.load(table), paths.fold_folder("x", 0, 0)
    context = loading.load_context(experiments.stored_config("x"))
    assert audit_statistics.leaks(context, [place / "weights.safetensors"]) == []
    train_rows, scored = (rows[:48] for rows in split.split(0))
    numbers = target_scaler.mean_and_std(table.heads[0], table, np.union1d(train_rows, scored))
    mean, deviation = (torch.tensor(each).float() for each in numbers)
    file = place / "weights.safetensors"
    save_file(load_file(file) | {"target_mean": mean, "target_std": deviation}, file)
    artifacts.add_to_manifest(file)
    (found,) = audit_statistics.leaks(context, [place / "weights.safetensors"])
    assert isinstance(found, Leak) and found.name == "statistics fitted on validation rows"
    assert "fold0" in found.where


def test_a_custom_loss_gets_the_unit_of_the_target(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((float(output.detach().mean()), float(target.mean())))
        return (output[:, 0] - target) ** 2

    monkeypatch.setattr(competition, "loss", loss, raising=False)
    assert learn(project, 1000.0, 9500.0, "loss.name=loss") > 0
    assert all(abs(output - target) < 4000 and 6000 < target < 13000 for output, target in seen)


@pytest.mark.parametrize("name", ["l1", "huber"])
def test_grades_are_standardized_and_have_class_weights(project: Path, name: str) -> None:
    few = [f"loss.name={name}", "loss.class_weights=balanced", "train.epochs=2"]
    assert learn(project, 1, 0, *few, task="ordinal", metric="qwk") > 0
    weights = load_file(paths.fold_folder("x", 0, 0) / "weights.safetensors")
    assert weights["target_mean"].item() == pytest.approx(4.5, abs=0.5)


def test_missing_values_are_left_out_and_a_constant_has_deviation_1() -> None:
    from comp.engine.run import target_scaler

    nan = float("nan")
    columns = torch.tensor(
        [[1.0, 7.0, nan, 1e8], [3.0, 7.0, nan, 1e8], [nan, 7.0, nan, 1e8], [9e9, 9e9, 9e9, 9e9]]
    )
    table = samples_of("regression", columns)
    mean, deviation = target_scaler.mean_and_std(table.heads[0], table, np.array([0, 1, 1, 2]))
    assert mean.tolist() == [2, 7, 0, 1e8] and deviation.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["mse", "l1", "huber", "log_cosh"])
def test_neither_gradients_nor_the_share_of_a_column_depend_on_the_unit(empty: Path, name: str) -> None:
    """delta is in the unit of the target, and so is the logged value of every loss."""
    from comp.engine.run import target_scaler

    plain = np.random.default_rng(0).normal(size=(50, 2))
    output = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))

    def gradients(unit: float, *knobs: str) -> torch.Tensor:
        values, rows = plain * [1.0, unit] + [0.0, 5 * unit], np.arange(50)
        table, cfg = samples_of("regression", torch.tensor(values)), config(f"loss.name={name}", *knobs)
        table = replace(table, heads=(replace(table.heads[0], outputs=("a", "b")),))
        mean, deviation = target_scaler.mean_and_std(table.heads[0], table, rows)
        target = torch.tensor(target_scaler.standardize(cfg, table, rows, [values])[0]).float()
        x = output.clone().requires_grad_()
        losses.build_loss(cfg, table, rows)(x, [target]).sum().backward()
        logged = losses.build_loss(cfg, table, rows, False)(output, [target])
        there = torch.tensor(output.numpy() * deviation + mean).float()
        delta = {"delta": cfg.loss.delta} if cfg.loss.delta else {}
        wanted = losses.LOSSES[name](there, torch.tensor(values).float(), **delta)
        if name == "log_cosh":  # half of a square within a deviation of whatever the target is
            wanted = losses.log_cosh(output, target) * torch.tensor(deviation).float() ** 2
        assert logged.numpy() == pytest.approx(wanted.mean(1).numpy(), rel=2e-3)
        assert x.grad is not None
        return x.grad

    if name == "huber":
        of_one, of_both = gradients(1.0, "loss.delta=0.5"), gradients(1000.0, "loss.delta=0.5")
        assert of_both[:, 0].numpy() == pytest.approx(of_one[:, 0].numpy())
        assert float(of_both[:, 1].abs().max()) == pytest.approx(
            0.5 * 0.5 / (1000 * plain[:, 1].std()), rel=1e-3
        )
        return
    assert gradients(1000.0).numpy() == pytest.approx(gradients(1.0).numpy(), rel=1e-3, abs=1e-5)
