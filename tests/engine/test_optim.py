"""Optimizers: each takes steps and resumes exactly; weight decay and l1 apply to exactly their parameters."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import config
from torch import Tensor, nn

from comp import optim
from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.run.unused_knobs import CYCLING

# By name in the promise, and one of each other kind: own classes of timm, cautious, corrected, trust ratios.
LISTED = [
    "sgd", "momentum", "adam", "adamw", "adagrad", "rmsprop", "rmsproptf", "lion", "lamb", "adan", "nadam", "muon", "adahessian", "kron",
    "lbfgs", "adafactor", "adabelief", "lars", "madgrad", "novograd", "cadamw", "adamuon", "mars", "laprop", "adopt",
]  # fmt: skip
PLAIN = ["optim.weight_decay=0"]


@pytest.fixture(autouse=True)
def _somewhere(empty: Path) -> None:
    """Other knobs as in configs/base.yaml."""


class Net(nn.Module):
    """Convolution, norm, bias and head, which parameter groups treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))
        return out


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def train(cfg: Config, module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """As in the training loop: set the learning rate, compute and clip gradients, step, drop gradients."""
    for step in steps:
        torch.manual_seed(step)
        optim.set_lr(optimizer, cfg.optim.lr * (1 + step / 10), None)
        loss = nn.functional.cross_entropy(module(torch.randn(6, 1, 8, 8)), torch.arange(6) % 3)
        loss.backward(create_graph=optim.second_order(optimizer))
        optim.clip_gradients(cfg, module)
        optimizer.step()
        optimizer.zero_grad()


def stored(state: Any) -> Any:
    """Saved to and loaded from memory, as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def resumes(*overrides: str) -> None:
    cfg = config(*overrides)
    whole, whole_optimizer = (net := network()), optim.optimizer(cfg, net)
    train(cfg, whole, whole_optimizer, range(3))
    state = stored({"model": whole.state_dict(), "optimizer": whole_optimizer.state_dict()})
    assert not same(whole, network()) and all(value.isfinite().all() for value in whole.state_dict().values())
    train(cfg, whole, whole_optimizer, range(3, 9))
    again, optimizer = (net := Net()), optim.optimizer(cfg, net)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(cfg, again, optimizer, range(3, 9))
    assert same(again, whole)


@pytest.mark.parametrize("name", LISTED)
def test_every_optimizer_resumes_to_the_same_bytes(name: str) -> None:
    resumes(f"optim.name={name}", "optim.lr=0.01", *(PLAIN if name == "lbfgs" else ["optim.l1=0.01"]))


@pytest.mark.parametrize("overrides", [["adam"], ["kron"], ["adahessian"], ["sgd", "optim.layer_decay=0.5"]])
def test_lookahead_resumes_to_the_same_bytes(overrides: list[str]) -> None:
    """Three steps are not a multiple of two: it resumes between two synchronizations."""
    resumes(f"optim.name={overrides[0]}", "optim.lr=0.01", "optim.lookahead=2")


def test_lookahead_moves_half_way_to_the_slow_weights() -> None:
    cfg = config("optim.name=momentum", "optim.momentum=0", "optim.lr=0.1", "optim.lookahead=2", *PLAIN)
    ahead, plain = network(), network()
    one, other = (
        optim.optimizer(cfg, ahead),
        optim.optimizer(config("optim.name=momentum", "optim.momentum=0", *PLAIN), plain),
    )
    at = []
    for step in range(4):
        train(cfg, ahead, one, range(step, step + 1))
        if step < 2:
            train(cfg, plain, other, range(step, step + 1))
        at.append(ahead.head.weight.detach().clone())
    assert torch.equal(at[1], plain.head.weight), "the first look is where the slow weights begin"
    fast = network()
    fast.load_state_dict(plain.state_dict())
    train(
        cfg,
        fast,
        optim.optimizer(config("optim.name=momentum", "optim.momentum=0", *PLAIN), fast),
        range(2, 4),
    )
    assert torch.allclose(at[3], (at[1] + fast.head.weight) / 2, atol=1e-7)


# --- four numbers -------------------------------------------------------------------------------------------


def moved(*overrides: str) -> dict[str, Tensor]:
    """Each weight before and after a step with zero gradients, which only weight decay and l1 change."""
    cfg = config("optim.name=adamw", "optim.lr=0.1", *overrides)
    module = network()
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(1.0)
    optimizer = optim.optimizer(cfg, module)
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return {name: (1 - weight.detach()).mean() for name, weight in module.named_parameters()}


@pytest.mark.parametrize(
    ("knob", "backbone", "head"),
    [
        ("weight_decay", 0.05, 0.0),
        ("weight_decay_head", 0.0, 0.05),
        ("l1", 0.05, 0.0),
        ("l1_head", 0.0, 0.05),
    ],
)
def test_weight_decay_and_l1_apply_to_exactly_their_weights(knob: str, backbone: float, head: float) -> None:
    off = dict.fromkeys(("weight_decay", "weight_decay_head", "l1", "l1_head"), 0.0) | {knob: 0.5}
    out = moved(*(f"optim.{key}={value}" for key, value in off.items()))
    wanted = {"conv.weight": backbone, "head.weight": head}
    assert {k: round(float(v), 6) for k, v in out.items()} == {k: wanted.get(k, 0.0) for k in out}


def test_head_values_default_to_those_of_the_backbone() -> None:
    out = moved("optim.weight_decay=0.5", "optim.l1=0.2")
    shrunk = 1 - (0.95 - 0.02)
    assert {k: round(float(v), 6) for k, v in out.items() if v} == {
        "conv.weight": round(shrunk, 6),
        "head.weight": round(shrunk, 6),
    }
    groups = optim.parameter_groups(config("optim.weight_decay=0.5", "optim.l1=0.2"), network())
    assert len(groups) == 2, "alike is one group: each more costs time"


def test_l1_stops_at_zero() -> None:
    cfg = config("optim.name=sgd", "optim.lr=0.1", "optim.l1=0.5", *PLAIN)
    module = network()
    with torch.no_grad():
        module.conv.weight.copy_(torch.linspace(-0.2, 0.2, 36).view_as(module.conv.weight))
    before = module.conv.weight.detach().clone()
    optimizer = optim.optimizer(cfg, module)
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(module.conv.weight, nn.functional.softshrink(before, 0.05))
    assert (module.conv.weight == 0).any()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_head_of_a_timm_model_is_its_classifier(name: str) -> None:
    module: Any = timm.create_model(name, num_classes=3)
    assert {id(weight) for weight in optim.head_parameters(module)} == {
        id(weight) for weight in module.get_classifier().parameters()
    }
    spared = {
        id(weight)
        for name, weight in module.named_parameters()
        if weight.ndim < 2 or name in getattr(module, "no_weight_decay", set)()
    }
    for group in optim.parameter_groups(config(), module):
        assert all((id(weight) in spared) == (group["weight_decay"] == 0) for weight in group["params"])


def test_layer_decay_is_a_power_of_the_depth() -> None:
    module: Any = timm.create_model("test_vit", num_classes=3)
    cfg = config("optim.layer_decay=0.5", "optim.lr=0.1", "optim.weight_decay_head=0.7")
    optimizer = optim.optimizer(cfg, module)
    optim.set_lr(optimizer, 0.1, None)
    of = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    rates = {name: of[id(weight)]["lr"] for name, weight in module.named_parameters()}
    depth = len(module.blocks) + 1
    assert rates["head.weight"] == pytest.approx(0.1) and of[id(module.head.weight)]["weight_decay"] == 0.7
    assert rates["patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5**depth)
    for number in range(len(module.blocks)):
        assert rates[f"blocks.{number}.attn.qkv.weight"] == pytest.approx(0.1 * 0.5 ** (depth - 1 - number))


def test_second_order_differentiates_a_transformer() -> None:
    module: Any = timm.create_model("test_vit", num_classes=3, img_size=32)
    cfg = config("optim.name=adahessian", "optim.lr=0.01")
    optimizer = optim.optimizer(cfg, module)
    before = module.head.weight.detach().clone()
    nn.functional.cross_entropy(module(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward(
        create_graph=True
    )
    optimizer.step()
    assert not torch.equal(module.head.weight, before) and module.head.weight.isfinite().all()


# --- gradients and momentum ---------------------------------------------------------------------------------


def clipped(mode: str, limit: float, gradient: float = 3.0) -> dict[str, Tensor]:
    module = network()
    for weight in module.parameters():
        weight.grad = torch.full_like(weight, gradient)
    optim.clip_gradients(config(f"optim.clip_grad={limit}", f"optim.clip_mode={mode}"), module)
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def test_clipping_by_norm_by_value_and_by_unit() -> None:
    count = sum(weight.numel() for weight in network().parameters())
    by_norm = clipped("norm", 0.5)
    assert all(
        torch.allclose(g, torch.full_like(g, 0.5 / math.sqrt(count)), rtol=1e-4) for g in by_norm.values()
    )
    assert all((g == 0.5).all() for g in clipped("value", 0.5).values())
    assert all((g == 0.2).all() for g in clipped("value", 0.5, 0.2).values())
    by_unit, weights = clipped("agc", 0.1), dict(network().named_parameters())
    for unit, weight in zip(by_unit["conv.weight"], weights["conv.weight"].detach(), strict=True):
        assert float(unit.norm()) == pytest.approx(0.1 * float(weight.norm()), rel=1e-4)
    assert (by_unit["head.weight"] == 3).all() and (by_unit["head.bias"] == 3).all(), "the head is left alone"


@pytest.mark.parametrize(("name", "read"), [
    ("adamw", lambda g: g["betas"][0]), ("sgd", lambda g: g["momentum"]), ("adan", lambda g: g["betas"][0]),
    ("kron", lambda g: g["momentum"]), ("lion", lambda g: g["betas"][0]), ("rmsprop", lambda g: g["momentum"]),
])  # fmt: skip
def test_momentum_is_set_and_cycles(name: str, read: Callable[[dict[str, Any]], float]) -> None:
    own = [read(g) for g in optim.optimizer(config(f"optim.name={name}"), network()).param_groups]
    optimizer = optim.optimizer(config(f"optim.name={name}", "optim.momentum=0.7"), network())
    rest = [g.get("betas", (0,))[1:] for g in optimizer.param_groups]
    assert [read(g) for g in optimizer.param_groups] == [0.7] * len(own) != own
    optim.set_lr(optimizer, 0.1, 0.85)
    assert [read(g) for g in optimizer.param_groups] == [0.85] * len(own)
    assert [g.get("betas", (0,))[1:] for g in optimizer.param_groups] == rest


def test_kron_needs_opt_einsum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, einsum is evaluated left to right, which takes gigabytes and minutes per convolution
    step."""
    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"optim.name: kron needs opt_einsum"):
        optim.validate(config("optim.name=kron"))
    optim.validate(config("optim.name=adamw"))


