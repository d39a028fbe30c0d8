"""comp ensemble NAME --plots: how alike members are, what each adds, their weights, and how far honest and in-sample part as
members grow in number. As PNG in ensembles/NAME/pictures, in W&B, and together in ensembles/NAME/report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import bank, score
from comp.engine.bank.predictions import PredictionSet, merge
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble import blend, blend_config, fit
from comp.engine.ensemble.blend_config import BlendConfig
from comp.engine.report import html, plots
from comp.engine.run import tracking
from comp.engine.store import artifacts, paths

MOST = 40  # members that a picture can name
STEPS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
NAMES = ("correlation", "waterfall", "weights", "honest")


def blend_and_draw(name: str) -> None:
    """comp ensemble NAME --plots"""
    blend.blend(name)
    draw(name)


def draw(name: str) -> list[Path]:
    """After the ensemble is made. Refits it for some numbers of members, so it costs a few times the ensemble itself."""
    declared = blend_config.read(name)
    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    record = artifacts.read_json(
        artifacts.verified(bank.folder(name) / "score.json", f"comp ensemble {name}")
    )
    oof, test = (blend.member_predictions(declared, kind, rows, split) for kind in bank.KINDS)
    sign = 1 if record["direction"] == "max" else -1
    scores = [m["oof"] if m["oof"] is not None else -sign * np.inf for m in record["members"]]
    order = [int(i) for i in np.argsort([-sign * s for s in scores], kind="stable")]
    files = {each: bank.folder(name) / "pictures" / f"{each}.png" for each in NAMES}
    correlation(
        [oof[i] for i in order], [declared.blend.members[i] for i in order], rows, files["correlation"]
    )
    heavy = [i for i in order if record["members"][i]["weight"] != 0]
    if record["members"][0]["weight"] is not None:
        heavy.sort(key=lambda i: -abs(record["members"][i]["weight"]))
    waterfall(cfg, rows, split, declared, record, heavy, oof, files["waterfall"])
    weights(record, order, files["weights"])
    optimism_curve(cfg, rows, split, declared, order, oof, test, record, files["honest"])
    log_to_wandb(name, cfg, files, record)
    report = html.write(
        bank.folder(name) / "report.html",
        name,
        blend.summary_lines(name, record),
        blend.table_header(record),
        blend.table_lines(name, record),
        list(files.values()),
    )
    print(f"written: {paths.relative(report)}, with the pictures of {paths.relative(files['honest'].parent)}")
    return list(files.values())


def correlation(sets: Sequence[PredictionSet], names: Sequence[str], rows: Samples, file: Path) -> None:
    """Members sorted by score: pale off the diagonal is where a blend has something to gain."""
    sets, names = sets[:MOST], list(names)[:MOST]
    kept = sets[0].predicted
    flat = np.stack([np.concatenate([s.probability(h)[kept].ravel() for h in rows.heads]) for s in sets])
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
    cfg: Config, rows: Samples, split: Folds, declared: BlendConfig, record: Any, order: list[int],
    oof: Sequence[PredictionSet], file: Path,
) -> None:  # fmt: skip
    """The score of the first member, then of the first two with their weights, and so on."""
    order, reached = order[:MOST], []
    space = {"rank": "probability"}.get(declared.blend.merge_space, declared.blend.merge_space)
    for count in range(1, len(order) + 1):
        used = order[:count]
        share: list[float] | None = [record["members"][i]["weight"] for i in used]
        if share is None or None in share or abs(sum(share)) < 1e-9:
            share = None
        said = merge([oof[i] for i in used], rows, split, space, share)
        reached.append(score.evaluate(cfg, rows, split, said)["oof"] or np.nan)
    figure, axes = plots.new_figure(max(5.0, 0.4 * len(order) + 3), 4.5)
    sign = 1 if record["direction"] == "max" else -1
    before = [reached[0], *reached[:-1]]
    colours = [
        "tab:green" if sign * (now - was) >= 0 else "tab:red"
        for was, now in zip(before, reached, strict=True)
    ]
    axes.bar(range(len(order)), np.subtract(reached, before), bottom=before, color=colours)
    axes.plot(range(len(order)), reached, color="black", marker="o", markersize=3, linewidth=0.8)
    axes.set_xticks(range(len(order)), [declared.blend.members[i] for i in order], rotation=90)
    axes.set(ylabel=f"{record['metric']} with it and all before it")
    axes.set_title("what each member adds (on the rows that chose it)", fontsize=10)
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
        "a stacker has no weights of whole members" if none else "weights, best member first", fontsize=10
    )
    plots.save(figure, file)


def optimism_curve(
    cfg: Config, rows: Samples, split: Folds, declared: BlendConfig, order: list[int], oof: Sequence[PredictionSet],
    test: Sequence[PredictionSet], record: Any, file: Path,
) -> None:  # fmt: skip
    """The ensemble made of the best few members, and of ever more."""
    from tqdm import tqdm

    counts = sorted({min(n, len(order)) for n in STEPS if n <= len(order)} | {len(order)})
    lines: dict[str, list[float]] = {"honest": [], "in-sample": []}
    recipes, refits = blend.member_recipes(declared), blend.member_refits(cfg, declared, rows, split)
    for count in tqdm(counts, desc="ever more members", delay=2, disable=None, leave=False):
        used = order[:count]
        change: dict[str, Any] = {"members": [declared.blend.members[i] for i in used]}
        if declared.blend.weights is not None:
            change["weights"] = [declared.blend.weights[i] for i in used]
        part = declared.blend.model_copy(update=change)
        own, unseen = [oof[i] for i in used], [test[i] for i in used]
        made = fit.fit_ensemble(cfg, part, rows, split, own, unseen, recipes, refits)
        lines["honest"].append(_scored(cfg, rows, split, oof[0], made.nested))
        lines["in-sample"].append(_scored(cfg, rows, split, oof[0], made.in_sample or made.nested))
    figure, axes = plots.new_figure(6, 4.5)
    for label, values in lines.items():
        axes.plot(counts, values, marker="o", label=label)
    axes.legend()
    axes.set(xlabel="members, the best first", ylabel=record["metric"])
    axes.set_title("the distance between the lines was not there", fontsize=10)
    plots.save(figure, file)


def _scored(
    cfg: Config, rows: Samples, split: Folds, like: PredictionSet, heads: dict[str, NDArray[Any]]
) -> float:
    found = score.evaluate(cfg, rows, split, PredictionSet(like.row, like.fold, heads, like.meta))["oof"]
    return np.nan if found is None else float(found)


def log_to_wandb(name: str, cfg: Config, files: dict[str, Path], record: Any) -> None:
    """The same in W&B, as a run of its own kind."""
    folder = bank.folder(name) / "pictures"
    run = tracking.open_log(
        folder, run_id=f"ensemble-{name}", name=name, group=name, job_type="ensemble",
        config={"competition": {"slug": cfg.competition.slug}, "method": record["method"], "members": [m["address"] for m in record["members"]]}, settings=cfg.track,
    )  # fmt: skip
    with run as log:
        for label, file in files.items():
            log.image(label, file)
        log.summary({key: record[key] for key in ("oof", "in_sample", "metric")})
