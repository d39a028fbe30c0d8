"""The network: any of timm's by name, or your own from competition.py, with one output block a head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from comp.engine import pages
from comp.engine.config.schema import Config
from comp.engine.errors import Refused, UserError
from comp.engine.run import backbone, normalize, target_scaler
from comp.engine.run.backbone import inner
from comp.engine.run.metric_learning import EmbeddingLayer, GeM, feature_map
from comp.engine.store import artifacts
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    from comp.engine.run.data_loader import Loader

Last = Callable[[int], nn.Module]  # features -> the last layer
BESIDE = 32  # what the metadata is brought to before it joins the image


def output_sizes(cfg: Config, heads: tuple[Head, ...]) -> list[int]:
    """Network outputs of each head, in order."""
    losses = loss_knobs.head_losses(cfg, heads)
    return [head.spec.num_outputs(head, loss) for head, loss in zip(heads, losses, strict=True)]


def decode(cfg: Config, heads: tuple[Head, ...], raw: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """(rows, network outputs) -> what is stored of each head, in float64."""
    blocks = np.split(raw.astype(np.float64), np.cumsum(output_sizes(cfg, heads))[:-1], axis=1)
    losses = loss_knobs.head_losses(cfg, heads)
    return [h.spec.decode(block, loss) for h, block, loss in zip(heads, blocks, losses, strict=True)]


def build(cfg: Config, heads: tuple[Head, ...], pretrained: bool, loader: Loader | None = None) -> nn.Module:
    """Inference passes pretrained=False: there may be no internet, and our own weights follow. A feed whose samples have
    several images, or metadata beside them, wants them joined before the last layer."""
    module = _network(cfg, heads, pretrained, loader)
    normalize.register(cfg, module)
    target_scaler.register(cfg, heads, module)
    return module


def _network(cfg: Config, heads: tuple[Head, ...], pretrained: bool, loader: Loader | None) -> nn.Module:
    total = sum(output_sizes(cfg, heads))
    width = 0 if loader is None or loader.metadata is None else int(loader.metadata.shape[1])
    several = loader is not None and loader.multi_image
    embeds = loss_knobs.metric_learning_loss(cfg, heads)
    last: Last | None = None
    if embeds is not None:  # its centres are no outputs of a last layer but points of their own
        size, per_class = embeds.knobs["embedding"], embeds.knobs.get("sub_centers", 1)
        last = partial(EmbeddingLayer, size=size, classes=total - size, per_class=per_class)
    if (make := pages.get("model")) is not None:
        if cfg.model.global_pool != "default":
            raise Refused(
                "model.global_pool: gem has no effect on model(cfg, outputs) of comp/competition.py; set it to default"
            )
        if cfg.model.stem != "default":
            raise Refused(
                "model.stem: small has no effect on model(cfg, outputs) of comp/competition.py; set it to default"
            )
        if width:
            raise Refused(
                "model.metadata: true has no effect on model(cfg, outputs) of comp/competition.py; set it to false"
            )
        module = make(cfg, total if embeds is None else embeds.knobs["embedding"])
        assert isinstance(module, nn.Module)
        if embeds is not None:
            return MultiInputModel(module, cfg.model.image_pool, embeds.knobs["embedding"], last=last)
        return MultiInputModel(module, cfg.model.image_pool, total) if several else module
    gem = cfg.model.global_pool == "gem"
    if not several and not width and not gem and embeds is None:
        return backbone.create(cfg, total, pretrained)
    inside = backbone.create(cfg, 0, pretrained)
    features = _width(inside)
    inside = GeM(inside, features, cfg.model.name) if gem else inside
    return MultiInputModel(
        inside, cfg.model.image_pool, features, width, last or partial(nn.Linear, out_features=total)
    )


def headless(cfg: Config, pretrained: bool, loader: Loader) -> nn.Module:
    """The network without its last layer; several images of a sample become one."""
    module = backbone.create(cfg, 0, pretrained)
    return MultiInputModel(module, cfg.model.image_pool, _width(module)) if loader.multi_image else module


def validate(cfg: Config) -> None:
    """Whether pictures of the sizes of this run go through the network, and batches; before anything is spent."""
    if pages.get("model") is not None:
        return

    def asks(module: nn.Module, output: Tensor) -> None:
        if cfg.model.global_pool == "gem":
            feature_map(output, _width(module), cfg.model.name)

    backbone.validate(cfg, asks)


def validate_pool(cfg: Config, multi_image: bool) -> None:
    if cfg.model.image_pool != "mean" and not multi_image:
        what = f"{cfg.model.image_pool} has no effect, since every sample has one image"
        raise UserError("knob-unused", key="model.image_pool", what=what, remedy="set it to mean")


def check_report(cfg: Config, _reading: object) -> tuple[list[str], list[str]]:
    """For comp check: why the network cannot be built for this run, and what its weights want to see."""
    try:
        validate(cfg)
    except UserError as refused:
        return refused.lines, []
    return [], [] if pages.get("model") is not None else [backbone.describe(cfg)]


def _width(module: nn.Module) -> int:
    """Features before the last layer; some of timm's widen them after pooling."""
    found = getattr(module, "head_hidden_size", None) or getattr(module, "num_features", None)
    assert isinstance(found, int)
    return found


