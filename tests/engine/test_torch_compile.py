"""torch.compile, channels_last and gradient checkpointing: the same numbers, or an error if unsupported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from conftest import config
from test_training import refusal
from timm.optim._param_groups import param_groups_layer_decay

from comp import models, optim
from comp.engine.run import torch_compile
from comp.engine.run.backbone import inner
from comp.engine.tasks.kinds import Head


def network(*overrides: str) -> torch.nn.Module:
    torch.manual_seed(0)
    head = Head("label", "multiclass", ("0", "1"), ("label",), ("0", "1"))
    return models.build(config(*overrides), (head,), pretrained=False)


def gradients(prepared: object, module: torch.nn.Module) -> tuple[torch.Tensor, int]:
    """Gradients, and how many numbers were saved for the backward pass."""
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    torch.manual_seed(1)
    images = torch.randn(4, 1, 32, 32)
    module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = prepared(images).square().sum()  # type: ignore[operator]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]), saved


@pytest.mark.parametrize("knob", ["grad_checkpointing", "channels_last"])
def test_gradients_stay_the_same(empty: Path, knob: str) -> None:
    name = "model.name=test_convnext"
    plain, other = network(name), network(name)
    prepared = torch_compile.prepare(config(name, f"train.{knob}=true"), other)
    want, saved = gradients(plain, plain)
    got, saved_now = gradients(prepared, other)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    if knob == "grad_checkpointing":
        assert saved_now < saved / 2
    else:
        weight = next(layer for layer in other.modules() if isinstance(layer, torch.nn.Conv2d)).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_calls_torch_compile_and_changes_no_saved_weights(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.nn.Module] = []

    def compile(module: torch.nn.Module) -> object:
        asked.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", compile)
    module = network()
    names = list(module.state_dict())
    prepared = torch_compile.prepare(config("train.compile=true"), module)
    assert asked == [module] and list(module.state_dict()) == names
    assert prepared(torch.zeros(2, 1, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("knob", ["grad_checkpointing", "channels_last"])
def test_unsupported_networks_are_errors(empty: Path, knob: str) -> None:
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    assert f"train.{knob}" in refusal(lambda: torch_compile.prepare(config(f"train.{knob}=true"), plain))


# --- networks with something around them --------------------------------------------------------------------

AROUND: dict[str, tuple[str, list[str]]] = {
    "metadata": ("test_vit", ["model.metadata=true"]),
    "gem": ("test_convnext", ["model.global_pool=gem"]),
    "several images": ("test_vit", ["model.image_pool=attention"]),
    "embeddings": ("test_vit", ["loss.name=arcface", "model.embedding_size=8"]),
    "gem, metadata and several images": ("test_resnet", ["model.global_pool=gem", "model.metadata=true"]),
}
IMAGES = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(2))


def joined(kind: str) -> tuple[Any, str, dict[str, torch.Tensor]]:
    """The network, timm's name of its backbone, and its inputs besides images."""
    name, knobs = AROUND[kind]
    torch.manual_seed(0)
    several, metadata = "several" in kind, torch.randn(2 if "several" in kind else 4, 5)
    loader: Any = SimpleNamespace(multi_image=several, metadata=metadata if "metadata" in kind else None)
    head = Head("label", "retrieval" if kind == "embeddings" else "multiclass", ("a", "b", "c"), ("t.label",), ("a", "b", "c"))  # fmt: skip
    module = models.build(config(f"model.name={name}", *knobs), (head,), pretrained=False, loader=loader)
    extras = {"owner": torch.tensor([0, 0, 1, 1])} if several else {}
    return module, name, extras | ({"metadata": metadata} if "metadata" in kind else {})


@pytest.mark.parametrize("kind", list(AROUND))
def test_layer_decay_of_a_wrapped_backbone_equals_timms(empty: Path, kind: str) -> None:
    module, name, _ = joined(kind)
    size: Any = {"img_size": 32} if name == "test_vit" else {}
    plain: Any = timm.create_model(name, num_classes=3, in_chans=1, **size)
    spared: set[str] = getattr(plain, "no_weight_decay", set)()
    wanted = {
        id(weight): (group["lr_scale"], bool(group["weight_decay"]))
        for group in param_groups_layer_decay(plain, 0.1, no_weight_decay_list=spared, layer_decay=0.5)
        for weight in group["params"]
    }
    found = {
        id(weight): (group["lr_scale"], bool(group["weight_decay"]))
        for group in optim.parameter_groups(config("optim.layer_decay=0.5", "optim.weight_decay=0.1"), module)
        for weight in group["params"]
    }
    inside, prefix = inner(module)
    assert prefix and len(found) == len(list(module.parameters()))
    theirs = dict(plain.named_parameters())
    for key, weight in inside.named_parameters():
        assert found[id(weight)] == wanted[id(theirs[key])], key
    around = [weight for key, weight in module.named_parameters() if not key.startswith(prefix)]
    assert around and all(found[id(weight)][0] == 1.0 for weight in around)
    assert len({scale for scale, _ in found.values()}) > 2


@pytest.mark.parametrize("kind", list(AROUND))
def test_checkpointing_a_wrapped_backbone_keeps_gradients(empty: Path, kind: str) -> None:
    def of(*knobs: str) -> tuple[dict[str, torch.Tensor], int]:
        module, name, extras = joined(kind)
        prepared = torch_compile.prepare(config(f"model.name={name}", *knobs), module.train())
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = prepared(IMAGES, **extras).square().sum()
        loss.backward()
        return {
            key: weight.grad for key, weight in module.named_parameters() if weight.grad is not None
        }, saved

    want, saved = of()
    got, saved_now = of("train.grad_checkpointing=true")
    assert want and got.keys() == want.keys() and saved_now < 0.7 * saved
    for key, gradient in want.items():
        assert torch.allclose(got[key], gradient, rtol=1e-4, atol=1e-6), key


def test_gem_pooling_works_with_stages_and_pretrained_files(empty: Path) -> None:
    from comp.engine.run import pretrained, stages

    module, name, _ = joined("gem")
    given = timm.create_model(name, num_classes=5, in_chans=1).state_dict()
    fits = pretrained.matching_tensors(module, given, "x")
    missing = set(module.state_dict()) - set(fits)
    assert missing == {"backbone.p", "last.weight", "last.bias"}
    names = stages.trained_parameters(module, "last 1 block", name)
    assert {"last.weight", "backbone.p"} < names < {key for key, _ in module.named_parameters()}
