"""Faster or smaller, and the same numbers; refused by name where a network cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import config
from test_training import refusal

from comp.tasks import Head
from comp.train import model, speed


def network(*overrides: str) -> torch.nn.Module:
    torch.manual_seed(0)
    head = Head("label", "multiclass", ("0", "1"), ("label",), ("0", "1"))
    return model.build(config(*overrides), (head,), pretrained=False)


def gradients(prepared: object, module: torch.nn.Module) -> tuple[torch.Tensor, int]:
    """And how many numbers were kept for the backward pass."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)
    pictures = torch.randn(4, 1, 32, 32)
    module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = prepared(pictures).square().sum()  # type: ignore[operator]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]), kept


@pytest.mark.parametrize("knob", ["grad_checkpointing", "channels_last"])
def test_gradients_stay_the_same(empty: Path, knob: str) -> None:
    name = "model.name=test_convnext"
    plain, other = network(name), network(name)
    prepared = speed.prepared(config(name, f"train.{knob}=true"), other)
    want, kept = gradients(plain, plain)
    got, kept_now = gradients(prepared, other)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    if knob == "grad_checkpointing":
        assert kept_now < kept / 2
    else:
        weight = next(layer for layer in other.modules() if isinstance(layer, torch.nn.Conv2d)).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compiling_is_asked_of_torch_and_changes_nothing_that_is_saved(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.nn.Module] = []

    def compile(module: torch.nn.Module) -> object:
        asked.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", compile)
    module = network()
    names = list(module.state_dict())
    prepared = speed.prepared(config("train.compile=true"), module)
    assert asked == [module] and list(module.state_dict()) == names
    assert prepared(torch.zeros(2, 1, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("knob", ["grad_checkpointing", "channels_last"])
def test_a_network_that_cannot_says_so(empty: Path, knob: str) -> None:
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    assert f"train.{knob}" in refusal(lambda: speed.prepared(config(f"train.{knob}=true"), plain))
