"""The optimizer: any of timm's, or lbfgs, with weight decay and l1. Its learning rate is set before every
step: schedule.py.

weight_decay is L2 as the optimizer itself applies it: decoupled from the gradient in adamw, lion, lamb, adan,
muon, adahessian and names that end in w; added to the gradient, and scaled with it, in sgd, adam, nadam,
rmsprop, adagrad, kron. l1 is always decoupled: after a step, every weight moves lr x l1 towards zero and
stops there. Neither applies to norms and biases.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.optim import kron as psgd
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.optim.lookahead import Lookahead
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F

from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.run.backbone import inner
from comp.engine.run.unused_knobs import CYCLING

Group = dict[str, Any]
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class LBFGS(torch.optim.LBFGS):
    """torch's, with one evaluation per step: the loop has computed the gradient already, and curvature is
    estimated from one step's gradient to the next. Gradient noise looks like curvature, so it needs a large
    train.grad_accum_steps."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, **options: Any):
        super().__init__(params, lr, max_iter=1, **options)

    def step(self, closure: Any = None) -> Any:
        return super().step(lambda: torch.zeros(()))


# --- checks before training --------------------------------------------------------------------------


def validate(cfg: Config) -> None:
    optimizer_class(cfg)
    if cfg.optim.name == "kron" and not torch.backends.opt_einsum.is_available():
        raise UserError(
            "package-missing",
            key="optim.name",
            what="kron needs opt_einsum: without it, one step of a convolution takes minutes",
            remedy="make extras, or pip install opt_einsum",
        )


def optimizer_class(cfg: Config) -> type[torch.optim.Optimizer]:
    """The class of optim.name; knobs that it does not have are errors."""
    name = cfg.optim.name
    _validate_name(name)
    cls: Any = LBFGS if name == "lbfgs" else get_optimizer_info(name).opt_class
    arguments = inspect.signature(torch.optim.LBFGS if name == "lbfgs" else cls).parameters
    _validate_options(cfg, list(arguments))
    if "momentum" not in arguments and "betas" not in arguments:
        if cfg.optim.momentum is not None:
            raise _no_effect("optim.momentum", f"{name} has no momentum", "null")
        if cfg.schedule.name in CYCLING and cfg.schedule.momentum is not None:
            raise _no_effect("schedule.momentum", f"{name} has no momentum", "null")
    if name in ("adahessian", "lbfgs") and cfg.train.amp == "fp16":
        raise UserError(
            "optimizer-incompatible",
            key="train.amp",
            what=f"fp16 scales the loss, which {name} would take for curvature",
            remedy="set it to bf16 or fp32",
        )
    if name == "lbfgs":
        for key, unset in (("weight_decay", "0"), ("weight_decay_head", "0"), ("l1", "0"), ("l1_head", "0"),
                           ("layer_decay", "null"), ("lookahead", "null")):  # fmt: skip
            if value := getattr(cfg.optim, key):
                what = f"{value} has no effect on lbfgs, which treats all weights alike"
                raise _no_effect(f"optim.{key}", what, unset)
    return cls


def _validate_name(name: str) -> None:
    timm_names = [str(n) for n in list_optimizers()]
    # timm gives the class as a string where another package provides it
    names = [n for n in timm_names if not isinstance(get_optimizer_info(n).opt_class, str)] + ["lbfgs"]
    if name in names:
        return
    closest = f"the nearest are {', '.join(nearest(name, names, 3))}"
    if name in timm_names:
        package = str(get_optimizer_info(name).opt_class).split(".")[0]
        what = f"{name} needs the package {package}, which is no dependency of this project"
    else:
        what = f"timm has no {name!r}"
    raise UserError("optimizer-unknown", key="optim.name", what=what, remedy=closest)


def _validate_options(cfg: Config, arguments: list[str]) -> None:
    for option in cfg.optim.kwargs:
        if option in ("params", "lr", "weight_decay", "momentum") or option not in arguments:
            known = [each for each in arguments if each not in ("params", "lr", "weight_decay")]
            raise UserError(
                "knob-unknown",
                key=f"optim.kwargs.{option}",
                what=f"{cfg.optim.name} has no such option",
                remedy=f"the nearest is {nearest(option, known)[0]}",
            )
    if cfg.optim.kwargs.get("update_each", 1) != 1:
        raise UserError(
            "knob-unsupported",
            key="optim.kwargs.update_each",
            what="the optimizer's state lacks what it keeps between steps, so training cannot resume",
            remedy="set it to 1",
        )


def _no_effect(key: str, what: str, unset: str) -> UserError:
    return UserError("knob-unused", key=key, what=what, remedy=f"set it to {unset}")


# --- the optimizer -----------------------------------------------------------------------------------


