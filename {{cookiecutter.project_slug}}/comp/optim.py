"""The optimizer: any of timm's, with four numbers against large weights. Its rate is set before every step: schedule.py.

weight_decay is L2 as the optimizer itself does it: apart from the gradient in adamw, lion, lamb, adan, muon, adahessian and names that end
in w; added to the gradient, and scaled with it, in sgd, adam, nadam, rmsprop, adagrad, kron. l1 is always apart from the gradient: after a
step every weight goes rate x l1 towards zero and stops there. Norms and biases are spared by both.
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
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.run.backbone import inner
from comp.engine.run.unused_knobs import CYCLING

Group = dict[str, Any]
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class LBFGS(torch.optim.LBFGS):
    """torch's, with one look at the loss a step: the loop has the gradient already, and curvature comes from one step's gradient to the
    next. Noise of small batches is taken for curvature, so it wants a large train.grad_accum_steps."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, **options: Any):
        super().__init__(params, lr, max_iter=1, **options)

    def step(self, closure: Any = None) -> Any:
        return super().step(lambda: torch.zeros(()))


def validate(cfg: Config) -> None:
    """Before anything is spent."""
    optimizer_class(cfg)
    if cfg.optim.name == "kron" and not torch.backends.opt_einsum.is_available():
        raise Refused(
            "optim.name: kron: needs opt_einsum, without which a single step of a convolution takes minutes: make extras, or pip install opt_einsum"
        )


def optimizer_class(cfg: Config) -> type[torch.optim.Optimizer]:
    """The class behind optim.name; what it cannot do is refused before anything is spent."""
    name, optim = cfg.optim.name, cfg.optim
    timms = [str(n) for n in list_optimizers()]
    names = [n for n in timms if not isinstance(get_optimizer_info(n).opt_class, str)] + ["lbfgs"]
    if name not in names:
        outside = name in timms and str(get_optimizer_info(name).opt_class).split(".")[0]
        if outside:
            raise Refused(f"optim.name: {name} is {outside}'s, which this project does not bring along")
        raise Refused(
            f"optim.name: timm has no {name!r}; the nearest are {', '.join(nearest(name, names, 3))}"
        )
    made: Any = LBFGS if name == "lbfgs" else get_optimizer_info(name).opt_class
    takes = inspect.signature(torch.optim.LBFGS if name == "lbfgs" else made).parameters
    for option in optim.kwargs:
        if option in ("params", "lr", "weight_decay", "momentum") or option not in takes:
            close = nearest(option, [n for n in takes if n not in ("params", "lr", "weight_decay")])[0]
            raise Refused(f"optim.kwargs.{option}: {name} takes no such option; the nearest is {close}")
    if optim.kwargs.get("update_each", 1) != 1:
        raise Refused("optim.kwargs.update_each: what it keeps between steps cannot be resumed; set it to 1")
    if "momentum" not in takes and "betas" not in takes:
        if optim.momentum is not None:
            raise Refused(f"optim.momentum: {name} has none; set it to null")
        if cfg.schedule.name in CYCLING and cfg.schedule.momentum is not None:
            raise Refused(f"schedule.momentum: {name} has none that could cycle; set it to null")
    if name in ("adahessian", "lbfgs") and cfg.train.amp == "fp16":
        raise Refused(
            f"train.amp: fp16 scales the loss, and {name} would take that for curvature; bf16 or fp32"
        )
    if name == "lbfgs":
        for key in (
            "weight_decay",
            "weight_decay_head",
            "l1",
            "l1_head",
            "layer_decay",
            "lookahead",
        ):
            if getattr(optim, key):
                raise Refused(
                    f"optim.{key}: {getattr(optim, key)} has no effect on lbfgs, which treats all weights alike; set it to "
                    f"{'null' if key in ('layer_decay', 'lookahead') else 0}"
                )
    return made


def optimizer(cfg: Config, module: nn.Module) -> torch.optim.Optimizer:
    made, optim = optimizer_class(cfg), cfg.optim
    if made is LBFGS:
        return LBFGS([p for p in module.parameters() if p.requires_grad], optim.lr, **optim.kwargs)
    given: dict[str, Any] = dict(optim.kwargs)
    if optim.momentum is not None:
        takes = inspect.signature(made).parameters
        if "betas" in takes:
            rest = (given.get("betas") or takes["betas"].default or (0.9, 0.999))[1:]
            given["betas"] = (optim.momentum, *rest)
        if "momentum" in takes:
            given["momentum"] = optim.momentum
    elif "betas" in given:
        given["betas"] = tuple(given["betas"])
    if made in FUSED and "foreach" not in given:
        # One pass over all weights, a fifth of the time of the loop over tensors that a CPU gets otherwise.
        given.setdefault("fused", True)
    if made is psgd.Kron:
        given.setdefault(
            "deterministic", True
        )  # its draws are part of its state, and the same in every process
    try:
        out = create_optimizer_v2(parameter_groups(cfg, module), optim.name, lr=optim.lr, **given)
    except (TypeError, ValueError) as error:
        raise Refused(f"optim: {optim.name}: {error}") from error
    if isinstance(out, psgd.Kron):
        # Compiled they would take minutes to start: they are compiled for every shape of a weight.
        for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
            setattr(out, name, getattr(psgd, name))
    if getattr(out, "is_second_order", False):
        # The loop drops gradients after each step, and so the cycle that torch warns of.
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        out.register_step_pre_hook(_drawn_anew)
        for part in module.modules():  # timm's attention: the fused kernel has no second derivative
            if "fused_attn" in vars(part):
                vars(part)["fused_attn"] = False
    if any(group["l1"] for group in out.param_groups):
        out.register_step_post_hook(_shrink)
    return Lookahead(out, k=optim.lookahead) if optim.lookahead else out


