"""Training from the command's side: early errors, damaged images, random draws, views, tasks."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import wandb_reader
from conftest import config

from comp import data, train, transforms
from comp.engine import cli, pages
from comp.engine.bank import bank, score
from comp.engine.data import folds, make_folds, prepare, samples
from comp.engine.errors import UserError
from comp.engine.run import data_loader, forward, predict_run, runner, views
from comp.engine.store import artifacts

TINY = [
    "track=none",
    "machine.num_workers=0",
    "machine.progress=false",
    "train.epochs=1",
    "schedule.warmup=0",
    "train.max_samples=48",
]


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


# --- pictures -----------------------------------------------------------------------------------------------


def test_a_damaged_image_stops_training_but_not_inference(project: Path) -> None:
    table = samples.load()
    train_rows = folds.load(table).split(0)[0][:48]
    victims = {
        "train": table.frame["images"].iloc[train_rows[5]][0],
        "test": table.frame["images"].iloc[table.positions("test")[3]][0],
    }
    cut = {kind: project / "data/raw" / path for kind, path in victims.items()}
    whole = {kind: file.read_bytes() for kind, file in cut.items()}
    for file in cut.values():
        file.write_bytes(file.read_bytes()[:-40])
    message = refusal(lambda: runner.train("exp001", TINY, fold="0", name="x"))
    assert victims["train"] in message and table.frame["id"].iloc[train_rows[5]] in message
    cut["train"].write_bytes(whole["train"])
    runner.train("exp001", TINY, fold="0", name="x")
    listed = (project / "runs/x/seed0/fold0/test_damaged.txt").read_text().splitlines()
    assert len(listed) == 1 and victims["test"] in listed[0]
    predictions = bank.read(project / "runs/x/seed0/fold0/test.arrow", table, folds.load(table))
    shares = predictions.probability(table.heads[0])[3]
    assert shares == pytest.approx(
        np.bincount(table.truth(table.heads[0], table.positions("train"))) / 1437, abs=1e-6
    )


def test_draws_are_a_function_of_seed_epoch_and_position(project: Path) -> None:
    """Independent of workers and resume points; an oversampled image is augmented differently each time."""
    rows = np.repeat(samples.load().positions("train")[:16], 4)

    def drawn(workers: int, first: int = 0) -> list[bytes]:
        cfg = config(*TINY[2:], f"machine.num_workers={workers}", "augment=heavy")
        loader = data_loader.Loader(cfg, samples.load(), torch.device("cpu"))
        plans = [data.training_batches(rows, 8, 7, epoch, first) for epoch in range(2)]
        return [p.numpy().tobytes() for plan in plans for batch in loader.batches(plan) for p in batch.images]

    alone = drawn(0)
    assert len(alone) == 128 and len(set(alone)) == 128
    assert drawn(2) == alone
    assert drawn(0, first=5) == alone[40:64] + alone[104:]


def test_a_recipe_with_a_wrong_argument_is_an_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import albumentations as A

    monkeypatch.setattr(
        pages.competition, "recipe", lambda size: transforms.Recipe([A.HorizontalFlip(prob=1)]), raising=False
    )
    assert "prob" in refusal(lambda: transforms.from_config(config("augment=recipe")))


def test_a_recipe_that_returns_something_else_is_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import albumentations as A

    monkeypatch.setattr(
        pages.competition, "recipe", lambda size: A.Compose([A.HorizontalFlip()]), raising=False
    )
    with pytest.raises(UserError) as caught:
        transforms.from_config(config("augment=recipe"))
    error = caught.value
    assert (error.code, error.where, error.key) == ("recipe-invalid", "comp/competition.py", "recipe")
    assert "Compose" in error.what and "Recipe([" in error.remedy


# --- the parts against what they promise --------------------------------------------------------------------


def test_views_are_those_of_the_square_and_cost_no_second_decode() -> None:
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    seen = {view(x).numpy().tobytes() for view in views.VIEWS.values()}
    assert len(seen) == len(views.VIEWS) == 8
    assert torch.equal(views.rot90(views.rot270(x)), x) and torch.equal(
        views.antitranspose(views.antitranspose(x)), x
    )


def test_views_are_averaged_in_their_space(project: Path) -> None:
    """The prediction of two views is the mean of the probabilities of each."""
    run = [*TINY, "predict.tta=[identity]"]
    for number in range(5):
        runner.train("exp001", run, fold=str(number), name="x")
    for tta in ("identity,hflip", "hflip"):
        predict_run.predict("x", tta=tta)
    table = samples.load()
    split = folds.load(table)
    alone, other, both = (
        bank.load(a, "test", table, split).probability(table.heads[0])
        for a in ("x", "x:tta-hflip", "x:tta-identity-hflip")
    )
    one_fold = [
        bank.read(project / "runs/x/seed0/fold0" / part / "test.arrow", table, split).probability(
            table.heads[0]
        )
        for part in ("", "tta-hflip", "tta-identity-hflip")
    ]
    rows = ~np.isnan(one_fold[0]).any(1)
    assert one_fold[2][rows] == pytest.approx((one_fold[0][rows] + one_fold[1][rows]) / 2, abs=1e-6)
    assert not np.allclose(alone[:48], other[:48], atol=1e-4)
    assert np.isnan(both[48:]).all(), "rows never predicted are NaN, never 0"


# --- tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "metric", "loss"),
    [
        ("binary", "roc_auc", "default"),
        ("regression", "rmse", "huber"),
        ("ordinal", "qwk", "mse"),
        ("ordinal", "qwk", "cumulative"),
        ("multiclass", "log_loss", "default"),
    ],
)
def test_every_task_trains_and_predicts(project: Path, task: str, metric: str, loss: str) -> None:
    table = pd.read_csv(project / "data/raw/train.csv", dtype=str)
    digit = table["label"].astype(int)
    labels = {"binary": digit > 4, "regression": digit * 1.5}
    table["label"] = pd.Series(labels.get(task, digit // 2)).astype(float).map("{:g}".format)
    table.to_csv(project / "data/raw/train.csv", index=False)
    overrides = [
        f"competition.{k}={v}"
        for k, v in {"task": task, "metric": metric, "submission.form": "value"}.items()
    ]
    overrides += ["competition.folds.scheme=group"]
    cfg = config(*overrides)
    prepare.prepare(cfg)
    make_folds.make(cfg, samples.load(), remake=True)
    for number in range(5):
        # The last fold of one task tells W&B, and the run as a whole with it: what is tracking_override
        # changes no result.
        tracking_override = ["track=offline"] if task == "regression" and number == 4 else []
        runner.train(
            "exp001", [*TINY, *overrides, f"loss={loss}", *tracking_override], fold=str(number), name="x"
        )
    record = artifacts.read_json(project / "runs/x/score.json")
    if task == "regression":
        residuals_and_summary(project, record)
    assert record["metric"] == metric and record["n"] == 5 and np.isfinite(record["oof"])
    if task == "ordinal":
        assert len(record["cuts"]["label"]) == 4
    loaded = samples.load()
    oof = bank.load("x", "oof", loaded, folds.load(loaded))
    assert score.evaluate(cfg, loaded, folds.load(loaded), oof)["oof"] == record["oof"]


def residuals_and_summary(project: Path, record: dict[str, Any]) -> None:
    """Read back from the offline files: a residual plot where there are no classes, and a summary run of all
    folds."""
    parts = [wandb_reader.read(file.parent) for file in (project / "wandb").rglob("run-*.wandb")]
    kinds = {part.run.job_type: part for part in parts}
    assert len(parts) == 2 and kinds.keys() == {"fold", "summary"}
    for part in parts:
        assert part.run.run_group == "x" and part.media("residuals").exists() and part.exit_code == 0
        assert not part.column("confusion") and any(name.endswith("-worst") for name in part.artifacts)
    summary = kinds["summary"]
    assert summary.summary["cv_oof"] == record["oof"] and summary.summary["cv_mean"] == record["mean"]
    assert summary.summary["cv_std"] == record["std"] and summary.summary["cv_n"] == 5
    assert summary.run.display_name == "x" and "x-oof" in summary.artifacts


def test_custom_loss_metric_and_model_from_competition_py(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metric(truth: Any, prediction: Any, rows: Any) -> float:
        return float((truth == prediction).mean() + rows["meta.pen"].notna().mean())

    metric.direction, metric.needs = "max", "label"  # type: ignore[attr-defined]
    hooks = {
        "loss": lambda output, target: (
            torch.nn.functional.cross_entropy(output, target, reduction="none") * 2
        ),
        "metric": metric,
        "model": lambda cfg, outputs: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(32 * 32, outputs)
        ),
    }
    for name, hook in hooks.items():
        monkeypatch.setattr(pages.competition, name, hook, raising=False)
    runner.train("exp001", [*TINY, "loss=loss", "competition.metric=metric"], fold="0", name="x")
    assert [*pages.in_force()] == ["model", "loss", "metric"]
    shapes = {
        k: tuple(v.shape) for k, v in _weights(project / "runs/x/seed0/fold0/weights.safetensors").items()
    }
    assert shapes == {"1.weight": (10, 1024), "1.bias": (10,)}


def _weights(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_half_precision_and_several_seeds(project: Path) -> None:
    two = [*TINY, "train.amp=bf16", "train.seeds=[0, 1]"]
    assert cli.main(["train", "exp001", *two, "--as", "x", "--seed", "1"]) == 0
    assert {file.name for file in (project / "runs/x").glob("seed*")} == {"seed1"}
    alone = artifacts.read_json(project / "runs/x/score.json")["oof"]
    assert cli.main(["train", "exp001", *two, "--as", "x"]) == 0, (
        "the seed that was left, and then both together"
    )
    assert artifacts.read_json(project / "runs/x/members/seed1/score.json")["oof"] == alone
    table = samples.load()
    split = folds.load(table)
    one, other, run = (bank.load(a, "oof", table, split) for a in ("x:seed0", "x:seed1", "x"))
    rows = one.predicted
    mean = (one.probability(table.heads[0]) + other.probability(table.heads[0])) / 2
    assert run.probability(table.heads[0])[rows] == pytest.approx(mean[rows], abs=1e-5)
    runner.train("exp001", two, fold="full", name="x")
    assert bank.find("x:full", "test").exists()


def test_wandb_offline_logs_the_whole_fold(project: Path) -> None:
    """Of a real fold, not of the tracker alone."""
    overrides = ["track=offline", "track.log_model=true", "machine.progress=false", "machine.num_workers=0"]
    runner.train("exp001", [*overrides, "train.epochs=2", "train.max_samples=48"], fold="0", name="x")
    parts = [wandb_reader.read(file.parent) for file in (project / "wandb").rglob("run-*.wandb")]
    (part,) = [part for part in parts if part.run.job_type == "fold"]
    assert part.run.run_group == "x" and part.config["model"]["name"] == "test_resnet"
    assert len(part.column("loss")) == len(part.column("lr")) == 2
    assert len(part.column("valid_metric")) == 2 and len(part.column("images_per_second")) == 2
    for image in ("augmentation", "confusion"):
        assert part.media(image).exists()
    for table in ("folds", "worst"):
        assert any(name.endswith(f"-{table}") for name in part.artifacts), table
    kinds = {artifact.type for artifact in part.artifacts.values()}
    assert {"predictions", "model"} <= kinds
    assert "code" in part.config and part.config["hardware"]["cores"] >= 1 and part.exit_code == 0


def test_out_of_memory_halves_the_batch_and_changes_no_output() -> None:
    sizes: list[int] = []

    class Small(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return x * 2

    network = forward.AutoBatch(Small(), 10)
    x = torch.arange(10.0)[:, None]
    assert torch.equal(network(x), x * 2) and torch.equal(network(x), x * 2)
    assert sizes[:3] == [10, 5, 3] and max(sizes[3:]) == 3, "the size that fits is used from then on"


def test_a_cpu_splits_large_batches() -> None:
    """Parts of about the same size, below the limit in bytes, and outputs in order."""
    sizes: list[int] = []

    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return x.flatten(1)[:, :1]

    x = torch.arange(40.0)[:, None, None, None].expand(40, 3, 224, 224)
    assert torch.equal(forward.AutoBatch(Counting(), 64)(x).flatten(), torch.arange(40.0))
    assert sizes == [14, 13, 13] and 14 * x[0].nbytes <= forward.CPU_BATCH_BYTES
    sizes.clear()
    assert len(forward.AutoBatch(Counting(), 64)(x[:, :, :32, :32])) == 40 and sizes == [40], (
        "small images are one part"
    )


def test_replicas_share_weights_and_nothing_else() -> None:
    together = threading.Barrier(2)  # both are inside before either goes on

    class Stateful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.input = x
            together.wait()
            return self.input * self.weight

    first, second = forward._replicas(Stateful(), 2)
    assert second.weight is first.weight
    calls = [partial(one, torch.tensor(value)) for one, value in ((first, 3.0), (second, 5.0))]
    assert list(forward._in_order(iter(calls), 2)) == [6.0, 10.0]


def test_locked_rows_are_read_by_last_look_only(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["competition.folds.holdout=0.2"]
    make_folds.make(config(*overrides), samples.load(), remake=True)
    table = samples.load()
    split = folds.load(table)
    locked = set(split.holdout_rows().tolist())
    assert 200 < len(locked) < 400
    for number in [*range(5), "full"]:
        assert not locked & set(np.concatenate(split.split(number)).tolist())
    for number in range(5):
        runner.train("exp001", [*TINY, *overrides], fold=str(number), name="x")
    assert not locked & set(bank.load("x", "oof", table, split).row.tolist())
    capsys.readouterr()
    predict_run.predict("x", last_look=True)
    predict_run.predict("x", last_look=True)
    out = capsys.readouterr().out
    assert f"on {len(locked)} held-out rows, look 1" in out and "look 2" in out


def test_a_line_per_epoch_is_printed_without_a_progress_bar(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOG_INTERVAL", 0)
    runner.train("exp001", [*TINY, "machine.progress=true"], fold="0", name="x", profile=True)
    output = capsys.readouterr().out
    found = re.findall(
        r"seed 0 fold 0, epoch (\d+) of \d+: loss [\d.]+, valid_loss [\d.]+, valid_accuracy [\d.]+, "
        r"\d+ images/s, (\d+) s left",
        output,
    )
    assert found and found[0][0] == "1" and found[-1][1] == "0"
    shares = dict(re.findall(r"^(\w[\w ]+?) +[\d.]+ s +(\d+)%", output, re.MULTILINE))
    assert {"data loading", "forward", "backward", "step", "validation"} <= shares.keys()
    assert 95 <= sum(map(int, shares.values())) <= 105 and ("the loader" in output or "the network" in output)


def test_a_run_that_does_not_fit_on_the_disk_is_an_error_before_it_starts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(project)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**28))
    message = refusal(lambda: runner.train("exp001", TINY, fold="0", name="x"))
    assert "runs/x" in message and "comp clean" in message and not (project / "runs/x/seed0").exists()
