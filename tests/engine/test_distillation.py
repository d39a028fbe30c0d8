"""Distillation: the losses, which teachers are allowed for a fold, and the targets of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import banked
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import config
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from comp import losses, predict
from comp.engine import hardware
from comp.engine.config import experiments
from comp.engine.config.resolve import load
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.run import distillation, loading, mixup, runner, teacher_predictions, unused_knobs
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

BATCH, T = 6, 3.0
ROWS = np.arange(BATCH)
QUIET = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "train.ema_decay=null", "train.epochs=1", "schedule.warmup=0", "train.max_samples=64", "train.batch_size=16", "augment=none",
]  # fmt: skip


class Case(NamedTuple):
    cfg: Config
    head: Head
    own: losses.MultiHeadLoss  # of the labels alone
    loss: losses.MultiHeadLoss
    output: Tensor
    truth: Tensor
    stored: Tensor  # what the teacher's prediction file holds

    @property
    def teacher_target(self) -> Tensor:
        return torch.from_numpy(
            distillation.to_target(self.head, self.stored.numpy(), self.cfg.distill.kind, T)
        )


def case(task: str, *overrides: str) -> Case:
    head, random = banked.HEADS[task], np.random.default_rng(0)
    cfg = config("distill.teacher=exp001", f"distill.temperature={T}", *overrides, experiment="base")
    table = Samples(
        pd.DataFrame({name: random.integers(0, 2, BATCH).astype(float) for name in head.columns}),
        (head,),
        "x",
    )
    truth = torch.tensor(head.spec.encode_target(table.targets(head)))
    torch.manual_seed(0)
    output, stored = torch.randn(2, BATCH, len(head.outputs))
    own = losses.build_loss(cfg, table, ROWS)
    loss = distillation.distillation_loss(cfg, table, ROWS, own)
    return Case(cfg, head, own, loss, output, truth if truth.dtype == torch.int64 else truth.float(), stored)


def test_soft_distillation_is_kullback_leibler_at_a_temperature(empty: Path) -> None:
    a = case("multiclass", "distill.weight=0.3")
    divergence = F.kl_div(F.log_softmax(a.output / T, 1), F.softmax(a.stored / T, 1), reduction="none").sum(1)
    wanted = 0.7 * F.cross_entropy(a.output, a.truth, reduction="none") + 0.3 * T**2 * divergence
    assert torch.allclose(a.loss(a.output, [a.truth, a.teacher_target]), wanted, atol=1e-6)
    pure = case("multiclass", "distill.weight=1")
    same = pure.loss(pure.stored, [pure.truth, pure.teacher_target])
    assert same.abs().max() < 1e-5, "nothing is left to learn from a teacher that one agrees with"


def test_soft_distillation_of_multilabel_is_per_label(empty: Path) -> None:
    for task in ("binary", "multilabel"):
        a = case(task, "distill.weight=1")
        p, q = (a.stored / T).sigmoid(), (a.output / T).sigmoid()
        divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1)
        assert torch.allclose(a.loss(a.output, [a.truth, a.teacher_target]), T**2 * divergence, atol=1e-5)


def test_soft_distillation_of_bce_uses_its_decoded_logits(empty: Path) -> None:
    a = case("multiclass", "distill.weight=1", "loss.name=bce", "distill.temperature=1")
    p = torch.from_numpy(
        a.head.spec.decode(a.output.double().numpy(), losses.loss_knobs.head_losses(a.cfg, [a.head])[0])
    )
    teacher_target = torch.from_numpy(distillation.to_target(a.head, p.numpy(), "soft", 1.0))
    assert a.loss(a.output, [a.truth, teacher_target]).abs().max() < 1e-5


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_hard_distillation_takes_the_predicted_label(empty: Path, task: str) -> None:
    a = case(task, "distill.kind=hard", "distill.weight=0.4")
    predicted_label = a.stored.argmax(1) if task == "multiclass" else (a.stored > 0).float()
    wanted = 0.6 * a.own(a.output, [a.truth]) + 0.4 * a.own(a.output, [predicted_label])
    assert torch.allclose(a.loss(a.output, [a.truth, a.teacher_target]), wanted)


def test_regression_targets_are_predicted_values(empty: Path) -> None:
    a = case("regression", "distill.weight=0.5")
    wanted = 0.5 * (a.output[:, 0] - a.truth) ** 2 + 0.5 * (a.output[:, 0] - a.stored[:, 0]) ** 2
    assert torch.allclose(a.loss(a.output, [a.truth, a.teacher_target]), wanted)
    grades = case("ordinal")
    assert grades.teacher_target.min() >= 0 and grades.teacher_target.max() <= 3, (
        "a grade beyond the last is the last"
    )


@pytest.mark.parametrize("more", [[], ["loss.name=bce", "loss.target_threshold=0.2", "distill.kind=hard"]])
def test_mixing_images_mixes_teacher_targets(empty: Path, more: list[str]) -> None:
    a = case("multiclass", *more)
    mixture = mixup.mixed_loss(a.cfg, (a.head,), a.loss)
    mate, share = torch.tensor([1, 0, 3, 2, 5, 4]), torch.rand(BATCH)
    parts = [(torch.arange(BATCH), share), (mate, 1 - share)]
    targets = [a.truth, a.teacher_target]
    if more:
        hot = [F.one_hot(each, 3).float() for each in targets]
        wanted = a.loss(a.output, [share[:, None] * h + (1 - share[:, None]) * h[mate] for h in hot])
    else:
        one, other = (a.loss(a.output, [t[who] for t in targets]) for who in (parts[0][0], mate))
        wanted = share * one + (1 - share) * other
    assert torch.allclose(mixture(a.output, targets, torch.ones(BATCH), parts), wanted, atol=1e-6)


def test_teacher_targets_come_from_the_model_of_the_same_fold(project: Path) -> None:
    for number in "12":
        runner.train("exp001", QUIET, fold=number, name="teacher")
    small = [*QUIET, "data.size=16", "augment.mixup=0.5"]
    runner.train("exp001", [*small, "distill.teacher=teacher"], fold="1", name="taught")
    runner.train("exp001", small, fold="1", name="alone")
    found = load_file(paths.fold_folder("taught", 0, 1) / distillation.FILE)
    table = samples.load()
    rows = folds.load(table).split(1)[0][:64]
    assert np.array_equal(found["rows"], rows)
    context = loading.load_context(experiments.stored_config("teacher"))  # at its own size
    predicted = [
        predict.predict(context, paths.fold_folder("teacher", 0, n) / "weights.safetensors", rows)[0]["label"]
        for n in (1, 2)
    ]
    assert np.allclose(found["label"], predicted[0], atol=1e-6) and not np.allclose(
        predicted[0], predicted[1], atol=1e-2
    )
    weights = [
        load_file(paths.fold_folder(name, 0, 1) / "weights.safetensors")["fc.weight"]
        for name in ("taught", "alone")
    ]
    assert not np.array_equal(weights[0], weights[1])

    with pytest.raises(UserError, match="teacher has no weights of fold 3") as missing:
        runner.train("exp001", [*small, "distill.teacher=teacher"], fold="3", name="taught")
    assert (missing.value.code, missing.value.key) == ("weights-missing", "distill.teacher")
    assert missing.value.remedy.endswith("comp train teacher --fold 3")
    with pytest.raises(UserError, match=r"teecher: .*; the nearest are teacher") as unknown:
        runner.train("exp001", [*small, "distill.teacher=teecher"], fold="1", name="other")
    assert (unknown.value.code, unknown.value.key) == ("teacher-unknown", "distill.teacher")
    other = paths.fold_folder("teacher", 0, 1) / "weights.safetensors"
    save_file(load_file(other) | {"fc.bias": np.zeros(10, np.float32)}, other)
    artifacts.add_to_manifest(other)
    with pytest.raises(
        UserError, match=r"fold1/teacher_predictions.safetensors: runs/teacher/seed0/fold1 .*--fresh"
    ) as changed:
        teacher_predictions.prepare(
            loading.load_context(experiments.stored_config("taught")),
            loading.load_context,
            1,
            paths.fold_folder("taught", 0, 1),
            hardware.Stop(),
        )
    assert changed.value.code == "teacher-changed"


def test_knobs_without_effect(empty: Path) -> None:
    def messages(*overrides: str) -> list[str]:
        return unused_knobs.messages(load(paths.root(), "base", list(overrides)))

    assert messages("distill.temperature=4") == [
        "distill.temperature: 4.0 has no effect without distill.teacher"
    ]
    assert messages("distill.teacher=exp001", "distill.kind=hard", "distill.temperature=4") == [
        "distill.temperature: 4.0 has no effect with distill.kind: hard"
    ]
    head = Head("label", "retrieval", ("a", "b"), ("target.label",), ("a", "b"))
    with pytest.raises(UserError, match="loss arcface") as caught:
        distillation.validate(config("distill.teacher=exp001", experiment="base"), (head,))
    assert (caught.value.code, caught.value.key) == ("loss-incompatible", "distill.teacher")
