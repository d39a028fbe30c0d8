"""timm's models by name, at any size of image; also `hf-hub:owner/name` and `local-dir:folder`.

A model is first built on the meta device, where weights cost neither memory nor time. That finds out whether
it takes the size of its images as an argument (img_size), whether a forward pass at that size works, and
which sizes near it work. So a model that cannot be built is refused before an image is decoded.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.run import small_stem
from comp.engine.store import paths

RATES = ("drop_rate", "drop_path_rate")
# Arguments of create_model that have a knob of their own, and the knob.
OWN_KNOBS = {
    "model_name": "model.name", "pretrained": "model.pretrained", "checkpoint_path": "model.pretrained", "num_classes": "the targets",
    "in_chans": "data.channels", "img_size": "data.size", "global_pool": "model.global_pool", "drop_rate": "model.drop_rate",
    "drop_path_rate": "model.drop_path_rate", "features_only": "nothing, since a classifier is needed", "pretrained_cfg": "model.pretrained",
    "pretrained_cfg_overlay": "model.pretrained", "cache_dir": "HF_HUB_CACHE", "device": "machine.device", "dtype": "train.amp",
}  # fmt: skip
# Arguments by which timm's families accept images of other sizes than img_size; the first that works is used.
FLEXIBLE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
BUILD_ERRORS = (AssertionError, RuntimeError, ValueError, TypeError, IndexError, KeyError, ZeroDivisionError)
GRIDS = (8, 14)  # px; the sizes suggested instead of one that does not work are multiples of one of these
MAX_TRIED = 24  # sizes; each costs a model on the meta device, 0.1 to 0.5 s
LARGEST = 4096  # px, of data.size
HEADS = ("head", "fc", "classifier", "head.fc")  # names of the last layer in files of other authors


class Request(NamedTuple):
    """Everything that decides how a model is built, except the number of its outputs."""

    name: str
    size: int
    sizes: tuple[int, ...]
    channels: int
    rates: tuple[tuple[str, float], ...]
    options: str  # JSON
    stem: str
    unpooled: bool  # outputs a feature map

    @property
    def base(self) -> dict[str, Any]:
        pool = {"global_pool": ""} if self.unpooled else {}
        return {"in_chans": self.channels, **pool, **dict(self.rates), **json.loads(self.options)}

    @property
    def outputs(self) -> int:
        """Of a model on the meta device, where any number does. Without pooling there is no last layer."""
        return 0 if self.unpooled else 2


def request(cfg: Config) -> Request:
    return Request(
        name=_absolute(cfg.model.name),
        size=cfg.data.size,
        sizes=tuple(cfg.augment.progressive_sizes or ()),
        channels=cfg.data.channels,
        rates=tuple((key, rate) for key in RATES if (rate := getattr(cfg.model, key))),
        options=json.dumps(cfg.model.kwargs, sort_keys=True),
        stem=cfg.model.stem,
        unpooled=cfg.model.global_pool == "gem",
    )


def create(cfg: Config, outputs: int, pretrained: bool = False) -> nn.Module:
    """`outputs` 0: without the last layer. With model.global_pool=gem it outputs a feature map."""
    import timm

    validate_name(cfg)
    wanted = request(cfg)
    try:
        module = timm.create_model(wanted.name, pretrained, num_classes=outputs, **model_kwargs(wanted))
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            "weights-unavailable",
            key="model.pretrained",
            what=f"the weights of {wanted.name} could not be loaded ({reason})",
            remedy="without internet set model.pretrained=false",
        ) from error
    assert isinstance(module, nn.Module)
    return small_stem.small(module, wanted.name) if wanted.stem == "small" else module


def validate_name(cfg: Config) -> None:
    """Raises unless timm, the hub or the folder has a model of this name."""
    import timm

    name = cfg.model.name
    if split(name)[0] is not None:
        _described(name)
        return
    if not timm.is_model(name):
        close = nearest(name, timm.list_models(), 3)
        raise UserError(
            "model-unknown",
            key="model.name",
            what=f"timm has no {name!r}",
            remedy=f"the nearest are {', '.join(close)}",
        )
    base, _, tag = name.partition(".")
    if tag and name not in (tags := timm.list_pretrained(f"{base}.*")):
        there = f"the nearest is {nearest(name, tags)[0]}" if tags else "it has none"
        raise UserError(
            "weights-unknown", key="model.name", what=f"{base} has no weights {tag!r}", remedy=there
        )


def split(name: str) -> tuple[str | None, str]:
    """(hf-hub or local-dir, its place), or (None, timm's name)."""
    from timm.models import parse_model_name

    try:
        source, place = parse_model_name(name)
    except ValueError as error:
        raise UserError("model-unknown", key="model.name", what=str(error)) from None
    return source, place


@lru_cache(maxsize=64)
def _described(name: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """config.json of a hub repository or of a folder: pretrained_cfg, timm's name of the architecture, its
    arguments."""
    import timm
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    source, place = split(name)
    local = source == "local-dir"
    try:
        found = load_model_config_from_path(paths.path(place)) if local else load_model_config_from_hf(place)
    except (OSError, ValueError, KeyError) as error:
        remedy = (
            "use a folder with config.json and the weights"
            if local
            else "without internet: model.name=local-dir:FOLDER, with the same files in it"
        )
        raise UserError(
            "model-unknown", key="model.name", what=f"{name}: {_line(error)}", remedy=remedy
        ) from error
    if not timm.is_model(found[1]):
        raise UserError(
            "model-unknown",
            key="model.name",
            what=f"{name}: config.json names {found[1]!r}, which timm {timm.__version__} does not have",
        )
    weights, architecture, options = found
    return weights, architecture, options


def hub_config(name: str) -> dict[str, Any] | None:
    """The content of config.json, from which a model of the hub or of a folder is built on another machine;
    None for timm's own."""
    if split(name)[0] is None:
        return None
    weights, architecture, options = _described(name)
    portable = {key: value for key, value in weights.items() if key not in ("file", "source", "hf_hub_id")}
    return {"architecture": architecture, "pretrained_cfg": portable, "model_args": options}


def _absolute(name: str) -> str:
    """A local-dir is relative to the project."""
    source, place = split(name)
    return f"{source}:{paths.path(place)}" if source == "local-dir" else name


# --- arguments of a model -----------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def model_kwargs(wanted: Request) -> dict[str, Any]:
    """Keyword arguments of create_model besides name and num_classes, for data.size and
    augment.progressive_sizes."""
    if not _takes_size(wanted):
        return wanted.base
    sized = _sized(wanted, wanted.size)
    try:
        _on_meta(wanted, sized)
    except BUILD_ERRORS as error:
        raise _no_such_size(wanted, wanted.size, "data.size", error) from error
    for more in FLEXIBLE if wanted.sizes else ():
        module = _flexible(wanted, sized, more)
        if module is not None and not any(
            forward_error(module, wanted.channels, size) for size in wanted.sizes
        ):
            return {**sized, **more}
    return sized  # `validate` reports the size that does not work


@lru_cache(maxsize=64)
def _takes_size(wanted: Request) -> bool:
    """Whether the model has the argument img_size: transformers do, most convolutional models do not."""
    default = pretrained_cfg(wanted.name).get("input_size", (3, wanted.size, wanted.size))[1]
    try:
        _on_meta(wanted, _sized(wanted, default))
    except BUILD_ERRORS as error:
        _validate_kwargs(wanted)
        if isinstance(error, TypeError) and "img_size" in str(error):
            return False
        raise
    return True


def _sized(wanted: Request, size: int) -> dict[str, Any]:
    return {**wanted.base, "img_size": (size, size)}


def _flexible(wanted: Request, sized: dict[str, Any], more: dict[str, Any]) -> nn.Module | None:
    try:
        return _on_meta(wanted, {**sized, **more})
    except TypeError:
        return None


def _on_meta(wanted: Request, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    with torch.device("meta"):
        module: nn.Module = timm.create_model(wanted.name, num_classes=wanted.outputs, **kwargs)
    return module


def _validate_kwargs(wanted: Request) -> None:
    """Raises for the first argument that the model does not accept, trying one after the other."""
    kwargs: dict[str, Any] = {"in_chans": wanted.channels}
    accepted = list(inspect.signature(type(_on_meta(wanted, kwargs)).__init__).parameters)[1:]
    for key, value in (*wanted.rates, *json.loads(wanted.options).items()):
        kwargs[key] = value
        try:
            _on_meta(wanted, kwargs)
        except TypeError as error:
            if key in RATES:
                raise UserError(
                    "knob-unsupported",
                    key=f"model.{key}",
                    what=f"{wanted.name} has no such argument",
                    remedy="set it to 0",
                ) from error
            if key in accepted:
                raise UserError(
                    "kwarg-invalid",
                    key=f"model.kwargs.{key}",
                    what=f"{wanted.name} does not accept {value!r}: {_line(error)}",
                ) from error
            close = nearest(key, [each for each in accepted if each not in OWN_KNOBS])
            raise UserError(
                "kwarg-unknown",
                key=f"model.kwargs.{key}",
                what=f"{wanted.name} has no such argument",
                remedy=f"the nearest is {close[0] if close else 'none'}",
            ) from error
        except BUILD_ERRORS as error:
            raise UserError(
                "kwarg-invalid",
                key=f"model.kwargs.{key}",
                what=f"{wanted.name} does not accept {value!r}: {_line(error)}",
            ) from error


# --- sizes of images ----------------------------------------------------------------------------------------


def validate(cfg: Config, on_output: Callable[[nn.Module, Tensor], object]) -> None:
    """A forward pass at every size, and one of a training batch, on the meta device. `on_output`(model,
    output) validates what comes after the backbone."""
    for key in cfg.model.kwargs:
        if key in OWN_KNOBS:
            raise UserError("kwarg-reserved", key=f"model.kwargs.{key}", what=f"is set by {OWN_KNOBS[key]}")
    validate_name(cfg)
    wanted = request(cfg)
    module = _with_stem(wanted)
    module.register_forward_hook(
        lambda module, _inputs, output: _validate_output(wanted, module, output, on_output)
    )
    for size, key in (
        (cfg.data.size, "data.size"),
        *((each, "augment.progressive_sizes") for each in wanted.sizes),
    ):
        if error := forward_error(module, wanted.channels, size):
            raise _no_such_size(wanted, size, key, error) from error
        _validate_batch(cfg, module, size)


def _validate_output(
    wanted: Request, module: nn.Module, output: Any, on_output: Callable[[nn.Module, Tensor], object]
) -> None:
    if wanted.outputs and tuple(output.shape[1:]) != (wanted.outputs,):
        raise UserError(
            "model-unsupported",
            key="model.name",
            what=f"{wanted.name} is no classifier: it outputs {tuple(output.shape[1:])} an image",
        )
    on_output(module, output)


def _with_stem(wanted: Request) -> nn.Module:
    module = _on_meta(wanted, model_kwargs(wanted))
    if wanted.stem == "small":
        with torch.device("meta"):
            small_stem.small(module, wanted.name)
    return module


def forward_error(module: nn.Module, channels: int, size: int) -> Exception | None:
    """The exception of a forward pass at this size; None if it works."""
    try:
        with torch.no_grad():
            module.eval()(torch.empty(1, channels, size, size, device="meta"))
    except NotImplementedError:
        return None  # an op that the meta device lacks: only a real forward pass shows it
    except BUILD_ERRORS as error:
        return error
    return None


def _validate_batch(cfg: Config, module: nn.Module, size: int) -> None:
    """Batch norm cannot train on a single value per channel, as one image with a 1 x 1 feature map gives."""
    count = min(cfg.train.batch_size, cfg.train.max_samples or cfg.train.batch_size)
    module.train()
    if cfg.model.freeze_norm:
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
    try:
        with torch.no_grad():
            module(torch.empty(count, cfg.data.channels, size, size, device="meta"))
    except NotImplementedError:
        return
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "batch-too-small",
            key="train.batch_size",
            what=f"{count} image of {size} px: batch norm of {cfg.model.name} gets one value per channel",
            remedy="set train.batch_size to 2 or more, or model.freeze_norm=true",
        ) from error


def _no_such_size(wanted: Request, size: int, key: str, error: Exception) -> UserError:
    """Names the nearest smaller and larger size that works."""
    later = key == "augment.progressive_sizes"
    works = _works_after_build(wanted) if later else _works_when_built(wanted)
    grid = {step * count for step in GRIDS for count in range(1, LARGEST // step + 1)} - {size}
    found: dict[bool, int] = {}  # larger -> size
    for each in sorted(grid, key=lambda other: abs(other - size))[:MAX_TRIED]:
        if (each > size) not in found and works(each):
            found[each > size] = each
    own = wanted.size if later else int(pretrained_cfg(wanted.name)["input_size"][1])
    if not found and not works(own):
        return UserError(
            "model-unsupported",
            key="model.name",
            what=f"{wanted.name} works neither at {size} px nor at its own {own} px: {_line(error)}",
        )
    sizes = [f"{each} px" for each in sorted(found.values()) or [own]]
    return UserError(
        "size-unsupported",
        key=key,
        what=f"{wanted.name} does not work at {size} px ({_line(error)})",
        remedy=f"the nearest that work: {' and '.join(sizes)}",
    )


def _works_when_built(wanted: Request) -> Callable[[int], bool]:
    """Whether a model that is built for a size works at it."""
    any_size = None if _takes_size(wanted) else _with_stem(wanted)

    def works(size: int) -> bool:
        try:
            module = any_size or _on_meta(wanted, _sized(wanted, size))
        except BUILD_ERRORS:
            return False
        return forward_error(module, wanted.channels, size) is None

    return works


def _works_after_build(wanted: Request) -> Callable[[int], bool]:
    """Whether a model that is built for data.size works at a size."""
    if not _takes_size(wanted):
        return _works_when_built(wanted)
    built = _sized(wanted, wanted.size)
    modules = [each for more in FLEXIBLE if (each := _flexible(wanted, built, more)) is not None]
    return lambda size: any(forward_error(module, wanted.channels, size) is None for module in modules)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- weights ------------------------------------------------------------------------------------------------


def pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's pretrained_cfg: how the weights of this name were trained."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    if split(name)[0] is not None:
        return PretrainedCfg(**_described(name)[0]).to_dict()
    found = get_pretrained_cfg(name)
    return {} if found is None else found.to_dict()


def describe(cfg: Config) -> str:
    """The input that the weights were trained for, and their license, in one line."""
    weights = pretrained_cfg(cfg.model.name)
    if not weights:
        return f"{cfg.model.name}: has no pretrained weights"
    size, patch = weights["input_size"][1], _patch(request(cfg))
    sizes = [f"{size} px"] + [f"{weights[k][1]} px to test" for k in ("test_input_size",) if weights.get(k)]
    tag = weights.get("tag") if "." not in cfg.model.name else None
    return (
        f"{cfg.model.name}{f' ({tag})' if tag else ''}: weights for {', '.join(sizes)}, "
        f"crop_pct {weights['crop_pct']:g}, "
        f"{weights['interpolation']}, license {weights.get('license') or 'unknown'}; "
        f"here {cfg.data.size} px, data.resize {cfg.data.resize}"
        + (
            f"; its patches of {patch} px cover {cfg.data.size // patch * patch} of them"
            if cfg.data.size % patch
            else ""
        )
    )


def _patch(wanted: Request) -> int:
    found = getattr(getattr(_with_stem(wanted), "patch_embed", None), "patch_size", 1)
    return int(found[0] if isinstance(found, tuple) else found)


def create_from_weights(cfg: Config, tensors: dict[str, Tensor], name: str) -> nn.Module:
    """The model with weights of other names or shapes: timm maps the names, resizes position embeddings and
    adapts the first convolution to data.channels. It has as many classes as the weights, so timm loads
    strictly: no tensor may be missing."""
    import timm

    wanted = request(cfg)
    classifier = pretrained_cfg(cfg.model.name).get("classifier") or ()
    last = [*([classifier] if isinstance(classifier, str) else classifier), *HEADS]
    classes = next((len(tensors[f"{each}.weight"]) for each in last if f"{each}.weight" in tensors), 0)
    for _ in range(2):
        overlay = {"state_dict": dict(tensors), "source": "", "num_classes": classes, "label_offset": 0}
        try:
            module = timm.create_model(
                wanted.name, True, pretrained_cfg_overlay=overlay, num_classes=classes, **model_kwargs(wanted)
            )
            break
        except (RuntimeError, KeyError, ValueError) as error:
            text = str(error)
            extra = set(re.findall(r'"([^"]+)"', text.partition("Unexpected key(s)")[2]))
            if "Missing key(s)" in text or "size mismatch" in text or not extra or not extra <= set(tensors):
                raise UserError(
                    "weights-differ",
                    where=name,
                    key="model.pretrained",
                    what=first_mismatch(text),
                    remedy="use weights of the same model.name",
                ) from error
            print(f"{name}: {len(extra)} of its tensors are not in {wanted.name}, like {min(extra)}")
            tensors = {key: value for key, value in tensors.items() if key not in extra}
    assert isinstance(module, nn.Module)
    return small_stem.small(module, wanted.name) if wanted.stem == "small" else module


def first_mismatch(text: str) -> str:
    """The first key or shape that an error of load_state_dict names."""
    if missing := re.search(r'Missing key\(s\)[^"]*"([^"]+)"', text):
        return f"{missing[1]} is not in it"
    shapes = r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
    if shape := re.search(shapes, text):
        return f"{shape[1]} is ({shape[2]}) in it and ({shape[3]}) here"
    return text.strip().splitlines()[0][:160]


# --- layers around a backbone -------------------------------------------------------------------------------


def inner(module: nn.Module) -> tuple[Any, str]:
    """The backbone inside the layers for several images, metadata and embeddings, and the prefix of its
    parameters' names."""
    prefix = ""
    while isinstance(inside := getattr(module, "backbone", None), nn.Module):
        module, prefix = inside, f"{prefix}backbone."
    return module, prefix