def parameter_groups(cfg: Config, module: nn.Module) -> list[Group]:
    """Weights that are treated alike: timm's groups by depth and by decay, each parted into backbone and head where those differ."""
    optim = cfg.optim
    spared: set[str] = getattr(module, "no_weight_decay", set)()
    if optim.layer_decay is None:
        found = param_groups_weight_decay(module, 1.0, no_weight_decay_list=spared)
    elif not hasattr(inner(module)[0], "group_matcher"):
        raise Refused(
            "optim.layer_decay: only timm's own networks know their layers; give model(cfg, outputs) of comp/competition.py a "
            "group_matcher like theirs, or set it to null"
        )
    else:
        found = param_groups_layer_decay(
            module, 1.0, no_weight_decay_list=spared, layer_decay=optim.layer_decay
        )
    backbone = (optim.weight_decay, optim.l1)
    last = (
        optim.weight_decay if optim.weight_decay_head is None else optim.weight_decay_head,
        optim.l1 if optim.l1_head is None else optim.l1_head,
    )
    in_head = {id(weight) for weight in head_parameters(module)}
    out: list[Group] = []
    for group in found:
        parted: dict[tuple[float, float], list[nn.Parameter]] = {}
        for weight in group["params"]:
            numbers = last if id(weight) in in_head else backbone
            parted.setdefault(numbers if group["weight_decay"] else (0.0, 0.0), []).append(weight)
        for (l2, l1), weights in parted.items():
            out.append({**group, "params": weights, "weight_decay": l2, "l1": l1})
    return out


def head_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The last layer: what timm calls the classifier, or the last module that has weights."""
    last: Any = getattr(module, "last", None)
    if last is None:
        last = getattr(module, "get_classifier", lambda: None)()
    parts = [part for part in (last if isinstance(last, tuple | list) else [last]) if part is not None]
    weights = [weight for part in parts for weight in part.parameters()]
    if not weights:
        owners = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        weights = list(owners[-1].parameters()) if owners else []
    return weights


def set_lr(optim: torch.optim.Optimizer, rate: float, momentum: float | None) -> None:
    """momentum None: as it is."""
    for group in optim.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
        if momentum is not None and group.get("betas"):
            group["betas"] = (momentum, *group["betas"][1:])
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum


def clip_gradients(cfg: Config, module: nn.Module) -> Tensor:
    """norm: of all gradients together; value: of each number; agc: of each unit, as a share of its weights, the head left alone.
    Answers with the norm before."""
    assert cfg.optim.clip_grad is not None
    weights = [weight for weight in module.parameters() if weight.grad is not None]
    if cfg.optim.clip_mode == "norm":
        return nn.utils.clip_grad_norm_(weights, cfg.optim.clip_grad)
    norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if cfg.optim.clip_mode == "agc":
        spared = {id(weight) for weight in head_parameters(module)}
        weights = [weight for weight in weights if id(weight) not in spared]
    dispatch_clip_grad(weights, cfg.optim.clip_grad, cfg.optim.clip_mode)
    return norm


def second_order(optim: torch.optim.Optimizer) -> bool:
    """Whether the gradients must themselves be differentiable; twice the memory and time."""
    return bool(getattr(optim, "is_second_order", False))


@torch.no_grad()
def _shrink(optim: torch.optim.Optimizer, args: Any, named: Any) -> None:
    for group in optim.param_groups:
        if by := group["lr"] * group["l1"]:
            for weight in group["params"]:
                weight.copy_(F.softshrink(weight, by))


def _drawn_anew(optim: Any, args: Any, named: Any) -> None:
    """AdaHessian's own draws go on from where its process began; drawn from the step they are the same after a resume."""
    weight = next(iter(optim.get_params()))
    optim.generator = torch.Generator(weight.device)
    optim.generator.manual_seed(fold_in(optim.seed, optim.state[weight]["hessian step"]))
