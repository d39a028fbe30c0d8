"""Training as a user meets it: refusals before anything is spent, damaged pictures, identity, views, tasks."""

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

from comp import bank, cli, folds, jobs, own, samples, score, store
from comp.config import Refused
from comp.predict import tta
from comp.prepare import assign, tables
from comp.train import augment, data, evaluate, loop, model

TINY = [
    "track=none",
    "machine.workers=0",
    "machine.progress=false",
    "train.epochs=1",
    "schedule.warmup=0",
    "train.limit=48",
]


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(Refused) as refused:
        work()
    return str(refused.value)


# --- before anything is spent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=resnet81", ["resnet81", "resnet18"]),
        ("loss.name=mse", ["mse", "cross_entropy"]),
        ("augment.recipe=hevay", ["hevay", "heavy"]),
        ("augment.recipe=recipe", ["comp/competition.py defines no recipe"]),
        ("predict.tta=[hflp]", ["hflp", "hflip"]),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_the_nearest(
    project: Path, override: str, words: list[str]
) -> None:
    said = refusal(lambda: jobs.train("exp001", [*TINY, override], fold="0", name="x"))
    assert all(word in said for word in words), said
    assert not (project / "runs/x").exists(), "a refused start must leave nothing that blocks the next"


def test_an_override_that_changes_results_needs_a_name(project: Path) -> None:
    assert "--as NAME" in refusal(lambda: jobs.train("exp001", ["optim.rate=1"]))
    assert not (project / "runs").exists()


def test_another_config_under_the_same_name_is_refused_and_the_way_on_is_named(project: Path) -> None:
    jobs.train("exp001", TINY, fold="0", name="x")
    before = store.sha256(project / "runs/x/seed0/fold0/weights.safetensors")
    said = refusal(lambda: jobs.train("exp001", [*TINY, "optim.rate=1e-4"], fold="0", name="x"))
    assert "optim.rate: 0.005 there, 0.0001 here" in said and "--as" in said and "--fresh" in said
    assert store.sha256(project / "runs/x/seed0/fold0/weights.safetensors") == before
    jobs.train("exp001", [*TINY, "optim.rate=1e-4"], fold="0", name="x", fresh=True)
    assert store.sha256(project / "runs/x/seed0/fold0/weights.safetensors") != before
    assert len(list((project / "runs/.trash").iterdir())) == 1
    jobs.train(
        "exp001", [*TINY, "optim.rate=1e-4", "train.seeds=[1]"], fold="0", name="x"
    )  # another seed is the same run


def test_a_knob_without_effect_says_so(project: Path) -> None:
    cfg = config("model.drop_path_rate=0.1", "model.name=test_vit", "data.size=160")
    heads = samples.load().heads
    model.build(cfg, heads, pretrained=False)
    said = refusal(
        lambda: model.build(config("model.drop_path_rate=0.1", "model.name=vgg11"), heads, pretrained=False)
    )
    assert "model.drop_path_rate" in said and "vgg11" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(project: Path) -> None:
    said = refusal(
        lambda: jobs.train(
            "exp001", [*TINY, "optim.rate=1e30", "optim.clip=null", "train.batch_size=8"], fold="0", name="x"
        )
    )
    assert "at step" in said or "validation" in said
    assert not (project / "runs/x/seed0/fold0/weights.safetensors").exists()


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_a_damaged_picture_stops_training_and_not_inference(project: Path) -> None:
    table = samples.load()
    taught = folds.load(table).split(0)[0][:48]
    victims = {
        "train": table.frame["images"].iloc[taught[5]][0],
        "test": table.frame["images"].iloc[table.positions("test")[3]][0],
    }
    cut = {kind: project / "data/raw" / path for kind, path in victims.items()}
    whole = {kind: file.read_bytes() for kind, file in cut.items()}
    for file in cut.values():
        file.write_bytes(file.read_bytes()[:-40])
    said = refusal(lambda: jobs.train("exp001", TINY, fold="0", name="x"))
    assert victims["train"] in said and table.frame["id"].iloc[taught[5]] in said
    cut["train"].write_bytes(whole["train"])
    jobs.train("exp001", TINY, fold="0", name="x")
    listed = (project / "runs/x/seed0/fold0/test_damaged.txt").read_text().splitlines()
    assert len(listed) == 1 and victims["test"] in listed[0]
    said_of = bank.read(project / "runs/x/seed0/fold0/test.arrow", table, folds.load(table))
    shares = said_of.probability(table.heads[0])[3]
    assert shares == pytest.approx(
        np.bincount(table.truth(table.heads[0], table.positions("train"))) / 1437, abs=1e-6
    )


