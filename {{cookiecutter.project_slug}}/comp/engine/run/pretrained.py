"""Weights to start from: a file, or those of another run, of the same fold and seed, which did not see the
validation rows of the fold.

model.pretrained: weights/backbone.safetensors | weights/theirs.pth | run:exp001
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from comp.engine import pages
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    from torch import Tensor, nn

RUN = "run:"
# First bytes of what torch.save writes: a zip, or the bare stream.
PICKLED = (b"PK", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
FOLD_STATISTICS = (  # buffers of each fold's own: pixel_stats.py, target_scaler.py
    "pixel_mean", "pixel_std", "white_middle", "white", "target_mean", "target_std",
)  # fmt: skip


def source_run(cfg: Config) -> str:
    """The run whose weights are loaded; empty for none."""
    value = cfg.model.pretrained
    return value.removeprefix(RUN) if isinstance(value, str) and value.startswith(RUN) else ""


def weights_file(cfg: Config) -> Path | None:
    """The file whose weights are loaded; None for a run."""
    value = cfg.model.pretrained
    return paths.path(value) if isinstance(value, str) and not source_run(cfg) else None


def validate(cfg: Config, folds: Folds) -> None:
    """Raises unless the file or run exists and the run has the same folds."""
    if run := source_run(cfg):
        _validate_folds(run, folds)
    elif file := weights_file(cfg):
        if not file.is_file():
            raise UserError(
                "file-missing",
                key="model.pretrained",
                what=f"{cfg.model.pretrained}: no such file",
                remedy="use true, false, a file of weights (.safetensors, .pth, .pt, .bin) or run:exp001",
            )
        if file.suffix == ".safetensors":
            validate_safetensors(file, "model.pretrained")


def validate_safetensors(file: Path, key: str) -> None:
    """Raises unless the file is safetensors, whatever its name: its header is parsed, and every length in it
    compared to the size of the file. Nothing in it is executed, and torch is not imported."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            return
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")
    with file.open("rb") as opened:
        start = opened.read(2)
    if start in PICKLED:
        reason = "pickled, as torch.save writes, which can run code when it is loaded"
    raise UserError(
        "file-unsupported",
        where=paths.relative(file),
        key=key,
        what=f"is not a safetensors file ({reason or 'empty'})",
        remedy="convert a checkpoint that you trust: "
        'python -c "import sys, torch; from safetensors.torch import save_file; '
        'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" FROM.pth TO.safetensors',
    )


def _validate_folds(run: str, folds: Folds) -> None:
    """A run on other folds was trained on validation rows of this one."""
    made = paths.run_folder(run) / "inputs.json"
    if not artifacts.manifest_entry(made):
        runs = [p.name for p in sorted(paths.path("runs").glob("*")) if (p / "inputs.json").exists()]
        remedy = f"the nearest are {', '.join(nearest(run, runs, 3))}" if runs else "there are no runs yet"
        raise UserError(
            "run-unknown",
            key="model.pretrained",
            what=f"run:{run}: no such run",
            remedy=remedy,
        )
    if artifacts.read_json(artifacts.verified(made))["folds"] != folds.hash:
        raise UserError(
            "folds-differ",
            key="model.pretrained",
            what=f"runs/{run} was trained on other folds, so on validation rows of this run",
        )


def load_pretrained(module: nn.Module, cfg: Config, seed: int, fold: int | str) -> None:
    """Loads the weights into the model, and prints the parameters that they do not have; only the head may
    differ."""
    if not isinstance(cfg.model.pretrained, str):
        return
    file = weights_file(cfg)
    if run := source_run(cfg):
        file = paths.fold_folder(run, seed, fold) / "weights.safetensors"
        if not artifacts.manifest_entry(file):
            raise UserError(
                "run-incomplete",
                key="model.pretrained",
                what=(
                    f"runs/{run} has no seed {seed} fold {fold}, and weights of another fold were trained on "
                    "validation rows of this one"
                ),
                remedy=f"train it first: comp train {run} --seed {seed} --fold {fold}",
            )
        artifacts.verified(file)
    assert file is not None
    fits = matching_weights(module, cfg, file)
    module.load_state_dict(fits, strict=False)
    new = [name for name in module.state_dict() if name not in fits and name not in FOLD_STATISTICS]
    print(f"starts from {paths.relative(file)}; not in it: {', '.join(new) or 'nothing'}")


