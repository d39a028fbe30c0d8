"""timm's networks by name, for pictures of any size: `hf-hub:owner/name` and `local-dir:folder` too.

What a network takes is found out on the meta device, where weights cost neither memory nor time: whether it wants to know the
size of its pictures (img_size), whether a forward pass at that size works, and which sizes near it do. So what cannot be built
is refused before a picture is decoded.
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
from comp.engine.errors import Refused
from comp.engine.run import small_stem
from comp.engine.store import paths

RATES = ("drop_rate", "drop_path_rate")
# What create_model and the knobs beside model.kwargs already say.
TAKEN = {
    "model_name": "model.name", "pretrained": "model.pretrained", "checkpoint_path": "model.pretrained", "num_classes": "the targets",
    "in_chans": "data.channels", "img_size": "data.size", "global_pool": "model.global_pool", "drop_rate": "model.drop_rate",
    "drop_path_rate": "model.drop_path_rate", "features_only": "nothing: a classifier is wanted", "pretrained_cfg": "model.pretrained",
    "pretrained_cfg_overlay": "model.pretrained", "cache_dir": "HF_HUB_CACHE", "device": "machine.device", "dtype": "train.amp",
}  # fmt: skip
# How timm's families are told that pictures of other sizes than img_size will come; the first that works is taken.
FLEXIBLE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
FAULTS = (AssertionError, RuntimeError, ValueError, TypeError, IndexError, KeyError, ZeroDivisionError)
GRIDS = (8, 14)  # px; sizes that are tried in place of one that does not work are multiples of one of these
TRIED = 24  # sizes, at most; each costs a network on the meta device, 0.1 to 0.5 s
LARGEST = 4096  # px, of data.size
HEADS = ("head", "fc", "classifier", "head.fc")  # names of the last layer in files that are not timm's own


class Request(NamedTuple):
    """Everything that decides how a network is made, but for its outputs."""

    name: str
    size: int
    sizes: tuple[int, ...]
    channels: int
    rates: tuple[tuple[str, float], ...]
    options: str  # JSON
    stem: str
    unpooled: bool  # ends in a map of features

    @property
    def base(self) -> dict[str, Any]:
        pool = {"global_pool": ""} if self.unpooled else {}
        return {"in_chans": self.channels, **pool, **dict(self.rates), **json.loads(self.options)}

    @property
    def outputs(self) -> int:
        """On the meta device, where how many there are changes nothing: without pooling there is no last layer."""
        return 0 if self.unpooled else 2


def request(cfg: Config) -> Request:
    return Request(
        name=_at_home(cfg.model.name),
        size=cfg.data.size,
        sizes=tuple(cfg.augment.progressive_sizes or ()),
        channels=cfg.data.channels,
        rates=tuple((key, rate) for key in RATES if (rate := getattr(cfg.model, key))),
        options=json.dumps(cfg.model.kwargs, sort_keys=True),
        stem=cfg.model.stem,
        unpooled=cfg.model.global_pool == "gem",
    )


def create(cfg: Config, outputs: int, pretrained: bool = False) -> nn.Module:
    """`outputs` 0: without its last layer. With model.global_pool: gem it ends in a map of features."""
    import timm

    validate_name(cfg)
    wanted = request(cfg)
    try:
        module = timm.create_model(wanted.name, pretrained, num_classes=outputs, **model_kwargs(wanted))
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"model.pretrained: the weights of {wanted.name} could not be had ({reason}); without internet set model.pretrained=false"
        ) from error
    assert isinstance(module, nn.Module)
    return small_stem.small(module, wanted.name) if wanted.stem == "small" else module


def validate_name(cfg: Config) -> None:
    """Whether timm, the hub or the folder has a network of this name."""
    import timm

    name = cfg.model.name
    if split(name)[0] is not None:
        _described(name)
        return
    if not timm.is_model(name):
        close = nearest(name, timm.list_models(), 3)
        raise Refused(f"model.name: timm has no {name!r}; the nearest are {', '.join(close)}")
    base, _, tag = name.partition(".")
    if tag and name not in (tags := timm.list_pretrained(f"{base}.*")):
        there = f"the nearest is {nearest(name, tags)[0]}" if tags else "it has none"
        raise Refused(f"model.name: {base} has no weights {tag!r}; {there}")


def split(name: str) -> tuple[str | None, str]:
    """hf-hub or local-dir, and where; or None and timm's name."""
    from timm.models import parse_model_name

    try:
        source, place = parse_model_name(name)
    except ValueError as error:
        raise Refused(f"model.name: {error}") from None
    return source, place


