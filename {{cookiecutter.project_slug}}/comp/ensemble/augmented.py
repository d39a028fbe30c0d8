"""comp tta: which views of a picture, averaged where, are worth their time. Every view is predicted once for all OOF rows, then
choosing costs nothing; views and space are scored on folds that chose neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from comp import bank, config, folds, honest, jobs, machine, predictions, samples, score, store, table
from comp.config import Refused
from comp.ensemble import latency, views, worth
from comp.metrics import MetricUndefined
from comp.predict import merge

SPACES = ("probability", "logit", "geometric")
ONE_PASS = (
    0.3  # a view whose time differs by less from that of the plain one costs as much: the rest is the clock
)


def tta(run: str, max_ms: float | None = None) -> dict[str, Any]:
    """max_ms: of one image and one checkpoint, all views together."""
    cfg = jobs.stored_config(run)
    machine.settle(cfg.train.threads)
    rows = samples.load()
    split = folds.load(rows)
    seeds = [
        s for s in merge.seeds_of(run) if len(merge.finished(run, s, list(range(split.count)))) == split.count
    ]
    if not seeds:
        raise Refused(
            f"{run}: {merge.missing(run, cfg, split)} to go before views can be compared: comp train {run}"
        )
    if len(rows.heads) > 1:
        raise Refused("comp tta compares views of one target; competition.yaml declares several")
    head, now = rows.heads[0], config.load(store.root(), "base").config  # the metric of now, not of then
    metric = score.metric_of(now)
    predicted, cost = _predicted(run, cfg, seeds, rows, split)
    plain = predicted[views.PLAIN]
    kept = plain.predicted
    assert plain.fold is not None
    at, fold = plain.row[kept].astype(np.int64), plain.fold[kept].astype(np.int64)
    values = {name: each.heads[head.name][kept] for name, each in predicted.items()}
    ceiling = float("inf") if max_ms is None else max_ms
    if ceiling < cost[views.PLAIN]:
        raise Refused(f"--max-ms {max_ms:g}: one view alone takes {cost[views.PLAIN]:.2f} ms an image here")
    spaces = SPACES if head.row.space == "logit" else ("probability",)
    frame = score.scored(rows, at)
    question = views.Question(values, rows.truth(head, at), head, metric, spaces, cost, ceiling, frame)
    here = score.lines(rows, at, fold)

    def asked(stored: Any) -> score.Asked:
        return score.asked(now, head, head.row.probability(np.asarray(stored, np.float64)), rows, split, here)

    def scored(ask: score.Asked) -> float:
        return ask.metric(ask.truth, ask.answer, ask.frame)

    alone = {name: scored(asked(each)) for name, each in values.items()}
    base = alone[views.PLAIN]
    _tell_alone(metric, alone, cost)
    options = []
    for space in spaces:
        chosen = question.within(space)
        ms = sum(cost[name] for name in chosen.views)
        in_sample = scored(asked(question.said(chosen)))
        options.append({"space": space, "views": list(chosen.views), "in_sample": in_sample})
        print(
            f"{space}: {', '.join(chosen.views)}: {in_sample:.4f} on the rows that chose them, {ms:.2f} ms an image"
        )
    found = score.nested(rows, split, at, fold, question.choose, question.said, views.PLAIN_CHOICE)
    best: views.Choice = found.final
    own, before = asked(found.prediction), asked(values[views.PLAIN])
    reached = scored(own)
    ms = sum(cost[name] for name in best.views)
    try:
        pair = honest.paired(
            own.metric, own.truth, own.answer, before.answer, score.groups_of(rows, here.rows), worth.RESAMPLES, rows=own.frame
        )  # fmt: skip
        says = str(pair)
    except MetricUndefined as fault:
        says = f"no comparison: {fault}"
    in_sample = scored(asked(question.said(best)))
    print(
        f"chosen on other folds, views and space: honest {reached:.4f}, in-sample {in_sample:.4f}, plain {base:.4f}: {says}; "
        f"{ms - cost[views.PLAIN]:.2f} ms more an image"
    )
    worthwhile = metric.sign * (reached - base) > 0 and len(best.views) > 1
    chosen_ = {
        "views": list(best.views),
        "space": best.space,
        "honest": reached,
        "in_sample": in_sample,
        "says": says,
    }
    record = {"plain": base, "alone": alone, "options": options, "chosen": chosen_ if worthwhile else None}
    store.write_json(store.run_folder(run) / "tta.json", record)
    if worthwhile:
        names = ",".join(best.views)
        print(
            f"worth it: {names} in {best.space}\nnext: comp predict {run} --tta {names} --space {best.space}"
        )
    else:
        print(
            f"no views beat the plain picture ({base:.4f}) on folds that did not choose them: stay with predict.tta: [identity]\nnext: comp bank"
        )
    return record


def _tell_alone(metric: Any, alone: dict[str, float], cost: dict[str, float]) -> None:
    base, lines = alone[views.PLAIN], []
    for name, value in alone.items():
        gain = metric.sign * (value - base)
        lines.append([name, f"{value:.4f}", f"{gain:+.4f}", f"{cost[name]:.2f}"])
    numbers = [metric.name, "gain", "ms an image"]
    print(table.text(["view alone", *numbers], lines, numbers))


def _predicted(
    run: str, cfg: Any, seeds: list[int], rows: Any, split: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """Each view as a whole OOF set, and its milliseconds an image. Kept fold by fold, so a killed call goes on where it was."""
    material = jobs.gather(cfg)
    from comp.predict import infer
    from comp.predict.tta import VIEWS

    said, cost = {}, {}
    with store.lock(store.run_folder(run) / "members", f"trying views of {run}"):
        for name in VIEWS:
            one = cfg.model_copy(update={"predict": cfg.predict.model_copy(update={"tta": [name]})})
            inside, parts, seconds = f"view-{name}", [], []
            for seed in seeds:
                for number in range(split.count):
                    file = infer.write_fold(
                        replace(material, cfg=one), run, seed, number, "oof", inside=inside
                    )
                    parts.append(bank.read(file, rows, split))
                    speed = file.with_name(latency.FILE)
                    seconds.append(store.read_json(speed)["oof"] if speed.exists() else np.nan)
            said[name] = predictions.merge(parts, rows, split, cfg.predict.space)
            cost[name] = 1000 * float(np.nanmedian(seconds))
    plain = cost[views.PLAIN]
    return said, {n: plain if abs(ms - plain) < ONE_PASS * plain else ms for n, ms in cost.items()}
