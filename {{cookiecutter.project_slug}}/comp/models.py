"""The network: a timm model by name, or a custom one from competition.py, with one block of outputs per
head."""

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
from comp.engine.errors import UserError
from comp.engine.run import backbone, normalize, target_scaler
from comp.engine.run.backbone import inner
from comp.engine.run.metric_learning import EmbeddingLayer, GeM, feature_map
from comp.engine.store import artifacts, paths
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head

if TYPE_CHECKING:
    from comp.engine.run.data_loader import Loader

LastLayer = Callable[[int], nn.Module]  # number of features -> the last layer
METADATA_FEATURES = 32  # of the metadata, appended to those of the image


def output_sizes(cfg: Config, heads: tuple[Head, ...]) -> list[int]:
    """Number of network outputs of each head, in order."""
    objectives = loss_knobs.head_losses(cfg, heads)
    return [head.spec.num_outputs(head, objective) for head, objective in zip(heads, objectives, strict=True)]


def decode(cfg: Config, heads: tuple[Head, ...], raw: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """(rows, network outputs) -> predictions of each head as they are stored, computed in float64."""
    blocks = np.split(raw.astype(np.float64), np.cumsum(output_sizes(cfg, heads))[:-1], axis=1)
    objectives = loss_knobs.head_losses(cfg, heads)
    return [
        head.spec.decode(block, objective)
        for head, block, objective in zip(heads, blocks, objectives, strict=True)
    ]


def build(cfg: Config, heads: tuple[Head, ...], pretrained: bool, loader: Loader | None = None) -> nn.Module:
    """Inference passes pretrained=False: the weights of the run are loaded next, and there may be no
    internet. `loader` tells whether samples have several images or metadata, which join before the last
    layer."""
    module = _network(cfg, heads, pretrained, loader)
    normalize.register(cfg, module)
    target_scaler.register(cfg, heads, module)
    return module


def _network(cfg: Config, heads: tuple[Head, ...], pretrained: bool, loader: Loader | None) -> nn.Module:
    outputs = sum(output_sizes(cfg, heads))
    metadata = 0 if loader is None or loader.metadata is None else int(loader.metadata.shape[1])
    multi_image = loader is not None and loader.multi_image
    embeds = loss_knobs.metric_learning_loss(cfg, heads)
    last: LastLayer | None = None
    if embeds is not None:
        size, sub_centers = embeds.knobs["embedding"], embeds.knobs.get("sub_centers", 1)
        last = partial(EmbeddingLayer, size=size, classes=outputs - size, sub_centers=sub_centers)
    if (custom := pages.get("model")) is not None:
        _validate_custom(cfg, metadata)
        module = custom(cfg, outputs if embeds is None else embeds.knobs["embedding"])
        assert isinstance(module, nn.Module)
        if embeds is not None:
            return MultiInputModel(module, cfg.model.image_pool, embeds.knobs["embedding"], last=last)
        return MultiInputModel(module, cfg.model.image_pool, outputs) if multi_image else module
    gem = cfg.model.global_pool == "gem"
    if not multi_image and not metadata and not gem and embeds is None:
        return backbone.create(cfg, outputs, pretrained)
    network = backbone.create(cfg, 0, pretrained)
    features = _num_features(network)
    network = GeM(network, features, cfg.model.name) if gem else network
    last = last or partial(nn.Linear, out_features=outputs)
    return MultiInputModel(network, cfg.model.image_pool, features, metadata, last)


def _validate_custom(cfg: Config, metadata: int) -> None:
    """Knobs of timm networks that a custom model does not get."""
    for key, value, default in (
        ("model.global_pool", cfg.model.global_pool, "default"),
        ("model.stem", cfg.model.stem, "default"),
        ("model.metadata", "true" if metadata else "false", "false"),
    ):
        if value != default:
            raise UserError(
                "knob-unused",
                key=key,
                what=f"{value} has no effect on model(cfg, outputs) of comp/competition.py",
                remedy=f"set it to {default}",
            )


def headless(cfg: Config, pretrained: bool, loader: Loader) -> nn.Module:
    """The network without its last layer: (images) -> (samples, features)."""
    module = backbone.create(cfg, 0, pretrained)
    if not loader.multi_image:
        return module
    return MultiInputModel(module, cfg.model.image_pool, _num_features(module))


def validate(cfg: Config) -> None:
    """Run images of this run's sizes through the network, before anything is trained."""
    if pages.get("model") is not None:
        return

    def validate_output(module: nn.Module, output: Tensor) -> None:
        if cfg.model.global_pool == "gem":
            feature_map(output, _num_features(module), cfg.model.name)

    backbone.validate(cfg, validate_output)


def validate_pool(cfg: Config, multi_image: bool) -> None:
    if cfg.model.image_pool != "mean" and not multi_image:
        what = f"{cfg.model.image_pool} has no effect, since every sample has one image"
        raise UserError("knob-unused", key="model.image_pool", what=what, remedy="set it to mean")


def check_report(cfg: Config) -> tuple[list[UserError], list[str]]:
    """For comp check: errors of the network of this run, and a description of what its pretrained weights
    expect."""
    try:
        validate(cfg)
    except UserError as error:
        return error.errors, []
    return [], [] if pages.get("model") is not None else [backbone.describe(cfg)]


def _num_features(module: nn.Module) -> int:
    """Features before the last layer; some of timm's networks have more after pooling than before."""
    features = getattr(module, "head_hidden_size", None) or getattr(module, "num_features", None)
    assert isinstance(features, int)
    return features


class MultiInputModel(nn.Module):
    """A backbone whose features are pooled over the images of a sample and joined with its metadata, then the
    last layer."""

    def __init__(
        self, backbone: nn.Module, pool: str, features: int, metadata: int = 0, last: LastLayer | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.pool = {"mean": "mean", "max": "amax", "attention": ""}[pool]
        self.attention = nn.Linear(features, 1) if pool == "attention" else None
        self.metadata = nn.Sequential(nn.Linear(metadata, METADATA_FEATURES), nn.SiLU()) if metadata else None
        self.last = last(features + (METADATA_FEATURES if metadata else 0)) if last else nn.Identity()
        self.pretrained_cfg = getattr(backbone, "pretrained_cfg", {})

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm exempts from weight decay, by their names here."""
        network, prefix = inner(self)
        return {prefix + name for name in getattr(network, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Depth of a parameter as timm counts it in the backbone; parameters outside of it have that of its
        last layer."""
        network, prefix = inner(self)
        named = ((name.removeprefix(prefix), weight) for name, weight in self.named_parameters())
        depth = group_with_matcher(named, network.group_matcher(coarse=coarse), reverse=True)
        return lambda name: int(depth[name.removeprefix(prefix)])

    def forward(self, images: Tensor, owner: Tensor | None = None, metadata: Tensor | None = None) -> Tensor:
        """`owner`: (images,), which sample of the batch each image belongs to; None: one image per sample."""
        x = self.backbone(images)  # (images, features)
        if owner is not None and self.attention is not None:
            x = attention_pool(x, owner, self.attention)
        elif owner is not None:
            pooled = x.new_zeros(int(owner[-1]) + 1, x.shape[1])  # (samples, features)
            x = pooled.scatter_reduce(0, owner[:, None].expand_as(x), x, self.pool, include_self=False)
        if self.metadata is not None:
            x = torch.cat([x, self.metadata(metadata)], 1)
        return self.last(x)


def attention_pool(x: Tensor, owner: Tensor, attention: nn.Linear) -> Tensor:
    """(images, features) -> (samples, features): mean over the images of a sample, weighted by a softmax of
    their scores."""
    samples = int(owner[-1]) + 1
    scores = attention(x)  # (images, 1)
    highest = scores.new_full((samples, 1), -torch.inf).scatter_reduce(0, owner[:, None], scores, "amax")
    share = (scores - highest[owner]).exp()
    total = share.new_zeros(samples, 1).index_add(0, owner, share)
    return x.new_zeros(samples, x.shape[1]).index_add(0, owner, (x * share / total[owner]).to(x.dtype))


def weight_bytes(cfg: Config, heads: tuple[Head, ...]) -> int:
    """Size of the weights in bytes, computed on the meta device, which allocates nothing."""
    with torch.device("meta"):
        module = build(cfg, heads, pretrained=False)
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def load_weights(module: nn.Module, file: Path) -> nn.Module:
    from safetensors.torch import load_file

    state = load_file(artifacts.verified(file))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            "weights-differ",
            where=paths.relative(file),
            what=f"does not fit the model that is built now: {backbone.first_mismatch(str(error))}",
            remedy="restore comp/competition.py and the package versions that it was trained with",
        ) from error
    return module


def save_weights(module: nn.Module, file: Path, **facts: Any) -> None:
    from safetensors.torch import save

    # Cloned, because safetensors rejects tensors that share memory, and some networks tie theirs.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(save(state))
    artifacts.add_to_manifest(file, **facts)