@lru_cache(maxsize=64)
def _described(name: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What config.json of a hub's repository or of a folder says: the weights, timm's name of the network, its arguments."""
    import timm
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    source, place = split(name)
    local = source == "local-dir"
    try:
        found = load_model_config_from_path(paths.path(place)) if local else load_model_config_from_hf(place)
    except (OSError, ValueError, KeyError) as error:
        cure = (
            "a folder with config.json and the weights is wanted"
            if local
            else "without internet: a folder of the same files, as model.name=local-dir:FOLDER"
        )
        raise Refused(f"model.name: {name}: {_line(error)}; {cure}") from error
    if not timm.is_model(found[1]):
        raise Refused(
            f"model.name: {name}: config.json names {found[1]!r}, which timm {timm.__version__} lacks"
        )
    weights, architecture, options = found
    return weights, architecture, options


def hub_config(name: str) -> dict[str, Any] | None:
    """What config.json has to say, so that a network of the hub or of a folder can be made where neither is; None for timm's."""
    if split(name)[0] is None:
        return None
    weights, architecture, options = _described(name)
    here = {key: value for key, value in weights.items() if key not in ("file", "source", "hf_hub_id")}
    return {"architecture": architecture, "pretrained_cfg": here, "model_args": options}


def _at_home(name: str) -> str:
    """Folders lie in the project."""
    source, place = split(name)
    return f"{source}:{paths.path(place)}" if source == "local-dir" else name


# --- what a network takes ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def model_kwargs(wanted: Request) -> dict[str, Any]:
    """Those of create_model, beside name and outputs. Also for the sizes of augment.progressive_sizes."""
    if not _takes_size(wanted):
        return wanted.base
    sized = _sized(wanted, wanted.size)
    try:
        _on_meta(wanted, sized)
    except FAULTS as error:
        raise _no_such_size(wanted, wanted.size, "data.size", error) from error
    for more in FLEXIBLE if wanted.sizes else ():
        module = _flexible(wanted, sized, more)
        if module is not None and not any(
            forward_error(module, wanted.channels, size) for size in wanted.sizes
        ):
            return {**sized, **more}
    return sized  # `check` says which size does not work


@lru_cache(maxsize=64)
def _takes_size(wanted: Request) -> bool:
    """Whether the network is built for one size of picture: transformers are, most convolutional ones are not."""
    own = pretrained_cfg(wanted.name).get("input_size", (3, wanted.size, wanted.size))[1]
    try:
        _on_meta(wanted, _sized(wanted, own))
    except FAULTS as error:
        _refuse_options(wanted)
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


def _on_meta(wanted: Request, made: dict[str, Any]) -> nn.Module:
    import timm

    with torch.device("meta"):
        module: nn.Module = timm.create_model(wanted.name, num_classes=wanted.outputs, **made)
    return module


def _refuse_options(wanted: Request) -> None:
    """Which of the knobs beside the name a network does not take: one after the other."""
    made: dict[str, Any] = {"in_chans": wanted.channels}
    takes = list(inspect.signature(type(_on_meta(wanted, made)).__init__).parameters)[1:]
    for key, value in (*wanted.rates, *json.loads(wanted.options).items()):
        made[key] = value
        try:
            _on_meta(wanted, made)
        except TypeError as error:
            if key in RATES:
                raise Refused(f"model.{key}: {wanted.name} does not know it; set it to 0") from error
            if key in takes:
                raise Refused(
                    f"model.kwargs.{key}: {wanted.name} does not take {value!r}: {_line(error)}"
                ) from error
            close = nearest(key, [each for each in takes if each not in TAKEN])
            raise Refused(
                f"model.kwargs.{key}: {wanted.name} takes no such argument; the nearest is {close[0] if close else 'none'}"
            ) from error
        except FAULTS as error:
            raise Refused(
                f"model.kwargs.{key}: {wanted.name} does not take {value!r}: {_line(error)}"
            ) from error


# --- what sizes it takes -------------------------------------------------------------------------------------------------


def validate(cfg: Config, asks: Callable[[nn.Module, Tensor], object]) -> None:
    """A forward pass of every size, and one of a training batch, on the meta device. `asks` looks at network and output for what
    stands behind it."""
    for key in cfg.model.kwargs:
        if key in TAKEN:
            raise Refused(f"model.kwargs.{key}: is said by {TAKEN[key]}")
    validate_name(cfg)
    wanted = request(cfg)
    module = _whole(wanted)
    module.register_forward_hook(lambda module, _given, output: _answered(wanted, module, output, asks))
    for size, key in (
        (cfg.data.size, "data.size"),
        *((each, "augment.progressive_sizes") for each in wanted.sizes),
    ):
        if error := forward_error(module, wanted.channels, size):
            raise _no_such_size(wanted, size, key, error) from error
        _refuse_batch(cfg, module, size)


def _answered(
    wanted: Request, module: nn.Module, output: Any, asks: Callable[[nn.Module, Tensor], object]
) -> None:
    if wanted.outputs and tuple(output.shape[1:]) != (wanted.outputs,):
        raise Refused(
            f"model.name: {wanted.name} ends in {tuple(output.shape[1:])} numbers a picture and not in one a class: it is no classifier"
        )
    asks(module, output)


def _whole(wanted: Request) -> nn.Module:
    module = _on_meta(wanted, model_kwargs(wanted))
    if wanted.stem == "small":
        with torch.device("meta"):
            small_stem.small(module, wanted.name)
    return module


def forward_error(module: nn.Module, channels: int, size: int) -> Exception | None:
    """Why a picture of this size does not go through the network; None where it does."""
    try:
        with torch.no_grad():
            module.eval()(torch.empty(1, channels, size, size, device="meta"))
    except NotImplementedError:
        return None  # an op that the meta device lacks: only a real forward pass can tell
    except FAULTS as error:
        return error
    return None


def _refuse_batch(cfg: Config, module: nn.Module, size: int) -> None:
    """Batch norm has nothing to normalise over, where one picture is one number a channel."""
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
        raise Refused(
            f"train.batch_size: {count} picture of {size} px leaves batch norm of {cfg.model.name} a single value a channel, which it "
            "cannot normalise; set train.batch_size to 2 or more, or model.freeze_norm=true"
        ) from error


def _no_such_size(wanted: Request, size: int, key: str, error: Exception) -> Refused:
    """With the nearest sizes that work, smaller and larger."""
    works = _works_beside(wanted) if key == "augment.progressive_sizes" else _works_alone(wanted)
    grid = {step * count for step in GRIDS for count in range(1, LARGEST // step + 1)} - {size}
    found: dict[bool, int] = {}
    for each in sorted(grid, key=lambda other: abs(other - size))[:TRIED]:
        if (each > size) not in found and works(each):
            found[each > size] = each
    own = (
        wanted.size
        if key == "augment.progressive_sizes"
        else int(pretrained_cfg(wanted.name)["input_size"][1])
    )
    if not found and not works(own):
        return Refused(
            f"model.name: {wanted.name} takes no pictures, of {size} px or of its own {own} px: {_line(error)}"
        )
    sizes = [f"{each} px" for each in sorted(found.values()) or [own]]
    return Refused(
        f"{key}: {wanted.name} takes no pictures of {size} px ({_line(error)}); the nearest that it takes: {' and '.join(sizes)}"
    )


def _works_alone(wanted: Request) -> Callable[[int], bool]:
    """Through a network that is built for the size."""
    any_size = None if _takes_size(wanted) else _whole(wanted)

    def works(size: int) -> bool:
        try:
            module = any_size or _on_meta(wanted, _sized(wanted, size))
        except FAULTS:
            return False
        return forward_error(module, wanted.channels, size) is None

    return works


def _works_beside(wanted: Request) -> Callable[[int], bool]:
    """Through a network that was built for data.size."""
    if not _takes_size(wanted):
        return _works_alone(wanted)
    built = _sized(wanted, wanted.size)
    modules = [each for more in FLEXIBLE if (each := _flexible(wanted, built, more)) is not None]
    return lambda size: any(forward_error(module, wanted.channels, size) is None for module in modules)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- weights -------------------------------------------------------------------------------------------------------------


def pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's pretrained_cfg: what the weights of this name were trained on and how."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    if split(name)[0] is not None:
        return PretrainedCfg(**_described(name)[0]).to_dict()
    found = get_pretrained_cfg(name)
    return {} if found is None else found.to_dict()


def describe(cfg: Config) -> str:
    """What the weights want to see, and under which licence they are, in one line."""
    made = pretrained_cfg(cfg.model.name)
    if not made:
        return f"{cfg.model.name}: has no pretrained weights"
    size, patch = made["input_size"][1], _patch(request(cfg))
    seen = [f"{size} px"] + [f"{made[k][1]} px to test" for k in ("test_input_size",) if made.get(k)]
    what = f"{cfg.model.name}{f' ({tag})' if (tag := made.get('tag')) and '.' not in cfg.model.name else ''}"
    return (
        f"{what}: weights for {', '.join(seen)}, crop_pct {made['crop_pct']:g}, {made['interpolation']}, "
        f"licence {made.get('license') or 'not said'}; here {cfg.data.size} px, data.resize {cfg.data.resize}"
        + (
            f"; its patches of {patch} px cover {cfg.data.size // patch * patch} of them"
            if cfg.data.size % patch
            else ""
        )
    )


def _patch(wanted: Request) -> int:
    found = getattr(getattr(_whole(wanted), "patch_embed", None), "patch_size", 1)
    return int(found[0] if isinstance(found, tuple) else found)


def create_from_weights(cfg: Config, given: dict[str, Tensor], name: str) -> nn.Module:
    """The network with weights that are not named or shaped like its own: timm maps their names, resizes position embeddings and
    adapts the first convolution to data.channels. As many classes as the weights have. Everything must be in them: timm loads
    strictly where the classes are the same."""
    import timm

    wanted = request(cfg)
    made = pretrained_cfg(cfg.model.name)
    said = made.get("classifier") or ()
    last = [*([said] if isinstance(said, str) else said), *HEADS]
    classes = next((len(given[f"{each}.weight"]) for each in last if f"{each}.weight" in given), 0)
    for _ in range(2):
        overlay = {"state_dict": dict(given), "source": "", "num_classes": classes, "label_offset": 0}
        try:
            module = timm.create_model(
                wanted.name, True, pretrained_cfg_overlay=overlay, num_classes=classes, **model_kwargs(wanted)
            )
            break
        except (RuntimeError, KeyError, ValueError) as error:
            text = str(error)
            extra = set(re.findall(r'"([^"]+)"', text.partition("Unexpected key(s)")[2]))
            if "Missing key(s)" in text or "size mismatch" in text or not extra or not extra <= set(given):
                raise Refused(
                    f"model.pretrained: {name}: {_misfit(text)}; it wants the same model.name"
                ) from error
            print(f"{name}: {len(extra)} of its tensors have no place in {wanted.name}, like {min(extra)}")
            given = {key: value for key, value in given.items() if key not in extra}
    assert isinstance(module, nn.Module)
    return small_stem.small(module, wanted.name) if wanted.stem == "small" else module


def _misfit(text: str) -> str:
    """The first tensor of what load_state_dict complains of."""
    if missing := re.search(r'Missing key\(s\)[^"]*"([^"]+)"', text):
        return f"{missing[1]} is not in it"
    shapes = r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
    if shape := re.search(shapes, text):
        return f"{shape[1]} is ({shape[2]}) there, ({shape[3]}) here"
    return text.strip().splitlines()[0][:160]


# --- what stands around it -----------------------------------------------------------------------------------------------


def inner(module: nn.Module) -> tuple[Any, str]:
    """The network inside what joins images, metadata and embeddings around it, and what its names begin with there."""
    prefix = ""
    while isinstance(inside := getattr(module, "backbone", None), nn.Module):
        module, prefix = inside, f"{prefix}backbone."
    return module, prefix