def test_draws_are_a_function_of_seed_epoch_and_position(project: Path) -> None:
    """Workers, starting points and loaders do not show; an oversampled sample is never drawn twice the same way."""
    rows = np.repeat(samples.load().positions("train")[:16], 4)

    def drawn(workers: int, first: int = 0) -> list[bytes]:
        cfg = config(*TINY[2:], f"machine.workers={workers}", "augment=heavy")
        feed = data.Feed(cfg, samples.load(), torch.device("cpu"))
        plans = [data.training_batches(rows, 8, 7, epoch, first) for epoch in range(2)]
        return [p.numpy().tobytes() for plan in plans for batch in feed.batches(plan) for p in batch.pictures]

    alone = drawn(0)
    assert len(alone) == 128 and len(set(alone)) == 128
    assert drawn(2) == alone
    assert drawn(0, first=5) == alone[40:64] + alone[104:]


def test_a_recipe_with_a_wrong_argument_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import albumentations as A

    monkeypatch.setattr(
        own.competition, "recipe", lambda size: augment.Recipe([A.HorizontalFlip(prob=1)]), raising=False
    )
    assert "prob" in refusal(lambda: augment.named(config("augment=recipe")))


# --- the parts against what they promise ---------------------------------------------------------------------------------


def test_views_are_those_of_the_square_and_cost_no_second_decode() -> None:
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    seen = {view(x).numpy().tobytes() for view in tta.VIEWS.values()}
    assert len(seen) == len(tta.VIEWS) == 8
    assert torch.equal(tta.rot90(tta.rot270(x)), x) and torch.equal(
        tta.antitranspose(tta.antitranspose(x)), x
    )


def test_views_are_averaged_in_their_space(project: Path) -> None:
    """The member of two views is the mean, in probability, of what each view says alone."""
    run = [*TINY, "predict.tta=[identity]"]
    for number in range(5):
        jobs.train("exp001", run, fold=str(number), name="x")
    for views in ("identity,hflip", "hflip"):
        jobs.predict("x", tta=views)
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


