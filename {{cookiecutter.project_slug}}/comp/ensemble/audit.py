"""comp audit: has anything seen its answers? First what lies on the disk, then the pipeline itself on coin flips (canary.py).

duplicates across folds             hash              the bytes of every training image
a split group                       provenance        groups of the samples against the folds
in-sample base predictions          provenance, re-prediction   by the weights of the fold, some rows again
misaligned rows                     re-prediction     the right values in the wrong rows
best epoch picked on the scored fold  provenance      log.jsonl against what the OOF rows score
in-sample meta-model                recomputation     the ensemble fitted again, fold by fold
pseudo-labels that saw the fold     provenance, recomputation   whose models made the labels that teach a fold
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp import bank, config, folds, jobs, machine, members, samples, score, store, table
from comp.config import Config, Refused
from comp.ensemble import blend, canary, declare, fitting, taught
from comp.ensemble.canary import Leak
from comp.folds import Folds
from comp.samples import Samples

AGAIN = 12  # rows of a fold that are predicted again
NEAR = 5e-3  # of logits: another batch size rounds otherwise


def audit(seeds: int = 1) -> int:
    """Prints what it looked at and every leak by name with how it was known; the number of leaks."""
    cfg = config.load(store.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    runs = [
        p.name
        for p in sorted(store.path("runs").glob("*"))
        if store.sealed(p / "config.yaml") and p.name[0] != "."
    ]
    blends = [p.name for p in sorted(store.path("ensembles").glob("*")) if store.sealed(p / "apply.json")]
    found = [*duplicates(cfg, rows, split), *groups(rows, split), *pseudo(rows, split)]
    for run in runs:
        found += of_run(run, rows, split)
    for name in blends:
        found += of_ensemble(name, cfg, rows, split)
    worlds = [canary.world(seed) for seed in range(seeds)]
    for seed, world in enumerate(worlds):
        found += [
            leak._replace(where=f"pipeline on coin flips {seed}, {leak.where}")
            for leak in canary.leaks(world)
        ]
    print(
        f"looked at: {len(rows.positions('train'))} training rows, runs {', '.join(runs) or '-'}, ensembles {', '.join(blends) or '-'}"
    )
    _chance(worlds[0], found)
    _optimistic(runs + blends)
    if found:
        print(table.text(["LEAK", "where", "known by"], [[*leak] for leak in found]))
    print(f"{len(found) or 'no'} leak{'s' * (len(found) != 1)}\nnext: comp runs")
    return len(found)


def _chance(world: canary.World, found: list[Leak]) -> None:
    said = canary.chance(world)
    body = [
        [n, f"{s['honest']:.4f}", f"{s['in_sample']:.4f}", f"{s['errors']:+.1f}"] for n, s in said.items()
    ]
    print(f"on coin flips, {len(world.y)} rows (AUC; balanced accuracy of thresholds), 0.5 is chance:")
    print(
        table.text(
            ["method", "honest", "in-sample", "standard errors"],
            body,
            ["honest", "in-sample", "standard errors"],
        )
    )
    for name, each in said.items():
        if each["errors"] > canary.LIMIT:
            found.append(
                Leak(
                    f"{name} scores above chance on coin flips",
                    f"{each['errors']:.1f} standard errors",
                    "random labels",
                )
            )
    print(
        f"the best of {canary.EPOCHS} epochs, picked on the scored fold, would show {canary.selection(world):.3f} AUC that is not there"
    )


def _optimistic(addresses: list[str]) -> None:
    for address in addresses:
        file = bank.folder(address) / "score.json"
        if store.sealed(file) and "selected_on_fold" in store.read_json(store.verified(file))["marks"]:
            print(f"optimistic: {address} chose its epoch on the rows it is scored on (selected_on_fold)")


# --- samples and folds ---------------------------------------------------------------------------------------------------


def duplicates(cfg: Config, rows: Samples, split: Folds) -> list[Leak]:
    """The same bytes on both sides of a fold. Pictures that only look alike: comp folds --duplicates."""
    from tqdm import tqdm

    where: dict[str, set[int]] = defaultdict(set)
    ids: dict[str, list[str]] = defaultdict(list)
    raw = store.path(cfg.competition.raw)
    for position in tqdm(rows.taught.tolist(), desc="hashing images", delay=2, disable=None, leave=False):
        for image in rows.frame["images"].iloc[position]:
            if (raw / image).is_file():
                sha = store.sha256(raw / image)
                where[sha].add(int(split.of_sample[0, position]))
                ids[sha].append(str(rows.frame["id"].iloc[position]))
    several = [sha for sha, numbers in where.items() if len(numbers) > 1]
    return [
        Leak(
            "duplicates across folds",
            f"{', '.join(ids[sha][:3])} in folds {', '.join(map(str, sorted(where[sha])))}",
            "hash",
        )
        for sha in several[:10]
    ]


def groups(rows: Samples, split: Folds) -> list[Leak]:
    from comp.prepare import audit as folds_audit

    faults = folds_audit.audit(rows, split)["faults"]
    return [Leak("a split group", fault, "provenance") for fault in faults if fault.startswith("group ")]


def pseudo(rows: Samples, split: Folds) -> list[Leak]:
    """Labels of source pseudo:<run>:fold<k> were made by models that did not see fold k, and may teach that fold alone. Without
    :fold<k> all folds' models made them, so each fold is taught by labels that its own rows helped to make."""
    source, found = rows.frame["source"].astype(str).to_numpy(), []
    for number in range(split.count):
        strange = sorted(
            {
                s
                for s in source[split.split(number)[0]]
                if s.startswith("pseudo:") and not s.endswith(f":fold{number}")
            }
        )
        found += [
            Leak("pseudo-labels that saw the fold", f"{s} teaches fold {number}", "provenance")
            for s in strange
        ]
    return found