def test_options_reach_the_optimizer() -> None:
    groups = optim.optimizer(config("optim.kwargs={eps: 1e-4, betas: [0.8, 0.9]}"), network()).param_groups
    assert all(group["eps"] == 1e-4 and group["betas"] == (0.8, 0.9) for group in groups)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.name=adamm"], "optim.name: timm has no 'adamm'; the nearest are adam"),
        (["optim.name=fusedadam"], "optim.name: fusedadam needs the package apex"),
        (["optim.kwargs={epss: 1e-3}"], "optim.kwargs.epss: adamw has no such option; the nearest is eps"),
        (["optim.name=adagrad", "optim.momentum=0.9"], "optim.momentum: adagrad has no momentum; set it to null"),
        (["optim.name=adagrad", f"schedule={CYCLING[0]}"], "schedule.momentum: adagrad has no momentum; set it to null"),
        (["optim.name=lbfgs"], "optim.weight_decay: 0.05 has no effect on lbfgs"),
        (["optim.name=adahessian", "train.amp=fp16"], "train.amp: fp16 scales the loss"),
        (["optim.name=sgd", "optim.momentum=0"], "optim: sgd: Nesterov momentum requires a momentum"),
        (["optim.layer_decay=0.7"], "optim.layer_decay: the model has no group_matcher"),
    ],
)  # fmt: skip
def test_unsupported_optimizer_knobs_are_errors(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        optim.optimizer(config(*overrides), network())
    assert words in str(caught.value)
