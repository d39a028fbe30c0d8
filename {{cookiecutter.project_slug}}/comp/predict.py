"""Predictions of one trained fold: its own validation rows (OOF) and the test rows, over the views of the config."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from comp import models, transforms
from comp.engine.bank import bank, predictions
from comp.engine.config import resolve, run_members
from comp.engine.data import class_balance
from comp.engine.data.samples import Positions
from comp.engine.errors import Refused
from comp.engine.hardware import Stop, Stopped
from comp.engine.run import frozen_heads, knn, metric_learning, normalize
from comp.engine.run import views as tta
from comp.engine.run.context import Context
from comp.engine.run.evaluate import forward_rows
from comp.engine.store import artifacts, paths
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head

Stored = dict[str, NDArray[np.float32]]  # head -> (rows, outputs), in the space that is stored


def write_fold(
    context: Context,
    run: str,
    seed: int,
    number: int | str,
    kind: str,
    inside: str = "",
    *,
    stop: Stop | None = None,
) -> Path:
    """runs/<run>/seed<s>/fold<k>/{oof,test}.arrow, unless it is there already. `inside` is a folder for other views, or for a
    member with weights of its own."""
    cfg, folder = context.cfg, paths.fold_folder(run, seed, number)
    file = folder / inside / f"{kind}.arrow"
    own = inside if inside in run_members.extra_weights(cfg) else ""
    weights = folder / own / bank.WEIGHTS
    if artifacts.manifest_entry(file):
        return file
    rows = context.samples.positions("test") if kind == "test" else context.folds.split(number)[1]
    rows = rows[: cfg.train.max_samples]
    began = time.perf_counter()
    if loss_knobs.metric_learning_loss(cfg, context.samples.heads):
        _gallery(context, weights, context.folds.split(number)[0], stop)
    heads, damaged = predict(
        context, weights, rows, f"{kind} of seed {seed} fold {number} {inside}".rstrip(), stop=stop
    )
    if len(
        rows
    ):  # what a ceiling on inference time is held against; a clock, so outside of manifest and hashes
        speed = file.with_name("speed.json")
        noted = artifacts.read_json(speed) if speed.exists() else {}
        artifacts.write_json(speed, noted | {kind: (time.perf_counter() - began) / len(rows)})
    if damaged:
        _tell(context, damaged, file.with_name(f"{kind}_damaged.txt"))
    facts: dict[str, Any] = {
        "run": run,
        "seed": seed,
        "config": artifacts.digest(resolve.result_knobs(cfg)),
        "weights": bank.weights_of(weights.parent),
        "marks": run_members.marks(cfg, own),
    }
    facts |= {"tta": cfg.predict.tta, "space": cfg.predict.averaging_space, "damaged": len(damaged)}
    fold = np.full(len(rows), int(number), np.int16) if kind == "oof" else None
    meta = predictions.build_meta(kind, context.samples, context.folds, facts)
    return bank.write(file, predictions.PredictionSet(rows.astype(np.int32), fold, heads, meta))


def predict(
    context: Context,
    weights: Path,
    rows: Positions,
    doing: str = "",
    fallback: Callable[[Head], NDArray[Any]] | None = None,
    *,
    stop: Stop | None = None,
) -> tuple[Stored, dict[int, str]]:
    """`fallback`: what a damaged picture gets where there are no training labels to take their mean."""
    cfg, heads = context.cfg, context.samples.heads
    if frozen_heads.is_head(weights):
        answers, damaged = frozen_heads.predict_rows(context, weights, rows)
        return _stored(context, rows, answers, damaged, fallback), damaged
    raw, damaged = _said(context, weights, rows, doing, stop)
    if embeds := loss_knobs.metric_learning_loss(cfg, heads):
        answers = _by_neighbours(context, weights, raw, embeds.knobs["embedding"])
    else:
        each = [models.decode(cfg, heads, view) for view in raw]  # views x heads
        answers = [
            predictions.average([view[i] for view in each], head, cfg.predict.averaging_space)
            for i, head in enumerate(heads)
        ]
    return _stored(context, rows, answers, damaged, fallback), damaged


def _stored(
    context: Context,
    rows: Positions,
    answers: list[NDArray[np.float64]],
    damaged: dict[int, str],
    fallback: Callable[[Head], NDArray[Any]] | None,
) -> Stored:
    stored = {}
    for head, value in zip(context.samples.heads, answers, strict=True):
        value[np.isin(rows, list(damaged))] = (
            fallback(head) if fallback else predictions.prior(head, context.samples, context.folds)
        )
        stored[head.name] = value.astype(np.float32)
    return stored


def _said(
    context: Context, weights: Path, rows: Positions, doing: str, stop: Stop | None = None
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """(views, rows, network outputs), and for each row whose picture is damaged the reason."""
    cfg, heads = context.cfg, context.samples.heads
    module = models.load_weights(
        models.build(cfg, heads, pretrained=False, loader=context.loader), weights
    ).to(context.device)
    seen = transforms.Preprocess(normalize.build(cfg, module, context.device))
    views = tta.views(cfg.predict.tta)
    with tqdm(
        total=len(rows), desc=doing, unit="image", leave=False, disable=None if cfg.machine.progress else True
    ) as bar:

        def told(count: int) -> None:
            bar.update(count)
            if (
                stop is not None and stop.requested
            ):  # its weights are sealed, so a later start begins with the predictions
                raise Stopped(f"{doing or 'predictions'}: {bar.n} of {len(rows)} images")

        raw, damaged = forward_rows(
            module,
            context.loader,
            rows,
            cfg.predict.batch_size,
            seen,
            cfg.train.amp,
            views,
            on_batch=told,
        )
    if not np.isfinite(raw).all():
        raise Refused(
            f"{paths.relative(weights)}: the network answers NaN or inf; it was trained with too high a rate"
        )
    return raw, damaged


def _gallery(context: Context, weights: Path, taught: Positions, stop: Stop | None) -> None:
    """The training rows of a fold as this fold's network sees them; made once, like the weights it belongs to."""
    file, cfg = knn.gallery_file(weights), context.cfg
    if artifacts.manifest_entry(file):
        return
    (head,) = context.samples.heads
    rows = metric_learning.drop_unknown_class(cfg, context.samples, taught[: cfg.train.max_samples])
    raw, damaged = _said(context, weights, rows, "gallery", stop)
    whole = ~np.isin(rows, list(damaged))
    seen = knn.mean_embedding(raw[:, whole], loss_knobs.head_losses(cfg, [head])[0].knobs["embedding"])
    knn.write(file, seen, class_balance.class_codes(head, context.samples, rows[whole]))


def _by_neighbours(
    context: Context, weights: Path, raw: NDArray[np.float32], size: int
) -> list[NDArray[np.float64]]:
    (head,) = context.samples.heads
    k = context.cfg.predict.n_neighbors or loss_knobs.N_NEIGHBORS
    asked = knn.mean_embedding(raw, size)
    return [knn.class_scores(asked, *knn.read(knn.gallery_file(weights)), head, k, context.device)]


def _tell(context: Context, damaged: dict[int, str], file: Path) -> None:
    ids = context.samples.frame["id"]
    lines = [f"{ids.iloc[i]}\t{reason}" for i, reason in damaged.items()]
    artifacts.write_text(file, "\n".join(lines) + "\n")
    print(
        f"{len(lines)} damaged pictures got the mean of the labels as their prediction; {paths.relative(file)} lists them"
    )