def matching_weights(module: nn.Module, cfg: Config, file: Path) -> dict[str, Tensor]:
    """The tensors of a file that fit into the model, by their names in it. Three cases, in this order:

    1. Names and shapes are those of the model, as from a run of this project or from timm: unchanged.
    2. Others, as of another size, of other channels, or with the authors' names: timm's loader converts them.
    3. What does not fit then raises.
    """
    import torch

    from comp.engine.run import backbone

    tensors = read(file)
    if mismatches(module, tensors) and pages.get("model") is None:
        with torch.random.fork_rng():
            tensors = backbone.create_from_weights(
                cfg, _backbone_tensors(tensors), paths.relative(file)
            ).state_dict()
    return matching_tensors(module, tensors, paths.relative(file))


def read(file: Path) -> dict[str, Tensor]:
    """Tensors by name; objects of a pickled file are never built. Of a checkpoint the averaged weights, if it
    has any."""
    import torch
    from timm.models import load_state_dict

    try:
        loaded = load_state_dict(str(file), weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            "file-damaged",
            where=paths.relative(file),
            key="model.pretrained",
            what=f"cannot be read as weights ({reason})",
            remedy="write tensors by name: torch.save(module.state_dict(), FILE)",
        ) from error
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(
            "file-unsupported",
            where=paths.relative(file),
            key="model.pretrained",
            what="has no tensors by name",
            remedy="write them with torch.save(module.state_dict(), FILE)",
        )
    return tensors


def _backbone_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the backbone, by timm's names, if the weights come from a model of this project."""
    inside = {k: v for k, v in tensors.items() if k.startswith("backbone.")}
    bare = {_stripped(k): v for k, v in (inside or tensors).items() if k not in FOLD_STATISTICS}
    return {k: v for k, v in bare.items() if k != "p"}  # the exponent of GeM pooling


def _stripped(name: str) -> str:
    while name.startswith("backbone."):
        name = name.removeprefix("backbone.")
    return name


def _renamed(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the model: in one of the two the backbone may be wrapped, for several images a sample
    or for metadata."""
    from comp.engine.run.backbone import inner

    own, prefix = module.state_dict(), inner(module)[1]
    named = {k if k in own else prefix + _stripped(k): v for k, v in tensors.items()}
    return {k: v for k, v in named.items() if k not in FOLD_STATISTICS}


def mismatches(module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Parameters below the head that are missing, or of another shape."""
    renamed = _renamed(module, tensors)
    return [
        k
        for k, v in module.state_dict().items()
        if k not in FOLD_STATISTICS
        and not is_head(module, k)
        and (k not in renamed or renamed[k].shape != v.shape)
    ]


def matching_tensors(module: nn.Module, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those that fit by name and shape. Only the head may be missing."""
    own, renamed = module.state_dict(), _renamed(module, tensors)
    if wrong := mismatches(module, tensors):
        k = wrong[0]
        what = (
            f"is {tuple(renamed[k].shape)} in it and {tuple(own[k].shape)} here"
            if k in renamed
            else "is not in it"
        )
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(
            "weights-differ",
            where=name,
            key="model.pretrained",
            what=f"{k} {what}{more}",
            remedy="use weights of the same model.name, model.stem and data.channels",
        )
    return {k: v for k, v in renamed.items() if k in own and own[k].shape == v.shape}


def is_head(module: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the layers around the backbone, or to timm's classifier."""
    from comp.engine.run.backbone import inner

    _, prefix = inner(module)
    if prefix:
        return not name.startswith(prefix)
    classifier = getattr(module, "pretrained_cfg", {}).get("classifier", ())
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    names = names or [child for child, _ in module.named_children()][-1:]
    return name.startswith(tuple(f"{each}." for each in [*names, "global_pool"]))
