"""For comp tta: out-of-fold predictions of every candidate view, and what a view costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from comp.engine import hardware
from comp.engine.bank import bank, predictions
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import experiments
from comp.engine.run import fingerprint, loading
from comp.engine.store import artifacts, locks, paths

if TYPE_CHECKING:
    from comp.engine.run.context import Context

PLAIN = "identity"
RECIPE_DRAWS = 3  # random draws of the run's augmentation recipe, each of them a view
SPEED = "speed.json"  # next to a fold's predictions: seconds per image
# A view whose time is within 30 % of the plain view's costs as much: both are one forward pass, the rest is
# measurement noise.
SAME_COST = 0.3


class Candidates(NamedTuple):
    context: Context
    sets: dict[str, PredictionSet]  # view -> OOF predictions of all rows
    ms: dict[str, float]  # view -> milliseconds per image and checkpoint


def predict_candidates(run: str, names: str | None) -> Candidates:
    """One pass over all OOF rows per view. Predictions are stored fold by fold, so a killed call continues
    where it was."""
    cfg = experiments.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    seeds = experiments.complete_seeds(run, experiments.fold_count(cfg))
    if not seeds:
        raise experiments.missing_predictions(run, "OOF predictions to compare views on")
    fingerprint.validate_images(run, cfg)
    context = loading.load_context(cfg)
    from comp.engine.run import views

    candidates = candidate_views(cfg.augment.recipe, cfg.predict.tta, names)
    views.views(candidates)  # an unknown name is an error before the first pass
    sets, ms = {}, {}
    with locks.lock(paths.run_folder(run) / "members", f"trying views of {run}"):
        for name in candidates:
            sets[name], ms[name] = _predict_view(context, run, seeds, name)
    plain = ms[PLAIN]
    ms = {name: plain if abs(own - plain) < SAME_COST * plain else own for name, own in ms.items()}
    return Candidates(context, sets, ms)


def candidate_views(recipe: str, tta: Sequence[str], names: str | None) -> list[str]:
    """The plain view first, then those of `names` (separated by commas); default: flips, zooms, crops, draws
    of the run's recipe, and the views that the run predicts with."""
    from comp.engine.run.views import CROPS, VIEWS

    if names is not None:
        return list(dict.fromkeys([PLAIN, *(name.strip() for name in names.split(","))]))
    draws = [f"{recipe}{draw if draw > 1 else ''}" for draw in range(1, RECIPE_DRAWS + 1)]
    return list(dict.fromkeys([*VIEWS, *CROPS, *(draws if recipe != "none" else []), *tta]))


def _predict_view(context: Context, run: str, seeds: list[int], name: str) -> tuple[PredictionSet, float]:
    """OOF predictions of one view, and its milliseconds per image."""
    from comp import predict

    cfg, rows, split = context.cfg, context.samples, context.folds
    own = cfg.model_copy(update={"predict": cfg.predict.model_copy(update={"tta": [name]})})
    parts, seconds = [], []
    for seed in seeds:
        for fold in range(split.count):
            file = predict.predict_fold(replace(context, cfg=own), run, seed, fold, "oof", f"view-{name}")
            parts.append(bank.read(file, rows, split))
            speed = file.with_name(SPEED)
            seconds.append(artifacts.read_json(speed)["oof"] if speed.exists() else np.nan)
    return predictions.merge(parts, rows, split, cfg.predict.averaging_space), 1000 * float(
        np.nanmedian(seconds)
    )
