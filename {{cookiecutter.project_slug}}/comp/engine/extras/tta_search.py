"""comp tta: which views of a picture, averaged where, are worth their time. Every view is predicted once for all OOF rows, then
choosing costs nothing; views and space are scored on folds that chose neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from comp.engine import hardware, text_table
from comp.engine.bank import bank, predictions, score
from comp.engine.config import experiments, resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.ensemble import latency, report
from comp.engine.errors import Refused
from comp.engine.extras import view_search
from comp.engine.run import fingerprint, runner
from comp.engine.store import artifacts, locks, paths

SPACES = ("probability", "logit", "geometric")
DRAWS = 3  # of the run's recipe, a view each
ONE_PASS = (
    0.3  # a view whose time differs by less from that of the plain one costs as much: the rest is the clock
)


def tta(run: str, max_ms: float | None = None, names: str | None = None) -> dict[str, Any]:
    """max_ms: of one image and one checkpoint, all views together. names: views by commas, all that there are otherwise."""
    cfg = runner.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    rows = samples.load()
    split = folds.load(rows)
    seeds = experiments.complete(run, split.count)
    if not seeds:
        raise experiments.refusal(run, "OOF predictions to compare views on")
    heads, now = rows.heads, resolve.load(paths.root(), "base").config  # the metric of now, not of then
    metrics = [score.metric_of(now, head) for head in heads]
    predicted, cost = _predicted(run, cfg, seeds, rows, split, names)
    plain = predicted[view_search.PLAIN]
    kept = plain.predicted
    assert plain.fold is not None
    at, fold = plain.row[kept].astype(np.int64), plain.fold[kept].astype(np.int64)
    values = {
        name: np.hstack([each.heads[head.name][kept] for head in heads]) for name, each in predicted.items()
    }
    ceiling = float("inf") if max_ms is None else max_ms
    if ceiling < cost[view_search.PLAIN]:
        raise Refused(
            f"--max-ms {max_ms:g}: one view alone takes {cost[view_search.PLAIN]:.2f} ms an image here"
        )
    spaces = [space for space in SPACES if all(space in head.row.spaces for head in heads)]
    truths = [rows.truth(head, at) for head in heads]
    question = view_search.Question(
        values, truths, heads, metrics, spaces, cost, ceiling, score.metric_frame(rows, at)
    )
    here = score.scored_rows(rows, at, fold)

    def as_set(stored: Any) -> predictions.PredictionSet:
        parts = view_search.by_head(heads, np.asarray(stored, np.float64))
        by_name = {head.name: part for head, part in zip(heads, parts, strict=True)}
        return predictions.PredictionSet(plain.row[kept], plain.fold[kept], by_name, plain.meta)

    def scored(stored: Any) -> float:
        """The mean over heads, with cut points of other folds where the metric wants them."""
        found, every = [], as_set(stored)
        for head in heads:
            ask = score.metric_input(now, head, every.probability(head), rows, split, here)
            found.append(ask.metric(ask.truth, ask.prediction, ask.frame))
        return float(np.mean(found))

    alone = {name: scored(each) for name, each in values.items()}
    base, metric = alone[view_search.PLAIN], metrics[0]
    _tell_alone(metric, alone, cost)
    options = []
    for space in spaces:
        chosen = question.within(space)
        ms = sum(cost[name] for name in chosen.views)
        in_sample = scored(question.said(chosen))
        options.append({"space": space, "views": list(chosen.views), "in_sample": in_sample})
        print(
            f"{space}: {', '.join(chosen.views)}: {in_sample:.4f} on the rows that chose them, {ms:.2f} ms an image"
        )
    found = score.nested_predict(
        rows, split, at, fold, question.choose, question.said, view_search.PLAIN_CHOICE
    )
    best: view_search.Choice = found.final
    reached = scored(found.prediction)
    ms = sum(cost[name] for name in best.views)
    compared = report.compare(
        now, rows, split, as_set(found.prediction), {view_search.PLAIN: as_set(values[view_search.PLAIN])}
    )
    says = (
        compared["against"][view_search.PLAIN]["text"]
        if compared["against"]
        else f"no comparison: {compared['undefined_interval']}"
    )
    in_sample = scored(question.said(best))
    print(
        f"chosen on other folds, views and space: honest {reached:.4f}, in-sample {in_sample:.4f}, plain {base:.4f}: {says}; "
        f"{ms - cost[view_search.PLAIN]:.2f} ms more an image"
    )
    worthwhile = metric.sign * (reached - base) > 0 and len(best.views) > 1
    chosen_ = {
        "views": list(best.views),
        "space": best.space,
        "honest": reached,
        "in_sample": in_sample,
        "text": says,
    }
    record = {"plain": base, "alone": alone, "options": options, "chosen": chosen_ if worthwhile else None}
    artifacts.write_json(paths.run_folder(run) / "tta.json", record)
    if worthwhile:
        shown = ",".join(best.views)
        print(
            f"worth it: {shown} in {best.space}\nnext: comp predict {run} --tta {shown} --space {best.space}"
        )
    else:
        print(
            f"no views beat the plain picture ({base:.4f}) on folds that did not choose them: stay with predict.tta: [identity]\nnext: comp bank"
        )
    return record


def tried(cfg: Config, names: str | None) -> list[str]:
    """Flips, zooms, crops, as many draws of the run's own recipe as DRAWS, and what the run predicts with already."""
    from comp.engine.run.views import CROPS, VIEWS

    recipe = cfg.augment.recipe
    drawn = (
        [f"{recipe}{draw if draw > 1 else ''}" for draw in range(1, DRAWS + 1)] if recipe != "none" else []
    )
    given = [*VIEWS, *CROPS, *drawn, *cfg.predict.tta]
    if names is not None:
        given = [view_search.PLAIN, *(name.strip() for name in names.split(","))]
    return list(dict.fromkeys(given))