# --- tasks ---------------------------------------------------------------------------------------------------------------


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
def test_every_task_goes_the_whole_road(project: Path, task: str, metric: str, loss: str) -> None:
    table = pd.read_csv(project / "data/raw/train.csv", dtype=str)
    digit = table["label"].astype(int)
    labels = {"binary": digit > 4, "regression": digit * 1.5}
    table["label"] = pd.Series(labels.get(task, digit // 2)).astype(float).map("{:g}".format)
    table.to_csv(project / "data/raw/train.csv", index=False)
    said = [
        f"competition.{k}={v}"
        for k, v in {"task": task, "metric": metric, "submission.form": "value"}.items()
    ]
    said += ["competition.folds.scheme=group"]
    cfg = config(*said)
    tables.prepare(cfg)
    assign.make(cfg, samples.load(), remake=True)
    for number in range(5):
        # The last fold of one task tells W&B, and the run as a whole with it: what is told changes no result.
        told = ["track=offline"] if task == "regression" and number == 4 else []
        jobs.train("exp001", [*TINY, *said, f"loss={loss}", *told], fold=str(number), name="x")
    record = store.read_json(project / "runs/x/score.json")
    if task == "regression":
        residuals_and_summary(project, record)
    assert record["metric"] == metric and record["n"] == 5 and np.isfinite(record["oof"])
    if task == "ordinal":
        assert len(record["cuts"]["label"]) == 4
    loaded = samples.load()
    oof = bank.load("x", "oof", loaded, folds.load(loaded))
    assert score.of(cfg, loaded, folds.load(loaded), oof)["oof"] == record["oof"]


def residuals_and_summary(project: Path, record: dict[str, Any]) -> None:
    """Read back from the offline files: a plot of residuals where there are no classes, and a run that speaks for all folds."""
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
        monkeypatch.setattr(own.competition, name, hook, raising=False)
    jobs.train("exp001", [*TINY, "loss=loss", "competition.metric=metric"], fold="0", name="x")
    assert [*own.in_force()] == ["model", "loss", "metric"]
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
    alone = store.read_json(project / "runs/x/score.json")["oof"]
    assert cli.main(["train", "exp001", *two, "--as", "x"]) == 0, (
        "the seed that was left, and then both together"
    )
    assert store.read_json(project / "runs/x/members/seed1/score.json")["oof"] == alone
    table = samples.load()
    split = folds.load(table)
    one, other, run = (bank.load(a, "oof", table, split) for a in ("x:seed0", "x:seed1", "x"))
    rows = one.predicted
    mean = (one.probability(table.heads[0]) + other.probability(table.heads[0])) / 2
    assert run.probability(table.heads[0])[rows] == pytest.approx(mean[rows], abs=1e-5)
    jobs.train("exp001", two, fold="full", name="x")
    assert bank.find("x:full", "test").exists()


@pytest.mark.parametrize(
    "victim",
    [
        "data/samples.parquet",
        "data/folds.parquet",
        "runs/x/seed0/fold0/weights.safetensors",
        "runs/x/seed0/fold0/oof.arrow",
    ],
)
def test_one_flipped_byte_is_refused_by_name(project: Path, victim: str) -> None:
    jobs.train("exp001", TINY, fold="0", name="x")
    file = project / victim
    data_ = bytearray(file.read_bytes())
    data_[len(data_) // 2] ^= 1
    file.write_bytes(data_)
    shutil.rmtree(project / "runs/x/seed0/fold0", ignore_errors=True) if victim.startswith("data") else None
    readers = {"oof.arrow": lambda: bank.read(file, samples.load(), folds.load(samples.load()))}

    def train() -> None:
        (project / "runs/x/seed0/fold0/test.arrow").unlink(missing_ok=True)
        jobs.train("exp001", TINY, fold="0", name="x")

    assert victim in refusal(readers.get(file.name, train))


def test_wandb_offline_holds_the_whole_fold(project: Path) -> None:
    """Not what the tracker can do, but what a real fold tells it."""
    told = ["track=offline", "track.checkpoints=true", "machine.progress=false", "machine.workers=0"]
    jobs.train("exp001", [*told, "train.epochs=2", "train.limit=48"], fold="0", name="x")
    parts = [wandb_reader.read(file.parent) for file in (project / "wandb").rglob("run-*.wandb")]
    (part,) = [part for part in parts if part.run.job_type == "fold"]
    assert part.run.run_group == "x" and part.config["model"]["name"] == "test_resnet"
    assert len(part.column("loss")) == len(part.column("rate")) == 2
    assert len(part.column("valid_metric")) == 2 and len(part.column("images_per_second")) == 2
    for picture in ("augmentation", "confusion"):
        assert part.media(picture).exists()
    for table in ("folds", "worst"):
        assert any(name.endswith(f"-{table}") for name in part.artifacts), table
    kinds = {artifact.type for artifact in part.artifacts.values()}
    assert {"predictions", "model"} <= kinds
    assert "code" in part.config and part.config["hardware"]["cores"] >= 1 and part.exit_code == 0


def test_out_of_memory_halves_the_batch_and_not_the_answer() -> None:
    sizes: list[int] = []

    class Small(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("no room")
            return x * 2

    fitting = evaluate.Fitting(Small(), 10)
    x = torch.arange(10.0)[:, None]
    assert torch.equal(fitting(x), x * 2) and torch.equal(fitting(x), x * 2)
    assert sizes[:3] == [10, 5, 3] and max(sizes[3:]) == 3, "the size that fits is kept"


def test_batches_side_by_side_share_weights_and_nothing_else() -> None:
    together = threading.Barrier(2)  # both are inside before either goes on

    class Forgetful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = x
            together.wait()
            return self.kept * self.weight

    first, second = evaluate._side_by_side(Forgetful(), 2)
    assert second.weight is first.weight
    calls = [partial(one, torch.tensor(value)) for one, value in ((first, 3.0), (second, 5.0))]
    assert list(evaluate._in_order(iter(calls), 2)) == [6.0, 10.0]


def test_locked_rows_are_read_by_nothing_but_a_last_look(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["competition.folds.holdout=0.2"]
    assign.make(config(*said), samples.load(), remake=True)
    table = samples.load()
    split = folds.load(table)
    locked = set(split.locked().tolist())
    assert 200 < len(locked) < 400
    for number in [*range(5), "full"]:
        assert not locked & set(np.concatenate(split.split(number)).tolist())
    for number in range(5):
        jobs.train("exp001", [*TINY, *said], fold=str(number), name="x")
    assert not locked & set(bank.load("x", "oof", table, split).row.tolist())
    capsys.readouterr()
    jobs.predict("x", last_look=True)
    jobs.predict("x", last_look=True)
    out = capsys.readouterr().out
    assert f"on {len(locked)} locked rows, look number 1" in out and "look number 2" in out


def test_a_line_an_epoch_where_nobody_sees_a_bar(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PULSE", 0)
    jobs.train("exp001", [*TINY, "machine.progress=true"], fold="0", name="x")
    found = re.findall(
        r"seed 0 fold 0, epoch (\d+) of \d+: loss [\d.]+, valid_loss [\d.]+, valid_metric [\d.]+, \d+ images/s, (\d+) s left",
        capsys.readouterr().out,
    )
    assert found and found[0][0] == "1" and found[-1][1] == "0"


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_it_starts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(project)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**28))
    said = refusal(lambda: jobs.train("exp001", TINY, fold="0", name="x"))
    assert "runs/x" in said and "comp clean" in said and not (project / "runs/x/seed0").exists()


# --- a name stands for one config, one table, one set of folds -----------------------------------------------------------


def test_a_run_does_not_go_on_over_other_folds(project: Path) -> None:
    """What a model has seen must never become what it is scored on."""
    jobs.train("exp001", TINY, fold="0", name="x")
    assign.make(config("competition.folds.seed=7"), samples.load(), remake=True)
    said = refusal(lambda: jobs.train("exp001", [*TINY, "competition.folds.seed=7"], fold="1", name="x"))
    assert "folds.seed: 0 there, 7 here" in said
    cut = pd.read_csv(project / "data/raw/train.csv", dtype=str).iloc[:-3]
    cut.to_csv(project / "data/raw/train.csv", index=False)
    tables.prepare(config())
    assign.make(config(), samples.load(), remake=True)
    said = refusal(lambda: jobs.train("exp001", TINY, fold="1", name="x"))
    assert "another data/samples.parquet" in said and "other folds" in said


def test_a_run_does_not_go_on_with_another_loss(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.train("exp001", TINY, fold="0", name="x")

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, target, reduction="none")

    monkeypatch.setattr(own.competition, "loss", loss, raising=False)
    assert "another comp/competition.py" in refusal(lambda: jobs.train("exp001", TINY, fold="1", name="x"))


def test_fresh_takes_one_fold_away_and_not_the_others(project: Path) -> None:
    for number in "01":
        jobs.train("exp001", TINY, fold=number, name="x")
    kept = store.sha256(project / "runs/x/seed0/fold0/weights.safetensors")
    jobs.train("exp001", TINY, fold="1", name="x", fresh=True)
    assert store.sha256(project / "runs/x/seed0/fold0/weights.safetensors") == kept
    assert len(list((project / "runs/.trash").iterdir())) == 1
    with store.lock(project / "runs/x/seed0/fold0", "training"):
        said = refusal(lambda: jobs.train("exp001", TINY, name="x", fresh=True))
    assert "already training" in said and (project / "runs/x/seed0/fold1/oof.arrow").exists()


def test_half_a_start_is_no_start(project: Path) -> None:
    """Killed between writing and sealing config.yaml: the same command goes on, and so does another config."""
    (project / "runs/x").mkdir(parents=True)
    (project / "runs/x/config.yaml").write_text("data: {size: 3}\n")
    jobs.train("exp001", TINY, fold="0", name="x")
    assert (project / "runs/x/seed0/fold0/test.arrow").exists()


def test_a_run_does_not_take_the_name_of_an_ensemble(project: Path) -> None:
    (project / "configs/ensembles/blend001.yaml").write_text("members: [x]\nmethod: mean\n")
    assert "ensemble" in refusal(lambda: jobs.train("exp001", TINY, fold="0", name="blend001"))


def test_a_knob_that_came_later_does_not_lock_old_runs(project: Path) -> None:
    jobs.train("exp001", TINY, fold="0", name="x")
    file = project / "runs/x/config.yaml"
    kept = [line for line in file.read_text().splitlines() if "drop_path_rate" not in line]
    assert len(kept) == len(file.read_text().splitlines()) - 1
    file.write_text("\n".join(kept) + "\n")
    store.seal(file)
    assert jobs.stored_config("x").model.drop_path_rate == 0.0
    jobs.train("exp001", TINY, fold="1", name="x")


def test_a_batch_of_damaged_pictures_alone_is_no_crash(project: Path) -> None:
    table = samples.load()
    (project / "data/raw" / table.frame["images"].iloc[table.positions("test")[47]][0]).write_bytes(b"")
    tiny = [*TINY, "predict.batch_size=47", "model.name=test_convnext"]
    jobs.train("exp001", tiny, fold="0", name="x")
    assert len((project / "runs/x/seed0/fold0/test_damaged.txt").read_text().splitlines()) == 1


def test_a_device_that_is_not_there_is_one_line(project: Path) -> None:
    assert "machine.device" in refusal(lambda: jobs.train("exp001", ["machine.device=gpu"]))
    if not torch.cuda.is_available():
        said = refusal(lambda: jobs.train("exp001", [*TINY, "machine.device=cuda"], name="x"))
        assert "no GPU" in said