# --- runs ----------------------------------------------------------------------------------------------------------------


def of_run(run: str, rows: Samples, split: Folds) -> list[Leak]:
    found: list[Leak] = []
    cfg = jobs.stored_config(run)
    found += taught.leaks(run, cfg, rows, split)
    places = [
        p for p in sorted(store.run_folder(run).glob("seed*/fold[0-9]*")) if store.sealed(p / "oof.arrow")
    ]
    for place in places:
        found += of_log(place, cfg, rows, split)
        said = bank.read_meta(place / "oof.arrow")["weights"]
        wrong = [name for name in said if Path(name).name != place.name]
        if wrong:
            where = f"{store.shown(place)}/oof.arrow speaks from {', '.join(wrong)}"
            found.append(Leak("in-sample base predictions", where, "provenance"))
    if any(store.sealed(place / "weights.safetensors") for place in places):
        found += _again(run, cfg, places, rows, split)
    return found


def of_log(place: Path, cfg: Config, rows: Samples, split: Folds) -> list[Leak]:
    """What the OOF rows score is what the log says of the last epoch, and of no better one before it."""
    log = place / "log.jsonl"
    if not log.exists() or cfg.predict.tta != ["identity"] or len(rows.heads) > 1 or members.chosen(cfg):
        return []  # a choice by config was made elsewhere, or is marked
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"valid_metric"' in line]
    by_epoch = {line["epoch"]: line["valid_metric"] for line in lines if "epoch" in line}
    if len(by_epoch) < 2:
        return []
    said = bank.read(place / "oof.arrow", rows, split)
    now = score.glance(cfg, rows.heads[0], said.heads[rows.heads[0].name], rows, said.row.astype(np.int64))
    *before, last = sorted(by_epoch)
    metric = score.metric_of(cfg)
    best = max(by_epoch, key=lambda e: metric.sign * by_epoch[e])
    near = 1e-6 + 1e-3 * abs(now)
    if best in before and abs(now - by_epoch[best]) < near < abs(now - by_epoch[last]):
        where = f"{store.shown(place)}: the score of epoch {best}, not of the last, {last}"
        return [Leak("best epoch picked on the scored fold", where, "provenance")]
    return []


def _again(run: str, cfg: Config, places: list[Path], rows: Samples, split: Folds) -> list[Leak]:
    """Some rows of every fold once more, by the weights of that fold."""
    machine.settle(cfg.train.threads)
    material = jobs.gather(cfg)
    from comp.predict import infer

    found, head = [], rows.heads[0]
    for place in places:
        weights = place / "weights.safetensors"
        if not store.sealed(weights):
            continue  # cleaned away: predictions outlive weights
        said = bank.read(place / "oof.arrow", rows, split)
        at = np.unique(np.linspace(0, len(said.row) - 1, AGAIN).astype(np.int64))
        wanted, stored = said.row[at].astype(np.int64), np.asarray(said.heads[head.name], np.float64)
        now = infer.predict(material, store.verified(weights), wanted)[0][head.name]
        if _near(now, stored[at]):
            continue
        where = f"{store.shown(place)}/oof.arrow"
        others = [
            p
            for p in places
            if p != place and p.parent == place.parent and store.sealed(p / "weights.safetensors")
        ]
        guilty = [
            p.name
            for p in others
            if _near(infer.predict(material, p / "weights.safetensors", wanted)[0][head.name], stored[at])
        ]
        if guilty:
            found.append(
                Leak(
                    "in-sample base predictions",
                    f"{where} is what {guilty[0]} says of rows that taught it",
                    "re-prediction",
                )
            )
        elif all(np.abs(stored - row).max(axis=1).min() < NEAR for row in now):
            found.append(
                Leak("misaligned rows", f"{where}: the right values in the wrong rows", "re-prediction")
            )
        else:
            found.append(Leak("predictions that their weights do not repeat", where, "re-prediction"))
    return found


def _near(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return bool(np.abs(a - b).max() < NEAR)


# --- ensembles -----------------------------------------------------------------------------------------------------------


def of_ensemble(name: str, cfg: Config, rows: Samples, split: Folds) -> list[Leak]:
    """Fitted again: what lies there must be what each fold gets from the others."""
    try:
        declared = declare.read(name)
        oof, test = (blend.sets(declared, kind, rows, split) for kind in bank.KINDS)
        said = bank.load(name, "oof", rows, split)
        nested, refits = blend.recipes(declared), blend.refits(cfg, declared, rows, split)
    except Refused as refused:
        print(f"{name}: not looked at, {refused.lines[0]}")
        return []
    made = fitting.make(cfg, declared.blend, rows, split, oof, test, nested, refits)
    where = f"{store.shown(bank.folder(name))}/oof.arrow"

    def equal(values: fitting.Stored | None) -> bool:
        return values is not None and all(
            np.allclose(said.heads[h.name], values[h.name], atol=1e-5, equal_nan=True) for h in rows.heads
        )

    if equal(made.honest):
        return []
    if equal(made.in_sample):
        return [
            Leak("in-sample meta-model", f"{where} is scored on the rows that taught it", "recomputation")
        ]
    return [Leak("predictions that its members do not repeat", where, "recomputation")]
