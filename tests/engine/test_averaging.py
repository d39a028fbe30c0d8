"""Extra weights of a run: snapshots, averages, soups, the best epoch; and the optimism of a selection."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import banked
import numpy as np
import pytest
import timm
import torch
from conftest import config
from forked import forked
from safetensors.torch import load_file
from test_resume import killed_at
from timm.utils import ModelEmaV3
from torch.optim import swa_utils

from comp.engine.bank import bank
from comp.engine.config import run_members
from comp.engine.data import folds, make_folds, samples
from comp.engine.deliver import bundle, kernel, recheck
from comp.engine.ensemble import latency, member_filter
from comp.engine.errors import UserError
from comp.engine.run import averaging, model_selection, previews, runner, schedule, tracking
from comp.engine.store import artifacts, paths

QUIET = ["track=none", "machine.num_workers=0", "machine.progress=false", "schedule.warmup=0", "train.max_samples=48", "train.batch_size=16"]  # fmt: skip
EVERYTHING = [
    *QUIET, "train.epochs=3", "train.ema_decay=0.9", "snapshots.cycles=3", "snapshots.last=2", "average.predict_with=raw",
    "average.members=[ema,swa,tail,uniform,greedy]", "average.swa_start=0.4", "average.tail_epochs=2",
]  # fmt: skip


def weights(run: str, *inside: str, fold: int = 0) -> dict[str, torch.Tensor]:
    return load_file(
        artifacts.verified(paths.fold_folder(run, 0, fold).joinpath(*inside, "weights.safetensors"))
    )


@pytest.fixture
def halves(project: Path) -> Path:
    """A project with two folds, the fewest of a CV."""
    file = project / "configs/competition.yaml"
    file.write_text(file.read_text().replace("k: 5", "k: 2"))
    make_folds.make(config(), samples.load(), remake=True)
    return project


# --- snapshots and averages ---------------------------------------------------------------------------------


def test_the_cyclic_cosine_equals_that_of_the_paper() -> None:
    """Snapshot Ensembles (Huang et al. 2017), equation 2: T steps, M cycles, t from 1."""
    total, cycles = 120, 4
    cfg = config(
        "schedule.warmup=0", "schedule.min_lr_ratio=0", f"snapshots.cycles={cycles}", "train.epochs=12"
    )
    span = schedule.train_length(cfg, 10 * cfg.train.batch_size)
    assert (span.steps, schedule.snapshot_steps(cfg, span)) == (total, [30, 60, 90, 120])
    length = -(-total // cycles)
    paper = [(np.cos(np.pi * ((t - 1) % length) / length) + 1) / 2 for t in range(1, total + 1)]
    curve = schedule.lr_schedule(cfg, span)
    assert [curve.lr(step) / 5e-3 for step in range(total)] == pytest.approx(paper, abs=1e-12)
    once = config(
        "schedule.warmup=0", f"snapshots.cycles={cycles}", "snapshots.restarts=false", "train.epochs=12"
    )
    shares = [schedule.lr_schedule(once, span).lr(step) for step in range(total)]
    assert shares == sorted(shares, reverse=True) and schedule.snapshot_steps(once, span) == [30, 60, 90, 120]


def test_the_ema_equals_timms() -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=3)
    ours = averaging.Ema(module, 0.7)
    theirs = ModelEmaV3(
        module,
        decay=0.7,
        use_warmup=True,
        warmup_gamma=1 / averaging.WARMUP,
        warmup_power=1.0,
        exclude_buffers=True,
    )
    assert [ours.decay_at(step) for step in (1, 2, 12, 10**6)] == [0, 0, pytest.approx(0.5), 0.7]
    for step in range(1, 31):
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(torch.randn_like(weight))
            module(torch.randn(4, 3, 32, 32))  # batch norms count and measure
        ours.update(step)
        theirs.update(module, step - 1)
    want = theirs.module.state_dict()
    for name, tensor in ours.module.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6, msg=name)
    assert any(not torch.equal(tensor, want[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("epochs", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_ema_of_a_short_run_scores_like_its_last_weights(project: Path, epochs: int) -> None:
    """One run makes both, since train.ema_decay changes no step. Two epochs suffice for these digits."""
    quiet = ["track=none", "machine.num_workers=0", "machine.progress=false", "average.members=[raw]"]
    runner.train("exp001", [*quiet, f"train.epochs={epochs}"], fold="3", name="x")
    table = samples.load()
    head, place = table.heads[0], paths.fold_folder("x", 0, 3)

    def right(inside: str) -> float:
        predicted = bank.read(place / inside / "oof.arrow", table, folds.load(table))
        truth = table.truth(head, predicted.row.astype(np.int64))
        return float((predicted.probability(head).argmax(1) == truth).mean())

    assert right("") >= right("raw") - 0.02
    assert right("raw") > (0.4 if epochs == 1 else 0.9)


def test_a_shortened_warmup_is_reported_once(halves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the warm-up of base.yaml and one epoch: once for all folds, and in the preview."""
    few = ["train.epochs=1", "train.max_samples=32", "train.batch_size=8", "augment=none"]
    previews.schedule("exp001", few)
    assert "schedule.warmup: 4 of the 4 steps" in capsys.readouterr().out
    runner.train("exp001", [*few, "track=none", "machine.num_workers=0", "machine.progress=false"], name="x")
    shown = capsys.readouterr()
    (line,) = [each for each in (shown.out + shown.err).splitlines() if "warmup" in each]
    assert re.findall(r"\d+", line) == ["4", "4", "2"]
    rates = [e["lr"] for e in tracking.read(halves / "runs/x/seed0/fold0/log.jsonl") if "lr" in e]
    assert rates.index(max(rates)) == 2 and len(rates) == 4


