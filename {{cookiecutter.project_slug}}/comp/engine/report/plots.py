"""Plots of a fold: confusion matrix, residuals, the worst rows, and grids of images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.store import artifacts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CLASSES = 30  # of more, those with the most errors are plotted
MAX_POINTS = 5000  # more are plotted as a density
TILE = 112  # px, of an image in a grid
SMALLEST = 1e-15

Array = NDArray[Any]


def confusion(truth: Array, predicted: Array, classes: Sequence[str], file: Path, title: str = "") -> None:
    """Confusion matrix of class codes, colored by the share of the true class, so that rare classes are
    visible."""
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (np.asarray(truth, np.int64), np.asarray(predicted, np.int64)), 1)
    right = np.trace(counts) / max(counts.sum(), 1)
    heading = f"{title}\n{right:.1%} of {counts.sum():,} correct".strip()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = list(classes)
    if len(names) > MAX_CLASSES:
        errors = counts - np.diag(np.diag(counts))
        shown = np.sort(np.argsort(-(errors.sum(0) + errors.sum(1)), kind="stable")[:MAX_CLASSES])
        heading += f"; {MAX_CLASSES} of {len(names)} classes, those with the most errors"
        counts, share, names = (
            counts[np.ix_(shown, shown)],
            share[np.ix_(shown, shown)],
            [names[i] for i in shown],
        )
    size = max(4.5, 0.42 * len(names) + 2)
    figure, axes = new_figure(size, size)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts):
        dark = share[i, j] > 0.5
        axes.text(
            j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )
    labels = [_label(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90 if max(map(len, labels)) * len(labels) > 40 else 0)
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(heading.replace("$", r"\$"), fontsize=10)
    save(figure, file)


def residuals(truth: Array, predicted: Array, file: Path, title: str = "") -> None:
    """Left: prediction over truth, with the diagonal. Right: histogram of the errors."""
    truth, predicted = np.asarray(truth, float).ravel(), np.asarray(predicted, float).ravel()
    error = predicted - truth
    figure, left = new_figure(10, 4.5, panels=2)
    right = figure.axes[1]
    if len(truth) > MAX_POINTS:
        left.hexbin(truth, predicted, gridsize=60, bins="log", cmap="Blues", mincnt=1)
    else:
        left.scatter(truth, predicted, s=12, alpha=0.5, linewidths=0)
    both = np.concatenate([truth, predicted]) if len(truth) else np.array([0.0, 1.0])
    ends = [both.min(), both.max()]
    left.plot(ends, ends, color="black", linewidth=1)
    left.set(xlabel="true", ylabel="predicted")
    right.hist(error, bins=min(60, max(10, len(error) // 20)))
    right.axvline(0, color="black", linewidth=1)
    right.set(xlabel="predicted - true", ylabel="rows")
    if len(error):
        figures = f"RMSE {np.sqrt((error**2).mean()):.4g}, mean error {error.mean():+.3g}, n {len(error):,}"
        figure.suptitle(f"{title}   {figures}".strip().replace("$", r"\$"), fontsize=10)
    save(figure, file)


def worst_rows(
    truth: Array, prediction: Array, ids: Sequence[str], classes: Sequence[str] = (), count: int = 16
) -> pd.DataFrame:
    """The rows with the largest errors, largest first: id, true, predicted, error, and `position` to find the
    image by.

    With classes: probabilities (rows,) or (rows, 1) for the second of two, else (rows, classes); truth as
    codes or as shares; the error is the log loss of the row. Without: values and absolute errors. Rows
    without prediction (NaN) are left out.
    """
    import pandas as pd

    truth, prediction = np.asarray(truth, float), np.asarray(prediction, float)
    flat = prediction.reshape(len(prediction), -1)  # (rows, outputs)
    if classes:
        shares = np.hstack([1 - flat, flat]) if flat.shape[1] == 1 else flat
        true = (
            truth
            if truth.ndim == 2 and truth.shape[1] == len(classes)
            else np.eye(len(classes))[truth.reshape(-1).astype(int)]
        )
        error = -(true * np.log(np.clip(shares, SMALLEST, 1))).sum(1)
        shown = [
            f"{classes[k]} ({row[k]:.3f})"
            for k, row in zip(np.nan_to_num(shares).argmax(1), shares, strict=True)
        ]
        true_text = [classes[k] for k in true.argmax(1)]
    else:
        wide = truth.reshape(len(truth), -1)
        error = np.abs(flat - wide).mean(1)
        shown, true_text = [_numbers(row) for row in flat], [_numbers(row) for row in wide]
    known = np.flatnonzero(np.isfinite(error))
    order = known[np.argsort(-error[known], kind="stable")][:count]
    columns = {"id": ids, "true": true_text, "predicted": shown}
    table: dict[str, Any] = {name: [str(values[i]) for i in order] for name, values in columns.items()}
    return pd.DataFrame({**table, "error": error[order], "position": order})


def _label(name: str) -> str:
    """Shortened in the middle, since either end may distinguish two classes. A dollar sign would start a
    formula."""
    return (name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}").replace("$", r"\$")


def _numbers(row: Array) -> str:
    return ", ".join(f"{value:.5g}" for value in row)


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Axes]:
    """Without pyplot, which looks for a window system and keeps every figure in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels)
    return figure, figure.axes[0]


def save(figure: Figure, file: Path) -> None:
    with artifacts.atomic(file) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name in letters that the font lacks: boxes are good enough
        figure.savefig(temporary, format="png", dpi=100)


def image_grid(
    tiles: Sequence[tuple[Array, str]], file: Path, columns: int = 8, title: str = "", pairs: bool = False
) -> None:
    """Thumbnails with captions, row by row; with `pairs` every second gap is wide. Any number of channels."""
    from PIL import Image, ImageDraw

    gap, line = 6, 16
    left = [gap + i * (TILE + gap) + (i // 2 * 3 * gap if pairs else 0) for i in range(columns)]
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (left[-1] + TILE + gap, line + gap + rows * (TILE + line + gap)), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((gap, 2), title, "black")
    for number, (image, caption) in enumerate(tiles):
        x, y = left[number % columns], line + gap + number // columns * (TILE + line + gap)
        grid.paste(Image.fromarray(to_rgb(image)).resize((TILE, TILE)), (x, y))
        pen.text((x, y + TILE + 2), _caption(caption), "black")
    with artifacts.atomic(file) as temporary:
        grid.save(temporary, "PNG")


def to_rgb(image: Array) -> Array:
    """(height, width, 3): the first three channels as RGB; of one or two channels the first as gray."""
    return np.ascontiguousarray(image[:, :, :3] if image.shape[2] >= 3 else image[:, :, [0, 0, 0]])


def _caption(caption: str, most: int = 18) -> str:
    """In the letters that the built-in font has, and as short as an image is wide."""
    plain = caption.encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= most else plain[: most - 1] + "~"
