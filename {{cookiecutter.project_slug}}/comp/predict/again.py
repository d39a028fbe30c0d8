"""Predict a finished run again under other views, from its stored weights: a member of its own, the run untouched."""

from __future__ import annotations

from dataclasses import replace

from comp import bank, store
from comp.config import Refused
from comp.predict import infer, merge, tta
from comp.train.loop import Material


def predict(material: Material, run: str, views: list[str], space: str) -> str:
    """The member's name. Each fold is kept, so a killed call goes on where it was."""
    tta.views(views)
    cfg = material.cfg
    member = f"tta-{'-'.join(views)}" + ("" if space == cfg.predict.space else f"-{space}")
    cfg = cfg.model_copy(update={"predict": cfg.predict.model_copy(update={"tta": views, "space": space})})
    other = replace(material, cfg=cfg)
    numbers: list[merge.Number] = list(range(material.folds.count))
    seeds = [seed for seed in merge.seeds_of(run) if len(merge.finished(run, seed, numbers)) == len(numbers)]
    if not seeds:
        raise Refused(
            f"{run}: {merge.missing(run, cfg, material.folds)} to go before it can be predicted again: comp train {run}"
        )
    parts = [(seed, number) for seed in seeds for number in numbers]
    test, scored = len(material.samples.positions("test")), len(material.samples.positions("train"))
    # Each fold by itself, then the mean of them.
    size = bank.size(material.samples, len(parts) * test + len(seeds) * scored + test + scored)
    store.need_space(size, f"runs/{run}/members/{member}")
    doing = f"predicting {run}:{member}"
    with store.lock(store.member_folder(run, member), doing), material.stop.listening():
        for seed, number in parts:
            for kind in ("oof", "test"):
                infer.write_fold(other, run, seed, number, kind, inside=member)
                if material.stop.asked:
                    raise KeyboardInterrupt(f"{kind} of seed {seed} fold {number} is done")
        merge.member(run, member, cfg, material.samples, material.folds, parts, inside=[member])
    return member
