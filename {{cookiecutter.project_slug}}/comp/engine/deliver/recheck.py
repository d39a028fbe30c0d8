"""Before a submission is sent: predict a few stored rows again from the stored checkpoints and compare.
Detects wrong weights, changed images, and another preprocessing or library version, on eight rows and in
seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware
from comp.engine.bank import bank
from comp.engine.config import experiments, run_members
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.run import loading
from comp.engine.store import paths

if TYPE_CHECKING:
    from comp.engine.run.context import Context

T = TypeVar("T")
ROWS, CHECKPOINTS = 8, 10  # of a checkpoint, of a submission
WEIGHTS = "weights.safetensors"


class Checkpoint(NamedTuple):
    run: str
    seed: int
    fold: int | str  # 3, or 3/snap2 for weights of their own below the fold


Rows = NDArray[np.integer]
# checkpoint -> (positions in the samples table, their predictions as probabilities or values, (rows,
# outputs))
Stored = Mapping[Checkpoint, tuple[Rows, NDArray[np.floating]]]


def recheck(name: str) -> None:
    """A member with other TTA views is compared under those views; a blend, through its member runs under
    their own."""
    table = samples.load()
    split = folds.load(table)
    meta = bank.load(name, "test", table, split).meta
    member = run_members.cv_member(name.partition(":")[2])
    subfolder = member if member.startswith("tta-") else ""
    available = [c for c in map(_checkpoint, meta["weights"]) if (paths.fold_folder(*c) / WEIGHTS).exists()]
    stored = {}
    for checkpoint in chosen(name, available, CHECKPOINTS):
        part = bank.read(paths.fold_folder(*checkpoint) / subfolder / "test.arrow", table, split)
        stored[checkpoint] = part.row, np.hstack([part.probability(head) for head in table.heads])

    @cache
    def context(run: str) -> Context:
        cfg = experiments.stored_config(run)
        if subfolder:
            views = {"tta": meta["tta"], "averaging_space": meta["space"]}
            cfg = cfg.model_copy(update={"predict": cfg.predict.model_copy(update=views)})
        # Eight images are not worth a cache of all of them: decoded on the fly they have the same pixels.
        machine = {"num_workers": 0, "gpu_cache_mb": 0}
        cfg = cfg.model_copy(
            update={
                "data": cfg.data.model_copy(update={"cache": False}),
                "machine": cfg.machine.model_copy(update=machine),
            }
        )
        hardware.set_threads(cfg.train.threads)
        return loading.load_context(cfg)

    def repredict(checkpoint: Checkpoint, rows: Rows) -> NDArray[np.floating]:
        from comp import predict  # imports torch, so only after every name has been validated

        weights = paths.fold_folder(*checkpoint) / WEIGHTS
        again, _ = predict.predict(context(checkpoint.run), weights, rows.astype(np.int64))
        return np.hstack([h.spec.to_probability(again[h.name].astype(np.float64)) for h in table.heads])

    ids = table.frame["id"].tolist()
    print(compare(name, stored, repredict, lambda checkpoint: tolerance([checkpoint.run]), ids))
    if missing := len(meta["weights"]) - len(available):
        print(f"{missing} of its checkpoints are not on this machine and were not compared")


def tolerance(runs: Sequence[str]) -> float:
    """The largest difference that counts as equal: half precision is less reproducible than fp32."""
    return 1e-5 if all(experiments.stored_config(run).train.amp == "fp32" for run in runs) else 1e-3


def compare(
    name: str,
    stored: Stored,
    repredict: Callable[[Checkpoint, Rows], NDArray[np.floating]],
    tolerance: Callable[[Checkpoint], float],
    ids: Sequence[str],
) -> str:
    """Predict a few rows again and return the line to print. Rows and checkpoints are pseudo-random, seeded
    by the name.

    Compared are probabilities or values, (rows, outputs): logits may differ much and mean the same.
    Differences of values above 1 are relative.
    """
    if not stored:
        raise UserError(
            "checkpoint-missing",
            where=name,
            what="none of its checkpoints is on this machine, so its predictions cannot be compared",
            remedy="copy its weights back into runs/, or train it again",
        )
    worst, compared = 0.0, 0
    checkpoints = chosen(name, list(stored), CHECKPOINTS)
    for checkpoint in checkpoints:
        rows, values = stored[checkpoint]
        allowed = tolerance(checkpoint)
        places = chosen(name, list(range(len(rows))), ROWS, [ids[row] for row in rows])
        before = np.asarray(values, np.float64)[places]
        again = np.asarray(repredict(checkpoint, rows[places]), np.float64)
        assert again.shape == before.shape, (again.shape, before.shape)
        difference = _difference(before, again)
        if (difference > allowed).any():
            row, output = np.unravel_index(difference.argmax(), difference.shape)
            raise UserError(
                "predictions-differ",
                where=f"{checkpoint.run}, seed {checkpoint.seed}, fold {checkpoint.fold}",
                key=f"row {ids[rows[places[row]]]!r}",
                what=f"the stored prediction is {before[row, output]:.9g}, its checkpoint now predicts "
                f"{again[row, output]:.9g} (tolerance {allowed:g})",
                remedy="restore the weights, images and library versions of that time, or train it again",
            )
        compared = max(compared, len(places))
        worst = max(worst, float(difference.max(initial=0.0)))
    return (
        f"predicted {compared} rows again with {len(checkpoints)} of {len(stored)} checkpoints: "
        f"largest difference {worst:.1e}"
    )


def compare_file(name: str, file: Path, tolerance: float) -> float:
    """The largest difference of predictions.npz of a rehearsal from the stored predictions, measured as in
    compare()."""
    table = samples.load()
    stored = bank.load(name, "test", table, folds.load(table))
    predicted = np.load(file)
    place = {row: i for i, row in enumerate(table.frame["row"].to_numpy()[stored.row])}
    at = [place[row] for row in predicted["ids"].tolist()]
    worst = 0.0
    for head in table.heads:
        before = stored.probability(head)[at]
        after = head.spec.to_probability(predicted[f"head.{head.name}"].astype(np.float64))
        worst = max(worst, float(_difference(before, after).max(initial=0.0)))
    if worst > tolerance:
        raise UserError(
            "predictions-differ",
            where=name,
            what=f"the bundle's predictions differ from the stored ones by up to {worst:.1e} "
            f"(tolerance {tolerance:g})",
            remedy="weights, images or a package version are not those that they were stored with",
        )
    return worst


def _difference(before: NDArray[np.floating], after: NDArray[np.floating]) -> NDArray[np.floating]:
    """Relative for values above 1; infinite for NaN."""
    difference = np.abs(after - before) / np.maximum(1.0, np.abs(before))
    return np.where(np.isnan(difference), np.inf, difference)


def chosen(name: str, items: list[T], count: int, keys: Sequence[object] | None = None) -> list[T]:
    """`count` of the items, pseudo-random and the same for the same name, in their own order."""
    order = sorted(
        range(len(items)), key=lambda i: hashlib.sha256(f"{name}\0{(keys or items)[i]}".encode()).digest()
    )
    return [items[i] for i in sorted(order[:count])]


def _checkpoint(weights: str) -> Checkpoint:
    """exp001/seed0/fold3, or exp001/seed0/fold3/snap2, as the metadata of predictions names weights."""
    run, seed, fold = weights.split("/", 2)
    return Checkpoint(run, int(seed.removeprefix("seed")), fold.removeprefix("fold"))