class MultiInputModel(nn.Module):
    """Features of several images of a sample become one, the metadata of the sample stands beside them, then the last layer."""

    def __init__(
        self, backbone: nn.Module, pool: str, features: int, metadata: int = 0, last: Last | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.pool = {"mean": "mean", "max": "amax", "attention": ""}[pool]
        self.heard = nn.Linear(features, 1) if pool == "attention" else None
        self.beside = nn.Sequential(nn.Linear(metadata, BESIDE), nn.SiLU()) if metadata else None
        self.last = last(features + (BESIDE if metadata else 0)) if last else nn.Identity()
        self.pretrained_cfg = getattr(backbone, "pretrained_cfg", {})

    def no_weight_decay(self) -> set[str]:
        """What timm's network would be spared, under the names that its parameters have here."""
        inside, prefix = inner(self)
        return {prefix + name for name in getattr(inside, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Depth of a parameter as timm counts it in the network inside; what stands around that is as deep as its last layer."""
        inside, prefix = inner(self)
        named = ((name.removeprefix(prefix), weight) for name, weight in self.named_parameters())
        depth = group_with_matcher(named, inside.group_matcher(coarse=coarse), reverse=True)
        return lambda name: int(depth[name.removeprefix(prefix)])

    def forward(self, images: Tensor, owner: Tensor | None = None, metadata: Tensor | None = None) -> Tensor:
        x = self.backbone(images)  # (images, features)
        if owner is not None and self.heard is not None:
            x = attention_pool(x, owner, self.heard)
        elif owner is not None:
            into = x.new_zeros(int(owner[-1]) + 1, x.shape[1])  # (samples, features)
            x = into.scatter_reduce(0, owner[:, None].expand_as(x), x, self.pool, include_self=False)
        if self.beside is not None:
            x = torch.cat([x, self.beside(metadata)], 1)
        return self.last(x)


def attention_pool(x: Tensor, owner: Tensor, heard: nn.Linear) -> Tensor:
    """(images, features) -> (samples, features): a mean in which each image has the weight that its features ask for."""
    samples = int(owner[-1]) + 1
    ask = heard(x)  # (images, 1)
    most = ask.new_full((samples, 1), -torch.inf).scatter_reduce(0, owner[:, None], ask, "amax")
    share = (ask - most[owner]).exp()
    whole = share.new_zeros(samples, 1).index_add(0, owner, share)
    return x.new_zeros(samples, x.shape[1]).index_add(0, owner, (x * share / whole[owner]).to(x.dtype))


def weight_bytes(cfg: Config, heads: tuple[Head, ...]) -> int:
    """Bytes of the weights, without making them: on the meta device a network of a billion costs nothing."""
    with torch.device("meta"):
        module = build(cfg, heads, pretrained=False)
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def load_weights(module: nn.Module, file: Path) -> nn.Module:
    from safetensors.torch import load_file

    module.load_state_dict(load_file(artifacts.verified(file)))
    return module


def save_weights(module: nn.Module, file: Path, **facts: Any) -> None:
    from safetensors.torch import save

    # Cloned, because safetensors refuses tensors that share memory and some networks tie theirs.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(save(state))
    artifacts.add_to_manifest(file, **facts)