def test_swa_averages_batch_norm_counters_on_a_gpu(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swa_utils, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
    module = timm.create_model("test_resnet", num_classes=3)
    cfg = config(
        "average.predict_with=swa", "train.ema_decay=null", "train.epochs=4", "average.swa_start=0.25"
    )
    weight_sets = averaging.WeightSets(cfg, module, tmp_path, [])
    for epoch in range(1, 5):
        module(torch.randn(4, 3, 32, 32))
        weight_sets.after_epoch(epoch, None)
    assert weight_sets.swa is not None
    counters = [
        n for name, n in weight_sets.swa.module.state_dict().items() if name.endswith("batches_tracked")
    ]
    assert counters and all(2 <= int(count) <= 4 for count in counters)


def test_every_kind_of_weights_is_a_member_with_its_own_predictions(halves: Path) -> None:
    runner.train("exp001", EVERYTHING, name="x")
    snaps = ["snap1", "snap2", "snap3"]
    names = {*snaps, "last2", "ema", "swa", "tail", "uniform", "greedy"}
    assert set(bank.members()) == {"x"} | {f"x:{name}" for name in names}
    table = samples.load()
    split, head = folds.load(table), table.heads[0]

    def predicted(name: str, kind: str = "oof") -> np.ndarray:
        return bank.load(f"x:{name}" if name else "x", kind, table, split).probability(head)

    assert np.array_equal(predicted(""), predicted("snap3"), equal_nan=True), "the run is its last snapshot"
    for kind in bank.KINDS:
        mean = (predicted("snap2", kind) + predicted("snap3", kind)) / 2
        if kind == "oof":
            assert predicted("last2", kind) == pytest.approx(mean, abs=1e-6, nan_ok=True)
    assert member_filter.addresses("x:snapshots") == [f"x:{name}" for name in snaps]
    # Of the parameters; what batch norms measured is measured anew.
    each = [weights("x", name) for name in snaps]
    parameters = [name for name in each[0] if "running" not in name and "num_batches" not in name]
    wanted = {"uniform": each, "tail": each[1:], "swa": each[1:]}
    for kind, parts in wanted.items():
        found = weights("x", kind)
        for name in parameters:
            torch.testing.assert_close(found[name], torch.stack([p[name] for p in parts]).mean(0))
    norm = next(name for name in each[0] if "running_mean" in name)
    assert not torch.allclose(weights("x", "tail")[norm], (each[1][norm] + each[2][norm]) / 2, atol=1e-4)
    torch.testing.assert_close(weights("x", "tail")[norm], weights("x", "swa")[norm], rtol=1e-4, atol=1e-5)
    assert not list((paths.run_folder("x")).rglob("epoch-*")), "what only the average needed is gone"
    # Delivery finds the weights of each.
    run = kernel.member_runs("x:last2")[0]
    assert len(run["checkpoints"]) == 4 and len(bundle.weights_of(run)) == 4
    for address in ("x:last2", "x:swa"):
        recheck.recheck(address)
    assert latency.seconds_per_image("x:last2") == pytest.approx(
        latency.seconds_per_image("x:snap2") + latency.seconds_per_image("x:snap3")
    )


def test_killed_with_all_averages_on_a_run_resumes_to_the_same_bytes(project: Path) -> None:
    def train() -> None:
        runner.train("exp001", [*EVERYTHING, "train.checkpoint_every=2"], fold="1", name="x")

    def artefacts() -> dict[str, str]:
        place = paths.fold_folder("x", 0, 1)
        return {str(f.relative_to(place)): artifacts.sha256(f) for e in ("arrow", "safetensors") for f in sorted(place.rglob(f"*.{e}"))}  # fmt: skip

    assert forked(train) == 0
    whole = artefacts()
    assert len(whole) == 3 * 9
    artifacts.move_to_trash(paths.run_folder("x"))
    for event in (23, 11, 9):
        assert os.WIFSIGNALED(forked(killed_at(event, train)))
    assert os.WIFSIGNALED(forked(killed_at(1, train, after="uniform/weights.safetensors"))), "while it seals"
    assert forked(train) == 0
    assert artefacts() == whole


def test_which_weights_predict_is_fixed_by_the_config(project: Path) -> None:
    run = [*QUIET, "train.epochs=2", "average.tail_epochs=2", "train.ema_decay=null"]
    runner.train(
        "exp001", [*run, "average.predict_with=tail", "average.members=[raw]"], fold="0", name="tail"
    )
    runner.train("exp001", [*run, "average.members=[tail]"], fold="0", name="raw")
    assert all(torch.equal(weights("tail")[name], value) for name, value in weights("raw", "tail").items())
    assert all(torch.equal(weights("tail", "raw")[name], value) for name, value in weights("raw").items())


# --- choosing -----------------------------------------------------------------------------------------------


def test_selection_rows_are_held_out_with_their_groups(project: Path) -> None:
    table = samples.load()
    split = folds.load(table)
    group = table.frame["group"].to_numpy()
    for number in range(5):
        train_rows, scored = split.split(number)
        free, held = split.inner_split(number, 0.1)
        assert set(free) | set(held) == set(train_rows) and not set(free) & set(held)
        assert not set(group[free]) & set(group[held]) and not set(held) & set(scored)
        assert 0.05 < len(held) / len(train_rows) < 0.25
        assert np.array_equal(held, split.inner_split(number, 0.1)[1])
    assert not np.array_equal(split.inner_split(0, 0.1)[1], split.inner_split(1, 0.1)[1])


def test_selection_rows_of_folds_by_time_are_the_latest(empty: Path) -> None:
    project = banked.lay_out(empty, rule="earlier")
    time = project.samples.frame["time"].to_numpy()
    free, held = project.folds.inner_split(3, 0.2)
    train_rows = project.folds.split(3)[0]
    assert time[free].max() <= time[held].min() and len(held) == pytest.approx(0.2 * len(train_rows), abs=1)


def epochs(run: str) -> list[dict[str, float]]:
    return [line for line in tracking.read(paths.fold_folder(run, 0, 0) / "log.jsonl") if "epoch" in line]


@pytest.mark.parametrize("on", ["inner", "fold"])
def test_the_best_epoch_predicts_and_patience_ends_training(
    halves: Path, on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*QUIET, "train.epochs=8", "train.ema_decay=null", "optim.lr=5e-2", "select=best", f"select.on={on}", "select.patience=2"]  # fmt: skip
    runner.train("exp001", run, name="x")
    lines = epochs("x")
    scores = [line["select_score"] for line in lines]
    best = int(np.argmax(scores))
    assert len(lines) == min(8, best + 3)
    table = samples.load()
    split, head = folds.load(table), table.heads[0]
    oof = bank.read(paths.fold_folder("x", 0, 0) / "oof.arrow", table, split)
    right = oof.probability(head).argmax(1) == table.truth(head, oof.row.astype(np.int64))
    assert right.mean() == pytest.approx(lines[best]["valid_metric"])
    assert (scores == [line["valid_metric"] for line in lines]) == (on == "fold")
    record = artifacts.read_json(paths.run_folder("x") / "score.json")
    assert ("selected_on_fold" in record["marks"]) == ("optimism" in record) == (on == "fold")
    assert (", optimism " in capsys.readouterr().out) == (on == "fold")
    if on == "fold":
        with pytest.raises(UserError, match="--fold full"):
            runner.train("exp001", run, fold="full", name="x")


def test_the_optimism_of_a_selection_is_estimated_without_bias() -> None:
    """Thirty candidates that all guess: the best one's score above one half is optimism alone."""
    shown, estimated = [], []
    for seed in range(200):
        right = np.random.default_rng(seed).random((30, 400)) < 0.5
        part = np.arange(400) * model_selection.FIFTHS // 400
        columns = [np.ones(400, bool), *(part == i for i in range(5)), *(part != i for i in range(5))]
        scores = np.array([[each[column].mean() for column in columns] for each in right])
        found = model_selection.optimism(partial(model_selection.best, list(scores)), scores.__getitem__)
        assert found is not None
        shown.append(scores[model_selection.best(list(scores)), 0] - 0.5)
        estimated.append(found)
    error = np.std(np.subtract(shown, estimated)) / np.sqrt(200)
    assert np.mean(shown) > 0.04
    assert abs(np.mean(shown) - np.mean(estimated)) < 4 * error


def test_a_greedy_soup_adds_weights_that_do_not_lower_the_score(project: Path) -> None:
    """Selected on the validation rows, so that the score of every part can be computed from the members."""
    run = [*QUIET, "train.epochs=3", "train.ema_decay=null", "snapshots.cycles=3", "average.members=[greedy,uniform]", "select.on=fold"]  # fmt: skip
    runner.train("exp001", run, fold="0", name="x")
    table = samples.load()
    split, head = folds.load(table), table.heads[0]

    def right(inside: str) -> float:
        oof = bank.read(paths.fold_folder("x", 0, 0) / inside / "oof.arrow", table, split)
        return float((oof.probability(head).argmax(1) == table.truth(head, oof.row.astype(np.int64))).mean())

    assert right("greedy") >= max(right(name) for name in ("snap1", "snap2", "snap3"))
    place = paths.fold_folder("x", 0, 0)
    assert bank.read_meta(place / "greedy/oof.arrow")["marks"] == ["selected_on_fold"]
    assert (
        bank.read_meta(place / "oof.arrow")["marks"] == [] and run_members.marks(config(*run), "snap1") == []
    )
    assert set(artifacts.read_json(place / "optimism.json")) == {"greedy"}


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        (["snapshots.cycles=20"], "snapshots.cycles", "train.epochs: 15"),
        (["snapshots.cycles=3", "schedule=constant"], "schedule.name", "constant has no effect"),
        (["average.members=[ema]"], "average.members", "ema"),
        (["average.predict_with=raw"], "train.ema_decay", "has no effect"),
        (["average.predict_with=swa"], "train.ema_decay", "set train.ema_decay: null"),
        (["average.predict_with=uniform", "train.ema_decay=null"], "average", "set snapshots.cycles"),
        (["average.members=[tail]", "average.tail_epochs=16"], "average.tail_epochs", "train.epochs: 15"),
        (["average.predict_with=swa", "train.ema_decay=null", "select=best"], "select.name", "swa"),
        (["select.patience=2"], "select.patience", "select.name: best"),
        (["select=best", "select.patience=2", "snapshots.cycles=3"], "select.patience", "snapshots"),
        (["select.on=fold"], "select.on", "has no effect"),
    ],
)
def test_knobs_without_effect_are_errors(empty: Path, override: list[str], key: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        config(*override)
    (line,) = [line for line in caught.value.lines if key in line and words in line]
    assert "override" not in line


def test_a_mean_of_members_is_a_mean_of_predictions() -> None:
    assert run_members.extra_members(config("snapshots.cycles=2"))["last2"] == ["snap1", "snap2"]
