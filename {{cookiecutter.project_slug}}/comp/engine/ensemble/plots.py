"""comp ensemble NAME --plots: correlation of the members, the gain of each, their weights, and nested against
in-sample score by the number of members. PNG files in ensembles/NAME/plots, logged to W&B, and together in
ensembles/NAME/report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank.predictions import PredictionSet, merge
from comp.engine.ensemble import blend, blend_config, fit, members, report
from comp.engine.ensemble.blend_config import BlendConfig
from comp.engine.ensemble.context import Setup, load_setup
from comp.engine.report import html, plots
from comp.engine.run import tracking
from comp.engine.store import artifacts, paths

MOST = 40  # members whose names fit into a plot
COUNTS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)  # of members, in the plot of the optimism
NAMES = ("correlation", "waterfall", "weights", "optimism")


def blend_and_draw(name: str) -> None:
    """comp ensemble NAME --plots"""
    blend.blend(name)
    draw(name)


def draw(name: str) -> list[Path]:
    """Of an existing ensemble. Fits it again for several numbers of members, so it costs a few times the
    ensemble itself."""
    config, setup = blend_config.read(name), load_setup()
    folder = paths.ensemble_folder(name)
    record = artifacts.read_json(artifacts.verified(folder / "score.json", f"comp ensemble {name}"))
    oof, test = (members.predictions(config, kind, setup) for kind in ("oof", "test"))
    sign = 1 if record["direction"] == "max" else -1
    scores = [m["oof"] if m["oof"] is not None else -sign * np.inf for m in record["members"]]
    order = [int(i) for i in np.argsort([-sign * s for s in scores], kind="stable")]  # best member first
    files = {plot: folder / "plots" / f"{plot}.png" for plot in NAMES}
    names = [config.blend.members[i] for i in order]
    correlation([oof[i] for i in order], names, setup, files["correlation"])
    by_weight = [i for i in order if record["members"][i]["weight"] != 0]
    if record["members"][0]["weight"] is not None:
        by_weight.sort(key=lambda i: -abs(record["members"][i]["weight"]))
    waterfall(setup, config, record, by_weight, oof, files["waterfall"])
    weights(record, order, files["weights"])
    optimism(setup, config, order, oof, test, record, files["optimism"])
    log_to_wandb(name, setup, files, record)
    page = html.write(
        folder / "report.html",
        name,
        report.summary_lines(name, record),
        report.table_header(record),
        report.table_lines(name, record),
        list(files.values()),
    )
    print(f"written: {paths.relative(page)}, with the plots of {paths.relative(folder / 'plots')}")
    return list(files.values())


def correlation(sets: Sequence[PredictionSet], names: Sequence[str], setup: Setup, file: Path) -> None:
    """Members sorted by score. A low correlation between good members is where a blend gains most."""
    sets, names = sets[:MOST], list(names)[:MOST]
    predicted = sets[0].predicted
    heads = setup.samples.heads
    flat = np.stack([np.concatenate([s.probability(h)[predicted].ravel() for h in heads]) for s in sets])
    with np.errstate(invalid="ignore", divide="ignore"):
        table = np.nan_to_num(np.atleast_2d(np.corrcoef(flat)))
    size = max(4.0, 0.35 * len(names) + 2)
    figure, axes = plots.new_figure(size, size)
    drawn = axes.imshow(table, cmap="viridis", vmin=float(table.min()), vmax=1)
    if len(names) <= 15:
        for i, j in np.ndindex(*table.shape):
            axes.text(
                j,
                i,
                f"{table[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if table[i, j] < 0.9 else "black",
            )
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title("correlation of OOF predictions, best member first", fontsize=10)
    figure.colorbar(drawn)
    plots.save(figure, file)


def waterfall(
    setup: Setup, config: BlendConfig, record: Any, order: list[int], oof: Sequence[PredictionSet], file: Path
) -> None:
    """The score of the first member, then of the first two with their weights, and so on."""
    order, scores = order[:MOST], []
    space = {"rank": "probability"}.get(config.blend.merge_space, config.blend.merge_space)
    for count in range(1, len(order) + 1):
        used = order[:count]
        shares: list[float] | None = [record["members"][i]["weight"] for i in used]
        if shares is None or None in shares or abs(sum(shares)) < 1e-9:
            shares = None
        merged = merge([oof[i] for i in used], setup.samples, setup.folds, space, shares)
        scores.append(report.oof_score(setup, merged) or np.nan)
    figure, axes = plots.new_figure(max(5.0, 0.4 * len(order) + 3), 4.5)
    sign = 1 if record["direction"] == "max" else -1
    before = [scores[0], *scores[:-1]]
    colors = [
        "tab:green" if sign * (now - was) >= 0 else "tab:red" for was, now in zip(before, scores, strict=True)
    ]
    axes.bar(range(len(order)), np.subtract(scores, before), bottom=before, color=colors)
    axes.plot(range(len(order)), scores, color="black", marker="o", markersize=3, linewidth=0.8)
    axes.set_xticks(range(len(order)), [config.blend.members[i] for i in order], rotation=90)
    axes.set(ylabel=f"{record['metric']} with this member and all before it")
    axes.set_title("gain of each member (in-sample)", fontsize=10)
    plots.save(figure, file)


def weights(record: Any, order: list[int], file: Path) -> None:
    shown = [record["members"][i] for i in order][:MOST]
    figure, axes = plots.new_figure(6, max(2.5, 0.3 * len(shown) + 1.2))
    values = [m["weight"] if m["weight"] is not None else 0.0 for m in shown]
    axes.barh(range(len(shown)), values, color="tab:blue")
    axes.set_yticks(range(len(shown)), [m["address"] for m in shown])
    axes.invert_yaxis()
    none = record["members"][0]["weight"] is None
    axes.set_title(
        "no weights: a stacker weighs outputs, not members" if none else "weights, best member first",
        fontsize=10,
    )
    plots.save(figure, file)


def optimism(
    setup: Setup,
    config: BlendConfig,
    order: list[int],
    oof: Sequence[PredictionSet],
    test: Sequence[PredictionSet],
    record: Any,
    file: Path,
) -> None:
    """Nested and in-sample score of the best member, the best two, and so on."""
    from tqdm import tqdm

    counts = sorted({min(n, len(order)) for n in COUNTS if n <= len(order)} | {len(order)})
    lines: dict[str, list[float]] = {"nested": [], "in-sample": []}
    recipes, refits = members.recipes(config), members.refits(config, setup)
    for count in tqdm(counts, desc="number of members", delay=2, disable=None, leave=False):
        used = order[:count]
        change: dict[str, Any] = {"members": [config.blend.members[i] for i in used]}
        if config.blend.weights is not None:
            change["weights"] = [config.blend.weights[i] for i in used]
        subset = config.blend.model_copy(update=change)
        fitted = fit.fit_ensemble(
            setup, subset, [oof[i] for i in used], [test[i] for i in used], recipes, refits
        )
        lines["nested"].append(_score(setup, oof[0], fitted.nested))
        lines["in-sample"].append(_score(setup, oof[0], fitted.in_sample or fitted.nested))
    figure, axes = plots.new_figure(6, 4.5)
    for label, values in lines.items():
        axes.plot(counts, values, marker="o", label=label)
    axes.legend()
    axes.set(xlabel="number of members, best first", ylabel=record["metric"])
    axes.set_title("optimism: in-sample minus nested score", fontsize=10)
    plots.save(figure, file)


def _score(setup: Setup, like: PredictionSet, heads: dict[str, NDArray[Any]]) -> float:
    predictions = PredictionSet(like.row, like.fold, heads, like.meta)
    oof = report.oof_score(setup, predictions)
    return np.nan if oof is None else oof


def log_to_wandb(name: str, setup: Setup, files: dict[str, Path], record: Any) -> None:
    """As a run of job type `ensemble`."""
    config = {
        "competition": {"slug": setup.cfg.competition.slug},
        "method": record["method"],
        "members": [member["address"] for member in record["members"]],
    }
    run = tracking.open_log(
        paths.ensemble_folder(name) / "plots",
        run_id=f"ensemble-{name}",
        name=name,
        group=name,
        job_type="ensemble",
        config=config,
        settings=setup.cfg.track,
    )
    with run as log:
        for label, file in files.items():
            log.image(label, file)
        log.summary({key: record[key] for key in ("oof", "in_sample", "metric")})
