"""comp audit of a run: its logs, where its predictions say they come from, and both its statistics and some rows once more.

Every set that lies in a fold is looked at, so kept snapshots and other views as well as the run itself; then whether folds and
seeds merge to what stands above them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware
from comp.engine.bank import bank, predictions, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.extras import audit_pseudo
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.run import runner
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Array

if TYPE_CHECKING:
    from comp.engine.run.context import Context

AGAIN = 12  # rows of a fold that are predicted again
NEAR, NEAR_IN_HALF = (
    5e-3,
    0.1,
)  # of logits, and of values in their deviations: another batch size rounds otherwise
ALIKE = 1e-5  # of statistics, against their largest: they are sums in float64
Heads = Mapping[str, NDArray[Any]]


def of_run(run: str, rows: Samples, split: Folds) -> list[Finding]:
    found: list[Finding] = []
    try:
        cfg = runner.stored_config(run)
    except UserError as refused:
        return [NotChecked(run, refused.lines[0])]
    found += audit_pseudo.leaks(run, cfg, rows, split)
    sets: dict[Path, PredictionSet] = {}
    for file in sorted(paths.run_folder(run).glob("seed*/fold[0-9]*/**/oof.arrow")):
        if not artifacts.manifest_entry(file):
            continue
        try:
            sets[file] = bank.read(file, rows, split)
        except UserError as refused:
            found.append(NotChecked(paths.relative(file), refused.lines[0]))
    for file, said in sets.items():
        place = fold_of(file)
        if file.parent == place:
            found += of_log(place, cfg, rows, split)
        others = [name for name in said.meta["weights"] if not paths.path("runs", name).is_relative_to(place)]
        if others:
            where = f"{paths.relative(file)} speaks from {', '.join(others)}"
            found.append(Leak("in-sample base predictions", where, "provenance"))
    spoken = {file: said for file, said in sets.items() if artifacts.manifest_entry(_weights(said))}
    gone = [paths.relative(file) for file in sets if file not in spoken]
    if gone:
        why = f"the weights are gone, so {len(gone)} sets cannot be predicted again: {', '.join(gone[:3])}"
        found.append(NotChecked(run, why + (", …" if len(gone) > 3 else "")))
    if spoken:
        try:
            hardware.set_threads(cfg.train.threads)
            context = runner.gather(cfg)
        except UserError as refused:
            return [*found, NotChecked(run, refused.lines[0])]
        found += _again(context, spoken)
        found += _statistics(context, spoken)
    return found + list(_merged(run, rows, split))


def fold_of(file: Path) -> Path:
    """runs/<run>/seed0/fold3 of anything in it."""
    return next(p for p in file.parents if p.parent.name.startswith("seed"))


def _weights(said: PredictionSet) -> Path:
    """A set in a fold speaks from one checkpoint."""
    return paths.path("runs", next(iter(said.meta["weights"]), "nobody"), bank.WEIGHTS)


def of_log(place: Path, cfg: Config, rows: Samples, split: Folds) -> list[Leak]:
    """What the OOF rows score is what the log says of the last epoch, and of no better one before it."""
    log = place / "log.jsonl"
    if not log.exists() or cfg.predict.tta != ["identity"] or len(rows.heads) > 1 or run_members.chosen(cfg):
        return []  # a choice by config was made elsewhere, or is marked
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"valid_metric"' in line]
    by_epoch = {line["epoch"]: line["valid_metric"] for line in lines if "epoch" in line}
    if len(by_epoch) < 2:
        return []
    said = bank.read(place / "oof.arrow", rows, split)
    now = score.validation_score(
        cfg, rows.heads[0], said.heads[rows.heads[0].name], rows, said.row.astype(np.int64)
    )
    *before, last = sorted(by_epoch)
    metric = score.metric_of(cfg)
    best = max(by_epoch, key=lambda e: metric.sign * by_epoch[e])
    near = 1e-6 + 1e-3 * abs(now)
    if best in before and abs(now - by_epoch[best]) < near < abs(now - by_epoch[last]):
        where = f"{paths.relative(place)}: the score of epoch {best}, not of the last, {last}"
        return [Leak("best epoch picked on the scored fold", where, "provenance")]
    return []


# --- predicted again -----------------------------------------------------------------------------------------------------


def _again(context: Context, sets: Mapping[Path, PredictionSet]) -> list[Finding]:
    """Some rows of every set once more, by the weights and views that it names, for every head."""
    from tqdm import tqdm

    from comp import predict

    found: list[Finding] = []
    cfg, heads = context.cfg, context.samples.heads
    near = NEAR if cfg.train.amp == "fp32" else NEAR_IN_HALF
    for file, said in tqdm(sets.items(), desc="predicting again", delay=2, disable=None, leave=False):
        scale = {h.name: _spread(said.heads[h.name]) if h.row.space == "value" else 1.0 for h in heads}
        knobs = {key: said.meta.get(key, getattr(cfg.predict, key)) for key in ("tta", "space")}
        same = replace(context, cfg=cfg.model_copy(update={"predict": cfg.predict.model_copy(update=knobs)}))
        at = np.unique(np.linspace(0, len(said.row) - 1, AGAIN).astype(np.int64))
        stored = _flat(said.heads, scale)

        wanted = said.row[at].astype(np.int64)

        def answer(weights: Path, same: Any = same, wanted: Any = wanted, scale: Any = scale) -> Array:
            return _flat(predict.predict(same, artifacts.verified(weights), wanted)[0], scale)

        try:
            now = answer(_weights(said))
        except UserError as refused:
            found.append(NotChecked(paths.relative(file), refused.lines[0]))
            continue
        if np.abs(now - stored[at]).max() < near:
            continue
        where, place = paths.relative(file), fold_of(file)
        inside = _weights(said).parent.relative_to(place) if _weights(said).is_relative_to(place) else ""
        guilty = [
            p.name
            for p in sorted(place.parent.glob("fold[0-9]*"))
            if p != place
            and artifacts.manifest_entry(p / inside / bank.WEIGHTS)
            and np.abs(answer(p / inside / bank.WEIGHTS) - stored[at]).max() < near
        ]
        if guilty:
            what, where = "in-sample base predictions", f"{where} is what {guilty[0]} says of rows that taught it"  # fmt: skip
        elif all(np.abs(stored - row).max(axis=1).min() < near for row in now):
            what, where = "misaligned rows", f"{where}: the right values in the wrong rows"
        else:
            what = "predictions that their weights do not repeat"
        found.append(Leak(what, where, "re-prediction"))
    return found


def _spread(values: NDArray[Any]) -> Array:
    """Of a value, in whatever unit it is."""
    deviation = np.asarray(values, np.float64).std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _flat(heads: Heads, scale: Mapping[str, Any]) -> Array:
    return np.concatenate([np.asarray(heads[name], np.float64) / scale[name] for name in scale], axis=1)


# --- fitted again --------------------------------------------------------------------------------------------------------


def _statistics(context: Context, sets: Mapping[Path, PredictionSet]) -> list[Finding]:
    """What lies in the weights and is measured, of pixels and of targets that are values, is that of the training part of the fold."""
    from comp import models
    from comp.engine.run import metric_learning, model_selection, pixel_stats, pseudo_rows, target_scaler

    cfg, heads, loader = context.cfg, context.samples.heads, context.loader
    found: list[Finding] = []
    if not _measured(models.build(cfg, heads, pretrained=False, loader=loader)):
        return []

    def fitted(rows: Positions, samples: Samples) -> dict[str, Array]:
        module = models.build(cfg, heads, pretrained=False, loader=loader)
        pixel_stats.fit_pixel_stats(cfg, module, loader, rows)
        target_scaler.fit(cfg, module, samples, rows)
        return _measured(module)

    run = next(fold_of(file) for file in sets).parents[1].name
    try:
        audit_pseudo.refuse_other_labels(run, cfg, context.folds)
    except UserError as refused:
        return [NotChecked(f"{run}, its statistics", refused.lines[0])]
    known: dict[str, dict[str, Array]] = {}  # seeds share the folds, and so what is fitted on them
    for weights in dict.fromkeys(_weights(said) for said in sets.values()):
        number = fold_of(weights).name.removeprefix("fold")
        joined = pseudo_rows.fold_context(context, number)  # pseudo-labelled rows are measured like others
        scored = joined.folds.split(number)[1]
        own = metric_learning.drop_unknown_class(
            cfg, joined.samples, model_selection.fold_rows(joined, number)[0]
        )
        own = own[~np.isin(own, scored)]  # whoever dealt them out
        known[number] = known.get(number) or fitted(own, joined.samples)
        kept = _measured(
            models.load_weights(
                models.build(cfg, heads, pretrained=False, loader=loader), artifacts.verified(weights)
            )
        )
        if _alike(kept, known[number]):
            continue
        everyone = joined.folds.split("full")[0]
        others = (np.union1d(own, scored[: cfg.train.limit]), everyone)
        seen = any(_alike(kept, fitted(each, joined.samples)) for each in others)
        what = "statistics fitted on validation rows" if seen else "statistics that the training part does not repeat"  # fmt: skip
        found.append(Leak(what, paths.relative(weights), "recomputation"))
    return found


def _measured(module: Any) -> dict[str, Array]:
    """Axes of a whitening may point either way, so it is compared by what it does to the covariance."""
    from comp.engine.run import pretrained

    found = {
        name: value.cpu().double().numpy()
        for name, value in module.named_buffers()
        if name in pretrained.MEASURED
    }
    return {name: v @ v.T if name == "white" else v for name, v in found.items()}


def _alike(a: dict[str, Array], b: dict[str, Array]) -> bool:
    """A whitening divides by variances near zero, which machines round differently; its middle has no such excuse."""
    near = {name: 1e-2 if name == "white" else ALIKE for name in b}
    return all(np.abs(a[name] - b[name]).max() <= near[name] * max(1.0, np.abs(b[name]).max()) for name in b)


# --- merged again --------------------------------------------------------------------------------------------------------


def _merged(run: str, rows: Samples, split: Folds) -> Iterator[Finding]:
    """The sets of a run and its members, from the sets of their folds and seeds."""
    folder = paths.run_folder(run)
    for file in sorted([*folder.glob("oof.arrow"), *folder.glob("members/*/oof.arrow")]):
        if not artifacts.manifest_entry(file):
            continue
        try:
            said = bank.read(file, rows, split)
            parts = [
                bank.read(_part(name, file.parent.name) / "oof.arrow", rows, split)
                for name in said.meta["weights"]
            ]
            if not parts:
                yield NotChecked(
                    paths.relative(file), "it names no weights, so there is nothing to predict it again by"
                )
                continue
            again = predictions.merge(parts, rows, split, said.meta["space"])
        except UserError as refused:
            yield NotChecked(paths.relative(file), refused.lines[0])
            continue
        whole = {h.name: 1.0 for h in rows.heads}
        old, new = _flat(said.heads, whole), _flat(again.heads, whole)
        if np.allclose(old, new, rtol=1e-5, atol=1e-5, equal_nan=True):
            continue
        if np.allclose(np.sort(old, axis=0), np.sort(new, axis=0), rtol=1e-5, atol=1e-5, equal_nan=True):
            yield Leak(
                "misaligned rows",
                f"{paths.relative(file)}: the right values in the wrong rows",
                "recomputation",
            )
        else:
            yield Leak("predictions that their folds do not repeat", paths.relative(file), "recomputation")


def _part(weights: str, member: str) -> Path:
    """Where the checkpoint spoke for this member: other views of a run's own weights lie in a folder of their name."""
    place = paths.path("runs", weights)
    return place / member if (place / member / "oof.arrow").exists() else place
