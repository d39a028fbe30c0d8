"""comp tta: which views of a picture, averaged where, are worth their time. Every view is predicted once for all OOF rows, then
choosing costs nothing; what is chosen is scored on folds that did not choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from comp import bank, folds, jobs, machine, predictions, samples, score, store, table
from comp.config import Refused
from comp.ensemble import latency, views, worth
from comp.predict import merge

SPACES = ("probability", "logit", "geometric")


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
    head, metric = rows.heads[0], score.metric_of(cfg)
    said, cost = _predicted(run, cfg, seeds, rows, split)
    plain = said[views.PLAIN]
    kept = plain.predicted
    assert plain.fold is not None
    at, fold = plain.row[kept].astype(np.int64), plain.fold[kept].astype(np.int64)
    truth, frame = rows.truth(head, at), score.scored(rows, at)
    values = {name: each.heads[head.name][kept] for name, each in said.items()}
    pass_ms = float(np.median(list(cost.values())))
    most = len(values) if max_ms is None else int(max_ms // pass_ms)
    if most < 1:
        raise Refused(f"--max-ms {max_ms:g}: one view alone takes {pass_ms:.2f} ms an image here")

    def scored(stored: Any) -> float:
        answers, _ = score.answers(metric, head, head.row.probability(stored), rows, split, at, fold)
        return metric(truth, answers, frame)

    def nest(fit: Any, apply: Any, first: Any) -> Any:
        return worth.nested(rows, split, at, fold, fit, apply, first)

    alone = {name: scored(np.asarray(each, np.float64)) for name, each in values.items()}
    lines = [
        [n, f"{v:.4f}", f"{metric.sign * (v - alone[views.PLAIN]):+.4f}", f"{cost[n]:.2f}"]
        for n, v in alone.items()
    ]
    print(
        table.text(
            ["view alone", metric.name, "gain", "ms an image"], lines, [metric.name, "gain", "ms an image"]
        )
    )
    options: list[dict[str, Any]] = []
    for space in SPACES if head.row.space == "logit" else ("probability",):
        chosen, own = views.honest(values, truth, head, metric, space, most, nest, frame)
        in_sample = scored(views.said(values, chosen, head, space))
        options.append({"views": chosen, "space": space, "honest": scored(own), "in_sample": in_sample})
    best = max(options, key=lambda o: (metric.sign * o["honest"], -len(o["views"])))
    base = alone[views.PLAIN]
    for each in options:
        ms = pass_ms * len(each["views"])
        gain = metric.sign * (each["honest"] - base)
        print(
            f"{each['space']}: {', '.join(each['views'])}: honest {each['honest']:.4f}, in-sample {each['in_sample']:.4f}, "
            f"{gain:+.4f} for {ms - pass_ms:.2f} ms more an image"
        )
    worthwhile = metric.sign * (best["honest"] - base) > 0 and len(best["views"]) > 1
    record = {"plain": base, "alone": alone, "options": options, "chosen": best if worthwhile else None}
    store.write_json(store.run_folder(run) / "tta.json", record)
    if worthwhile:
        names = ",".join(best["views"])
        print(
            f"worth it: {names} in {best['space']}\nnext: comp predict {run} --tta {names} --space {best['space']}"
        )
    else:
        print(
            f"no views beat the plain picture ({base:.4f}) on folds that did not choose them: stay with predict.tta: [identity]\nnext: comp bank"
        )
    return record


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
    return said, cost
