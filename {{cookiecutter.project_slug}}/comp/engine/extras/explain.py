"""comp explain: where in an image a prediction comes from. Grad-CAM and SmoothGrad of the worst or of chosen
rows, each by the weights of its own fold, which were not trained on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from comp.engine import hardware
from comp.engine.bank import bank, predictions
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import experiments, resolve
from comp.engine.errors import UserError
from comp.engine.extras import saliency
from comp.engine.report import plots
from comp.engine.run import loading
from comp.engine.run.context import Context
from comp.engine.store import artifacts, paths

SIDE, GAP, TITLE = 192, 8, 34  # px


def explain(run: str, ids: list[str], count: int) -> Path:
    """Write explain.png of a run: for `ids`, or for the `count` worst predictions."""
    cfg = experiments.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    context = loading.load_context(cfg)
    rows, captions = _rows_to_explain(context, run, ids, count)
    sheet = Image.new("RGB", (GAP + 3 * (SIDE + GAP), TITLE + len(rows) * (SIDE + TITLE)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{run}: image, Grad-CAM, SmoothGrad", "black")
    fold_of_row = context.folds.assignment[0]
    networks: dict[int, nn.Module] = {}
    bar = tqdm(
        list(zip(rows, captions, strict=True)),
        desc="explaining",
        unit="row",
        leave=False,
        delay=2,
        disable=None if cfg.machine.progress else True,
    )
    for line, (row, caption) in enumerate(bar):
        fold = int(fold_of_row[row])
        if fold not in networks:
            networks[fold] = saliency.load_network(context, _weights(run, fold))
        image, cam, smooth = saliency.maps(context, networks[fold], int(row))
        top = TITLE + line * (SIDE + TITLE)
        pen.multiline_text((GAP, top - 4), caption, "black", spacing=1)
        for column, panel in enumerate((_rgb(image), _overlay(image, cam), _heatmap(smooth))):
            sheet.paste(panel.resize((SIDE, SIDE)), (GAP + column * (SIDE + GAP), top + TITLE - GAP))
    file = paths.run_folder(run) / "explain.png"
    with artifacts.atomic(file) as temporary:
        sheet.save(temporary, "png")
    print(
        f"written: {paths.relative(file)}, {len(rows)} rows, each by the weights of its own fold\nnext: "
        "comp audit"
    )
    return file


def _rows_to_explain(
    context: Context, run: str, ids: list[str], count: int
) -> tuple[NDArray[np.int64], list[str]]:
    """Rows with their captions: those of `ids`, or the worst ones."""
    head = context.samples.heads[0]
    file = paths.run_folder(run) / "oof.arrow"
    if artifacts.manifest_entry(file):
        oof = bank.read(file, context.samples, context.folds)
    else:
        oof = _finished_folds(context, run)
    rows = oof.row.astype(np.int64)[oof.predicted]
    probability = oof.probability(head)[oof.predicted]
    truth = context.samples.truth(head, rows)
    names = context.samples.frame["id"].to_numpy()[rows].tolist()
    classes = head.classes if head.spec.space == "logit" and head.task != "multilabel" else ()
    table = plots.worst_rows(truth, probability, names, classes, len(rows) if ids else count)
    if ids:
        unknown = [name for name in ids if name not in set(names)]
        if unknown:
            raise UserError(
                "id-unknown",
                where=f"--ids {unknown[0]}",
                what=f"{run} has no out-of-fold prediction of it",
                remedy=f"did you mean {resolve.nearest(unknown[0], names)[0]}?",
            )
        table = table.set_index("id").loc[ids].reset_index()
    captions = [
        f"{row.id}: {row.true}\npredicted {row.predicted}, error {row.error:.3f}"
        for row in table.itertuples()
    ]
    return rows[table["position"].to_numpy()], captions


def _finished_folds(context: Context, run: str) -> PredictionSet:
    """Of an unfinished run, the predictions of its finished folds."""
    parts = sorted(paths.run_folder(run).glob("seed*/fold[0-9]*/oof.arrow"))
    if not parts:
        raise experiments.missing_predictions(run, "predictions to explain")
    missing = experiments.missing_predictions(run, "predictions of all rows")
    print(f"{missing}; only rows of finished folds are explained")
    sets = [bank.read(file, context.samples, context.folds) for file in parts]
    return predictions.merge(sets, context.samples, context.folds, context.cfg.predict.averaging_space)


def _weights(run: str, fold: int) -> Path:
    files = sorted(paths.run_folder(run).glob(f"seed*/fold{fold}/weights.safetensors"))
    if not files:
        raise UserError(
            "weights-missing",
            where=run,
            what=f"the weights of fold {fold} are gone",
            remedy=f"comp train {run} --fresh",
        )
    return files[0]


def _rgb(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(plots.to_rgb(image))


def _heatmap(values: NDArray[np.float32]) -> Image.Image:
    from matplotlib import colormaps

    return Image.fromarray((255 * colormaps["inferno"](values)[:, :, :3]).astype(np.uint8))


def _overlay(image: NDArray[np.uint8], cam: NDArray[np.float32]) -> Image.Image:
    return Image.blend(_rgb(image), _heatmap(cam), 0.55)
