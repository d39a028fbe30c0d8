"""Weights to begin with: a file, or another run's of the same fold and seed, which never saw the rows that this fold is scored on.

model.pretrained: weights/backbone.safetensors | weights/theirs.pth | run:exp001
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from comp.engine import pages
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    from torch import Tensor, nn

RUN = "run:"
PICKLED = (
    b"PK",
    *(bytes((0x80, protocol)) for protocol in range(2, 6)),
)  # torch.save: a zip, or the bare stream
MEASURED = (  # of each fold: normal.py, target_scaler.py
    "pixel_mean", "pixel_std", "white_middle", "white", "target_mean", "target_std",
)  # fmt: skip


def source_run(cfg: Config) -> str:
    """The run that weights are taken from; empty for none."""
    said = cfg.model.pretrained
    return said.removeprefix(RUN) if isinstance(said, str) and said.startswith(RUN) else ""


def weights_file(cfg: Config) -> Path | None:
    """The file that weights are taken from."""
    said = cfg.model.pretrained
    return paths.path(said) if isinstance(said, str) and not source_run(cfg) else None


def validate(cfg: Config, folds: Folds) -> None:
    """Before anything is spent: is there such a file or run, and does it share the folds?"""
    if run := source_run(cfg):
        _of_same_folds(run, folds)
    elif file := weights_file(cfg):
        if not file.is_file():
            raise Refused(
                f"model.pretrained: {cfg.model.pretrained}: no such file; true, false, a file of weights (.safetensors, .pth, .pt, "
                ".bin) or run:exp001 is wanted"
            )
        if file.suffix == ".safetensors":
            validate_safetensors(file, "model.pretrained")


def validate_safetensors(file: Path, key: str) -> None:
    """Not a safetensors file, whatever its name: the header is parsed and every length in it held against the file's size.
    Nothing of it is executed, and torch is not imported."""
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
    raise Refused(
        f"{key}: {paths.relative(file)}: is not a safetensors file ({reason or 'empty'}); of a checkpoint that you trust make one: "
        f'python -c "import sys, torch; from safetensors.torch import save_file; '
        f'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" FROM.pth TO.safetensors'
    )


def _of_same_folds(run: str, folds: Folds) -> None:
    """A run on other folds has seen rows that this one is scored on."""
    made = paths.run_folder(run) / "made_of.json"
    if not artifacts.manifest_entry(made):
        runs = [p.name for p in sorted(paths.path("runs").glob("*")) if (p / "made_of.json").exists()]
        close = f"the nearest are {', '.join(nearest(run, runs, 3))}" if runs else "there are no runs yet"
        raise Refused(f"model.pretrained: run:{run}: no such run; {close}")
    if artifacts.read_json(artifacts.verified(made))["folds"] != folds.hash:
        raise Refused(
            f"model.pretrained: runs/{run} was trained on other folds, so it has seen rows that this run is scored on"
        )


def begin(module: nn.Module, cfg: Config, seed: int, fold: int | str) -> None:
    """Load what `fitting` finds; only the head may differ, and what it lacks is said."""
    if not isinstance(cfg.model.pretrained, str):
        return
    file = weights_file(cfg)
    if run := source_run(cfg):
        file = paths.fold_folder(run, seed, fold) / "weights.safetensors"
        if not artifacts.manifest_entry(file):
            raise Refused(
                f"model.pretrained: runs/{run} has no seed {seed} fold {fold}, and weights of another fold have seen the rows that "
                f"this one is scored on; train it first: comp train {run} --seed {seed} --fold {fold}"
            )
        artifacts.verified(file)
    assert file is not None
    fits = matching_weights(module, cfg, file)
    module.load_state_dict(fits, strict=False)
    new = [name for name in module.state_dict() if name not in fits and name not in MEASURED]
    print(f"begins with {paths.relative(file)}; new: {', '.join(new) or 'nothing'}")


def matching_weights(module: nn.Module, cfg: Config, file: Path) -> dict[str, Tensor]:
    """What of a file goes into the network, by the names that it has there. Three cases, in this order:

    1. names and shapes are those of this network: a run of this project, or timm's own at the same size. As they are.
    2. Others, like another size, other channels, or names of the authors: timm's loader makes them fit.
    3. What then does not fit is refused.
    """
    import torch

    from comp.engine.run import backbone

    given = read(file)
    if mismatches(module, given) and pages.get("model") is None:
        with torch.random.fork_rng():
            given = backbone.create_from_weights(cfg, _bare(given), paths.relative(file)).state_dict()
    return matching_tensors(module, given, paths.relative(file))


def read(file: Path) -> dict[str, Tensor]:
    """Tensors by name; objects that a pickled file may hold are not built. Of a checkpoint its averaged weights, where it has them."""
    import torch
    from timm.models import load_state_dict

    try:
        found = load_state_dict(str(file), weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise Refused(
            f"model.pretrained: {paths.relative(file)}: cannot be read as weights ({reason}); tensors by name are wanted, as "
            "torch.save(module.state_dict(), FILE) writes them"
        ) from error
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise Refused(
            f"model.pretrained: {paths.relative(file)}: holds no tensors by name, like torch.save(module.state_dict(), FILE)"
        )
    return tensors


def _bare(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the network inside, of weights that come from one of this project's."""
    inside = {k: v for k, v in given.items() if k.startswith("backbone.")}
    bare = {_stripped(k): v for k, v in (inside or given).items() if k not in MEASURED}
    return {k: v for k, v in bare.items() if k != "p"}  # of gem


def _stripped(name: str) -> str:
    while name.startswith("backbone."):
        name = name.removeprefix("backbone.")
    return name


def _here(module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of this network: one of the two may be wrapped, for several images of a sample or metadata beside them."""
    from comp.engine.run.backbone import inner

    own, prefix = module.state_dict(), inner(module)[1]
    named = {k if k in own else prefix + _stripped(k): v for k, v in given.items()}
    return {k: v for k, v in named.items() if k not in MEASURED}


def mismatches(module: nn.Module, given: dict[str, Tensor]) -> list[str]:
    """Tensors below the head that are not there, or of another shape."""
    there = _here(module, given)
    return [
        k
        for k, v in module.state_dict().items()
        if k not in MEASURED and not is_head(module, k) and (k not in there or there[k].shape != v.shape)
    ]


def matching_tensors(module: nn.Module, given: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What fits by name and shape; all but the head has to."""
    own, there = module.state_dict(), _here(module, given)
    if strange := mismatches(module, given):
        k = strange[0]
        what = (
            f"is {tuple(there[k].shape)} there, {tuple(own[k].shape)} here" if k in there else "is not in it"
        )
        more = f", and {len(strange) - 1} more do not fit" if len(strange) > 1 else ""
        raise Refused(
            f"model.pretrained: {name}: {k} {what}{more}; it wants the same model.name, model.stem and data.channels"
        )
    return {k: v for k, v in there.items() if k in own and own[k].shape == v.shape}


def is_head(module: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the last layers: ours around a backbone, or what timm calls the classifier."""
    from comp.engine.run.backbone import inner

    _, prefix = inner(module)
    if prefix:
        return not name.startswith(prefix)
    said = getattr(module, "pretrained_cfg", {}).get("classifier", ())
    names = [said] if isinstance(said, str) else list(said or ())
    names = names or [child for child, _ in module.named_children()][-1:]
    return name.startswith(tuple(f"{each}." for each in [*names, "global_pool"]))
