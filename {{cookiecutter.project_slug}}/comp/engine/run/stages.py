"""Training in stages: first the new head alone, then the last blocks, then everything, each with its own
learning rate and epochs.

Frozen parameters do not change by a bit: no gradient, no weight decay, and batch norms keep their statistics.
"""

from __future__ import annotations

import re

from torch import nn

from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.run import pretrained
from comp.engine.run.backbone import inner

LAST_BLOCKS = re.compile(r"last (\d+) blocks?")


class Stages:
    """Which parameters train in which epoch, by train.stages. Without train.stages: one stage that trains all
    parameters."""

    def __init__(self, cfg: Config, module: nn.Module):
        self.cfg, self.module = cfg, module
        norms = {
            name
            for name, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        }
        if cfg.model.freeze_norm and not norms:
            raise UserError(
                "knob-unused",
                key="model.freeze_norm",
                what=f"{cfg.model.name} has no batch norm",
                remedy="set it to false",
            )
        self.frozen_norms = norms if cfg.model.freeze_norm else set()
        everything = {name for name, _ in module.named_parameters()}
        stages = [trained_parameters(module, stage.train, cfg.model.name) for stage in cfg.train.stages]
        self.trained = stages or [everything]  # per stage, names of parameters

    def stage_at(self, epoch: int) -> int:
        """Index of the stage that an epoch (from 0) belongs to."""
        lengths = [stage.epochs for stage in self.cfg.train.stages]
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        return next((i for i, end in enumerate(ends) if epoch < end), len(self.trained) - 1)

    def set_trainable(self, epoch: int, module: nn.Module | None = None) -> None:
        """Set requires_grad for the parameters of this epoch's stage only, and eval mode for layers without any of
        them. `module`: apply it to this copy of the model instead, before its batch norm statistics are
        recomputed (default: the model itself)."""
        trained, module = self.trained[self.stage_at(epoch)], module or self.module
        module.train()
        for name, parameter in module.named_parameters():
            layer_name = name.rpartition(".")[0]
            parameter.requires_grad_(name in trained and layer_name not in self.frozen_norms)
        for name, layer in module.named_modules():
            parameters = list(layer.parameters())
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if name in self.frozen_norms or frozen:
                layer.eval()


def trained_parameters(module: nn.Module, train: str, model: str) -> set[str]:
    """Names of the parameters that `head`, `last 2 blocks` or `everything` train."""
    names = [name for name, _ in module.named_parameters()]
    if train == "everything":
        return set(names)
    head = {name for name in names if pretrained.is_head(module, name)}
    if train == "head":
        return head
    match = LAST_BLOCKS.fullmatch(train)
    assert match, "the schema allows no other form"
    blocks = [block - head for block in parameter_blocks(module, model) if block - head]
    if int(match[1]) > len(blocks):
        raise UserError(
            "stage-blocks",
            key="train.stages",
            what=f"train: {train}: {model} has {len(blocks)} blocks",
            remedy="set train: everything",
        )
    return head.union(*blocks[-int(match[1]) :])


def parameter_blocks(module: nn.Module, model: str) -> list[set[str]]:
    """Parameter names of each block, from the input on, as timm groups them."""
    from timm.models import group_parameters

    network, prefix = inner(module)
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise UserError(
            "stage-blocks",
            key="train.stages",
            what=f"{model} has no group_matcher to tell its blocks",
            remedy="set train: head or train: everything",
        )
    groups = group_parameters(network, matcher(coarse=False))
    return [{prefix + name for name in groups[index]} for index in sorted(groups)]