def _tell_alone(metric: Any, alone: dict[str, float], cost: dict[str, float]) -> None:
    base, lines = alone[view_search.PLAIN], []
    for name, value in alone.items():
        gain = metric.sign * (value - base)
        lines.append([name, f"{value:.4f}", f"{gain:+.4f}", f"{cost[name]:.2f}"])
    numbers = [metric.name, "gain", "ms an image"]
    print(text_table.render(["view alone", *numbers], lines, numbers))


def _predicted(
    run: str, cfg: Config, seeds: list[int], rows: Any, split: Any, names: str | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Each view as a whole OOF set, and its milliseconds an image. Kept fold by fold, so a killed call goes on where it was."""
    fingerprint.validate_images(run, cfg)
    context = runner.gather(cfg)
    from comp import predict
    from comp.engine.run import views as looks

    known = tried(cfg, names)
    looks.views(known)  # a name that there is not is refused before the first is predicted
    said, cost = {}, {}
    with locks.lock(paths.run_folder(run) / "members", f"trying views of {run}"):
        for name in known:
            one = cfg.model_copy(update={"predict": cfg.predict.model_copy(update={"tta": [name]})})
            inside, parts, seconds = f"view-{name}", [], []
            for seed in seeds:
                for number in range(split.count):
                    file = predict.write_fold(
                        replace(context, cfg=one), run, seed, number, "oof", inside=inside
                    )
                    parts.append(bank.read(file, rows, split))
                    speed = file.with_name(latency.FILE)
                    seconds.append(artifacts.read_json(speed)["oof"] if speed.exists() else np.nan)
            said[name] = predictions.merge(parts, rows, split, cfg.predict.space)
            cost[name] = 1000 * float(np.nanmedian(seconds))
    plain = cost[view_search.PLAIN]
    return said, {n: plain if abs(ms - plain) < ONE_PASS * plain else ms for n, ms in cost.items()}
