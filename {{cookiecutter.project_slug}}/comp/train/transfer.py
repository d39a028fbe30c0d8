"""Weights to begin with: a file, or another run's of the same fold and seed, which never saw the rows that this fold is scored on.

model.pretrained: weights/backbone.safetensors | run:exp001
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from comp import store
from comp.config import Config, Refused, nearest
from comp.folds import Folds

if TYPE_CHECKING:
    from torch import Tensor, nn

RUN = "run:"
PICKLED = (
    b"PK",
    *(bytes((0x80, protocol)) for protocol in range(2, 6)),
)  # torch.save: a zip, or the bare stream
MEASURED = ("pixel_mean", "pixel_std", "white_middle", "white")  # of each fold: normal.py


def run_of(cfg: Config) -> str:
    """The run that weights are taken from; empty for none."""
    said = cfg.model.pretrained
    return said.removeprefix(RUN) if isinstance(said, str) and said.startswith(RUN) else ""


def check(cfg: Config, folds: Folds) -> None:
    """Before anything is spent: is there such a file or run, and does it share the folds?"""
    said = cfg.model.pretrained
    if run := run_of(cfg):
        _of_same_folds(run, folds)
    elif isinstance(said, str):
        if not store.path(said).is_file():
            raise Refused(
                f"model.pretrained: {said}: no such file; true, false, a .safetensors file or run:exp001 is wanted"
            )
        refuse_foreign(store.path(said), "model.pretrained")


def refuse_foreign(file: Path, key: str) -> None:
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
        f"{key}: {store.shown(file)}: is not a safetensors file ({reason or 'empty'}); of a checkpoint that you trust make one: "
        f'python -c "import sys, torch; from safetensors.torch import save_file; '
        f'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" FROM.pth TO.safetensors'
    )


def _of_same_folds(run: str, folds: Folds) -> None:
    """A run on other folds has seen rows that this one is scored on."""
    made = store.run_folder(run) / "made_of.json"
    if not store.sealed(made):
        runs = [p.name for p in sorted(store.path("runs").glob("*")) if (p / "made_of.json").exists()]
        close = f"the nearest are {', '.join(nearest(run, runs, 3))}" if runs else "there are no runs yet"
        raise Refused(f"model.pretrained: run:{run}: no such run; {close}")
    if store.read_json(store.verified(made))["folds"] != folds.hash:
        raise Refused(
            f"model.pretrained: runs/{run} was trained on other folds, so it has seen rows that this run is scored on"
        )


def begin(module: nn.Module, cfg: Config, seed: int, fold: int | str) -> None:
    """Load what fits by name and shape; only the head may differ, and what it lacks is said."""
    said = cfg.model.pretrained
    if not isinstance(said, str):
        return
    from safetensors.torch import load_file

    file = store.path(said)
    if run := run_of(cfg):
        file = store.fold_folder(run, seed, fold) / "weights.safetensors"
        if not store.sealed(file):
            raise Refused(
                f"model.pretrained: runs/{run} has no seed {seed} fold {fold}, and weights of another fold have seen the rows that "
                f"this one is scored on; train it first: comp train {run} --seed {seed} --fold {fold}"
            )
        store.verified(file)
    new = fill(module, load_file(file), store.shown(file))
    print(f"begins with {store.shown(file)}; new: {', '.join(new) or 'nothing'}")


def fill(module: nn.Module, given: dict[str, Tensor], name: str) -> list[str]:
    """Names that kept their first values, all of the head."""
    own = module.state_dict()
    if not set(given) & set(
        own
    ):  # one of the two is wrapped, for several images of a sample or metadata beside them
        wrapped = {f"backbone.{k}": v for k, v in given.items()}
        given = (
            wrapped if set(wrapped) & set(own) else {k.removeprefix("backbone."): v for k, v in given.items()}
        )
    fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape and k not in MEASURED}
    new = [k for k in own if k not in fits and k not in MEASURED]
    if strange := [k for k in new if not is_head(module, k)]:
        k = strange[0]
        what = (
            f"is {tuple(given[k].shape)} there, {tuple(own[k].shape)} here" if k in given else "is not in it"
        )
        more = f", and {len(strange) - 1} more do not fit" if len(strange) > 1 else ""
        raise Refused(
            f"model.pretrained: {name}: {k} {what}{more}; it wants the same model.name, model.stem and data.channels"
        )
    module.load_state_dict(fits, strict=False)
    return new


def is_head(module: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the last layers: ours around a backbone, or what timm calls the classifier."""
    if hasattr(module, "backbone"):
        return not name.startswith("backbone.")
    said = getattr(module, "pretrained_cfg", {}).get("classifier", ())
    names = [said] if isinstance(said, str) else list(said)
    names = names or [child for child, _ in module.named_children()][-1:]
    return name.startswith(tuple(f"{each}." for each in [*names, "global_pool"]))
