"""Training in stages: first the new head alone, then the last blocks, then everything, each with its own rate and epochs.

What does not train is as it was, to the last bit: no gradient, no weight decay, and batch norms keep what they measured.
"""

from __future__ import annotations

import re

from torch import nn

from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.run import pretrained
from comp.engine.run.backbone import inner

LAST = re.compile(r"last (\d+) blocks?")


class Stages:
    def __init__(self, cfg: Config, module: nn.Module):
        self.cfg, self.module = cfg, module
        norms = {
            name for name, each in module.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)
        }
        if cfg.model.freeze_norm and not norms:
            raise Refused(f"model.freeze_norm: has no effect on {cfg.model.name}: it has no batch norm")
        self.norms = norms if cfg.model.freeze_norm else set()
        every = {name for name, _ in module.named_parameters()}
        self.trains = [
            trained_parameters(module, stage.train, cfg.model.name) for stage in cfg.train.stages
        ] or [every]

    def number(self, epoch: int) -> int:
        """Of the stage that an epoch (from 0) belongs to."""
        ends = [
            sum(stage.epochs for stage in self.cfg.train.stages[: i + 1])
            for i in range(len(self.cfg.train.stages))
        ]
        return next((i for i, end in enumerate(ends) if epoch < end), len(self.trains) - 1)

    def enter(self, epoch: int, module: nn.Module | None = None) -> None:
        """Into training mode, as far as this epoch trains; `module`: a copy instead, whose norms are measured anew."""
        trains, module = self.trains[self.number(epoch)], module or self.module
        module.train()
        for name, parameter in module.named_parameters():
            owner = name.rpartition(".")[0]
            parameter.requires_grad_(name in trains and owner not in self.norms)
        for name, each in module.named_modules():
            inside = list(each.parameters())
            if name in self.norms or (inside and not any(p.requires_grad for p in inside)):
                each.eval()


def trained_parameters(module: nn.Module, said: str, model: str) -> set[str]:
    """Names of the parameters that `head`, `last 2 blocks` or `everything` train."""
    names = [name for name, _ in module.named_parameters()]
    if said == "everything":
        return set(names)
    found = {name for name in names if pretrained.is_head(module, name)}
    if said != "head":
        match = LAST.fullmatch(said)
        assert match
        blocks = parameter_blocks(module, model)
        blocks = [block - found for block in blocks if block - found]
        if int(match[1]) > len(blocks):
            raise Refused(f"train.stages: train: {said}: {model} has {len(blocks)}; write everything")
        found = found.union(*blocks[-int(match[1]) :])
    return found


def parameter_blocks(module: nn.Module, model: str) -> list[set[str]]:
    """Parameters block by block, from the pictures on, as timm groups them."""
    from timm.models import group_parameters

    network, prefix = inner(module)
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise Refused(f"train.stages: {model} does not say what its blocks are; write head or everything")
    groups = group_parameters(network, matcher(coarse=False))
    return [{prefix + name for name in groups[number]} for number in sorted(groups)]
