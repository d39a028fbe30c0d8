"""Pretrained weights, and training in stages."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from conftest import config
from safetensors.torch import load_file, save_file
from timm.layers import DropPath

from comp import models
from comp.engine import cli
from comp.engine.errors import UserError
from comp.engine.run import pretrained, runner, schedule
from comp.engine.run.stages import Stages
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

STAGES = (
    "train.stages=[{train: head, epochs: 1, lr: 1e-2}, {train: last 2 blocks, epochs: 1, lr: 2e-3}, "
    "{train: everything, epochs: 2, lr: 1e-3}]"
)
QUIET = ["track=none", "machine.num_workers=0", "machine.progress=false", "schedule.warmup=0.5", "train.max_samples=32", "train.batch_size=8", "train.ema_decay=null"]  # fmt: skip


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_frozen_parameters_do_not_change_by_a_bit(empty: Path, name: str) -> None:
    cfg = config(STAGES, "train.epochs=4", f"model.name={name}")
    module = timm.create_model(name, num_classes=3)
    stages = Stages(cfg, module)
    head, blocks, every = stages.trained
    assert head < blocks < every and len(every) == len(list(module.named_parameters()))
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=0.1)
    size = {"test_vit": 160}.get(name, 64)
    for epoch, trains in enumerate([head, blocks, every, every]):
        stages.set_trainable(epoch)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        module(torch.randn(4, 3, size, size)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
        buffers = {k for k, _ in module.named_buffers()}
        assert changed - buffers <= trains and any(k in changed for k in head)
        if epoch == 0:
            assert not changed & buffers, "frozen batch norms keep what they measured"
    assert len(changed - buffers) > len(blocks)


def test_frozen_norms(empty: Path) -> None:
    module = timm.create_model("test_resnet")
    Stages(config("model.freeze_norm=true"), module).set_trainable(0)
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training or m.weight.requires_grad for m in norms) and module.training
    with pytest.raises(UserError, match="no batch norm"):
        Stages(config("model.freeze_norm=true", "model.name=test_vit"), timm.create_model("test_vit"))


def test_dropout_and_stochastic_depth_reach_the_network(empty: Path) -> None:
    def built(*overrides: str) -> torch.nn.Module:
        cfg = config("model.name=test_convnext", "data.channels=3", *overrides)
        return models.build(
            cfg, (Head("label", "multiclass", ("a", "b"), ("target.label",), ("a", "b")),), pretrained=False
        )

    for knob, kind, attribute in (
        ("drop_rate", torch.nn.Dropout, "p"),
        ("drop_path_rate", DropPath, "drop_prob"),
    ):
        found, none = (
            [getattr(m, attribute) for m in module.modules() if isinstance(m, kind)]
            for module in (built(f"model.{knob}=0.3"), built())
        )
        assert max(found) == pytest.approx(0.3) and not any(none), knob


def test_each_stage_has_its_learning_rate_and_the_whole_schedule(empty: Path) -> None:
    cfg = config(STAGES, "train.epochs=4", "schedule.warmup=0 epochs", "schedule.min_lr_ratio=0")
    curve = schedule.lr_schedule(cfg, schedule.train_length(cfg, 10 * cfg.train.batch_size))
    assert [curve.lr(step) for step in (0, 10, 20)] == pytest.approx([1e-2, 2e-3, 1e-3])
    assert curve.lr(9) < 1e-3 and curve.lr(39) < 1e-4
    with pytest.raises(UserError, match=r"train.stages: have 4 epochs, train.epochs is 5"):
        config(STAGES, "train.epochs=5")


def test_a_file_is_loaded_except_for_the_head(tmp_path: Path) -> None:
    given = timm.create_model("test_resnet", num_classes=5).state_dict()
    module = timm.create_model("test_resnet", num_classes=7)
    fits = pretrained.matching_tensors(module, given, "x")
    assert [k for k in given if k not in fits] == ["fc.weight", "fc.bias"]
    assert all(torch.equal(fits[k], given[k]) for k in module.state_dict() if not k.startswith("fc."))
    with pytest.raises(UserError, match=r"x: model.pretrained: conv1\S* is \(\d+, 3, \d, \d\) in it"):
        pretrained.matching_tensors(timm.create_model("test_resnet", in_chans=4), given, "x")


def test_pretrained_weights_of_another_run_are_those_of_the_same_fold(project: Path) -> None:
    runner.train("exp001", [*QUIET, "train.epochs=1"], fold="1", name="first")
    file = paths.fold_folder("first", 0, 1) / "weights.safetensors"
    # A rate so small that nothing moves shows what training began with.
    still = [
        *QUIET,
        STAGES.replace("1e-2", "1e-20").replace("2e-3", "1e-20").replace("1e-3", "1e-20"),
        "train.epochs=4",
    ]
    runner.train("exp001", [*still, "model.pretrained=run:first"], fold="1", name="second")
    first, second = (load_file(f) for f in (file, paths.fold_folder("second", 0, 1) / "weights.safetensors"))
    names = [k for k in first if "running" not in k and "num_batches" not in k]
    assert all(torch.allclose(first[k], second[k], atol=1e-7) for k in names)
    with pytest.raises(UserError, match="no seed 0 fold 2, and weights of another fold"):
        runner.train("exp001", [*still, "model.pretrained=run:first"], fold="2", name="second")
    with pytest.raises(UserError, match="no such run; the nearest are"):
        runner.train("exp001", [*still, "model.pretrained=run:frist"], fold="1", name="third")
    made = paths.run_folder("first") / "inputs.json"
    artifacts.write_json(made, artifacts.read_json(made) | {"folds": "others"})
    artifacts.add_to_manifest(made)
    with pytest.raises(UserError, match="other folds"):
        runner.train("exp001", [*still, "model.pretrained=run:first"], fold="1", name="third")
    save_file({"nothing": torch.zeros(1)}, project / "mine.safetensors")
    with pytest.raises(UserError, match=r"mine.safetensors: model.pretrained: \S+ is not in it"):
        runner.train("exp001", [*still, "model.pretrained=mine.safetensors"], fold="1", name="fourth")


@pytest.mark.parametrize(
    "kind", ["pickle", "torch.save", "empty", "malformed", "cut", "header of 2^60 bytes"]
)
def test_a_file_that_is_not_safetensors(project: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """An error with key and file, exit code 2; objects in a pickle are never constructed."""
    file = project / "mine.safetensors"
    if kind == "torch.save":
        torch.save({"fc.weight": torch.zeros(2, 2)}, file)
    else:
        save_file({"fc.weight": torch.zeros(2, 2)}, file)
        whole = file.read_bytes()
        file.write_bytes(
            {
                "pickle": pickle.dumps(_Tells(project / "was run")),
                "empty": b"",
                "malformed": whole[:8] + b"{" * (len(whole) - 8),
                "cut": whole[:-4],
                "header of 2^60 bytes": (2**60).to_bytes(8, "little") + whole[8:],
            }[kind]
        )
    capsys.readouterr()
    (project / "configs" / "exp003.yaml").write_text(
        "base: exp001\nmodel: {pretrained: mine.safetensors}\ntrack: {mode: none}\n"
    )
    assert cli.main(["train", "exp003", "--fold", "0"]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and "mine.safetensors: model.pretrained: is not a safetensors file" in message
    assert "save_file" in message and "weights_only=True" in message
    assert ("pickle" in message) == (kind in ("pickle", "torch.save"))
    assert not (project / "was run").exists()


class _Tells:
    """Its pickle creates a folder when loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)