def optimizer(cfg: Config, module: nn.Module) -> torch.optim.Optimizer:
    cls, optim = optimizer_class(cfg), cfg.optim
    if cls is LBFGS:
        return LBFGS([p for p in module.parameters() if p.requires_grad], optim.lr, **optim.kwargs)
    options: dict[str, Any] = dict(optim.kwargs)
    if optim.momentum is not None:
        arguments = inspect.signature(cls).parameters
        if "betas" in arguments:
            other_betas = (options.get("betas") or arguments["betas"].default or (0.9, 0.999))[1:]
            options["betas"] = (optim.momentum, *other_betas)
        if "momentum" in arguments:
            options["momentum"] = optim.momentum
    elif "betas" in options:
        options["betas"] = tuple(options["betas"])
    if cls in FUSED and "foreach" not in options:
        options.setdefault(
            "fused", True
        )  # a fifth of the time of the loop over tensors, the default on a CPU
    if cls is psgd.Kron:
        options.setdefault("deterministic", True)  # draws from its own state, the same in every process
    try:
        out = create_optimizer_v2(parameter_groups(cfg, module), optim.name, lr=optim.lr, **options)
    except (TypeError, ValueError) as error:
        raise UserError("optimizer-options", key="optim", what=f"{optim.name}: {error}") from error
    if isinstance(out, psgd.Kron):
        # timm compiles these functions, once for every shape of a weight, which takes minutes.
        for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
            setattr(out, name, getattr(psgd, name))
    if second_order(out):
        _prepare_second_order(out, module)
    if any(group["l1"] for group in out.param_groups):
        out.register_step_post_hook(_apply_l1)
    return Lookahead(out, k=optim.lookahead) if optim.lookahead else out


def _prepare_second_order(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    # torch warns of a reference cycle of parameters and gradients; the loop drops gradients after each step.
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    optimizer.register_step_pre_hook(_seed_hessian_draws)
    for layer in module.modules():  # timm's attention: the fused kernel has no second derivative
        if "fused_attn" in vars(layer):
            vars(layer)["fused_attn"] = False


def parameter_groups(cfg: Config, module: nn.Module) -> list[Group]:
    """timm's groups by depth and weight decay, each split into backbone and head where their weight decay or
    l1 differ."""
    optim = cfg.optim
    no_decay: set[str] = getattr(module, "no_weight_decay", set)()
    if optim.layer_decay is None:
        timm_groups = param_groups_weight_decay(module, 1.0, no_weight_decay_list=no_decay)
    elif not hasattr(inner(module)[0], "group_matcher"):
        raise UserError(
            "knob-unsupported",
            key="optim.layer_decay",
            what="the model has no group_matcher to tell the depth of its layers",
            remedy="give model(cfg, outputs) of comp/competition.py one like timm's, or set it to null",
        )
    else:
        timm_groups = param_groups_layer_decay(
            module, 1.0, no_weight_decay_list=no_decay, layer_decay=optim.layer_decay
        )
    backbone = (optim.weight_decay, optim.l1)
    head = (
        optim.weight_decay if optim.weight_decay_head is None else optim.weight_decay_head,
        optim.l1 if optim.l1_head is None else optim.l1_head,
    )
    head_ids = {id(weight) for weight in head_parameters(module)}
    out: list[Group] = []
    for group in timm_groups:
        split: dict[tuple[float, float], list[nn.Parameter]] = {}  # (weight_decay, l1) -> parameters
        for weight in group["params"]:
            decay = head if id(weight) in head_ids else backbone
            split.setdefault(decay if group["weight_decay"] else (0.0, 0.0), []).append(weight)
        for (weight_decay, l1), weights in split.items():
            out.append({**group, "params": weights, "weight_decay": weight_decay, "l1": l1})
    return out


def head_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Of the last layer: what timm calls the classifier, or the last module that has parameters."""
    last: Any = getattr(module, "last", None)
    if last is None:
        last = getattr(module, "get_classifier", lambda: None)()
    layers = [layer for layer in (last if isinstance(last, tuple | list) else [last]) if layer is not None]
    weights = [weight for layer in layers for weight in layer.parameters()]
    if not weights:
        owners = [each for each in module.modules() if next(each.parameters(recurse=False), None) is not None]
        weights = list(owners[-1].parameters()) if owners else []
    return weights


# --- in every step -----------------------------------------------------------------------------------


def set_lr(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    """momentum None: unchanged."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if momentum is not None and group.get("betas"):
            group["betas"] = (momentum, *group["betas"][1:])
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum


def clip_gradients(cfg: Config, module: nn.Module) -> Tensor:
    """norm: of all gradients together; value: of each number; agc: of each unit relative to its weights,
    except in the head. Returns the norm before."""
    assert cfg.optim.clip_grad is not None
    weights = [weight for weight in module.parameters() if weight.grad is not None]
    if cfg.optim.clip_mode == "norm":
        return nn.utils.clip_grad_norm_(weights, cfg.optim.clip_grad)
    norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if cfg.optim.clip_mode == "agc":
        head_ids = {id(weight) for weight in head_parameters(module)}
        weights = [weight for weight in weights if id(weight) not in head_ids]
    dispatch_clip_grad(weights, cfg.optim.clip_grad, cfg.optim.clip_mode)
    return norm


def second_order(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it differentiates gradients, which doubles memory and time."""
    return bool(getattr(optimizer, "is_second_order", False))


@torch.no_grad()
def _apply_l1(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if shrink := group["lr"] * group["l1"]:
            for weight in group["params"]:
                weight.copy_(F.softshrink(weight, shrink))


def _seed_hessian_draws(optimizer: Any, args: Any, kwargs: Any) -> None:
    """AdaHessian's generator is no part of its state. Seeded from the step, its draws are the same after a
    resume."""
    weight = next(iter(optimizer.get_params()))
    optimizer.generator = torch.Generator(weight.device)
    optimizer.generator.manual_seed(derive_seed(optimizer.seed, optimizer.state[weight]["hessian step"]))
