"""comp audit: has anything seen its answers? First what lies on the disk, then the pipeline itself on coin flips (canary.py).

duplicates across folds             hash              the bytes of every training image, in archives too
a split group                       provenance        groups of the samples against the folds
in-sample base predictions          provenance, re-prediction   by the weights of the fold, some rows again
misaligned rows                     re-prediction, recomputation   the right values in the wrong rows
statistics fitted on validation rows   recomputation   mean, deviation and whitening of the training part again
best epoch picked on the scored fold  provenance      log.jsonl against what the OOF rows score
in-sample meta-model                recomputation     the ensemble fitted again, fold by fold
pseudo-labels that saw the fold     provenance, recomputation   whose models made the labels that teach a fold

What could not be looked at is named; so is whatever was chosen on the rows that it is scored on (selected_on_fold).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from comp.engine import text_table
from comp.engine.bank import bank
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble import blend, blend_config, fit
from comp.engine.errors import Refused, UserError
from comp.engine.extras import canary, flips
from comp.engine.extras.audit_runs import of_run
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.store import artifacts, paths

SHOWN = 10  # pictures with copies


def audit(seeds: int = 1) -> int:
    """Prints what it looked at and every leak by name with how it was known. Exit code 1 if there is one."""
    from tqdm import tqdm

    if seeds < 1:
        raise Refused("--seeds: one world of coin flips is the least")
    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    runs = [
        p.name
        for p in sorted(paths.path("runs").glob("*"))
        if artifacts.manifest_entry(p / "config.yaml") and p.name[0] != "."
    ]
    blends = [
        p.name
        for p in sorted(paths.path("ensembles").glob("*"))
        if artifacts.manifest_entry(p / "apply.json")
    ]
    found: list[Finding] = [*duplicates(cfg, rows, split), *groups(rows, split), *pseudo(rows, split)]
    for run in runs:
        found += of_run(run, rows, split)
    for name in blends:
        found += of_ensemble(name, cfg, rows, split)
    for seed in tqdm(range(seeds), desc="worlds of coin flips", disable=None, leave=False):
        world = flips.world(seed)
        first = canary.watched(world)
        found += [
            leak._replace(where=f"pipeline on coin flips {seed}, {leak.where}")
            for leak in canary.leaks(world, first)
        ]
        if seed == 0:
            shown = canary.chance(world, first), canary.selection(world)
    print(
        f"looked at: {len(rows.positions('train'))} training rows, runs {', '.join(runs) or '-'}, ensembles {', '.join(blends) or '-'}"
    )
    found += _chance(*shown)
    for line in optimistic():
        print(line)
    leaks = [each for each in found if isinstance(each, Leak)]
    unseen = [each for each in found if isinstance(each, NotChecked)]
    for what, why in unseen:
        print(f"not checked: {what}: {why}")
    if leaks:
        print(text_table.render(["LEAK", "where", "known by"], [[*leak] for leak in leaks]))
    beside = f"; {len(unseen)} not checked, see above" if unseen else ""
    print(f"{len(leaks) or 'no'} leak{'s' * (len(leaks) != 1)}{beside}\nnext: comp runs")
    return 1 if leaks else 0


def _chance(said: Mapping[str, Mapping[str, float]], selection: float) -> list[Leak]:
    found = []
    body = [
        [n, f"{s['honest']:.4f}", f"{s['in_sample']:.4f}", f"{s['errors']:+.1f}"] for n, s in said.items()
    ]
    print(
        f"on coin flips, {flips.ROWS} rows: AUC, balanced accuracy of thresholds (chance is 0.5), QWK of cut points (chance is 0)"
    )
    print(
        text_table.render(
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
        f"the best of {canary.EPOCHS} epochs, picked on the scored fold, would show {selection:.3f} AUC that is not there"
    )
    return found


def optimistic() -> list[str]:
    """Every set of the bank that was chosen on the rows it is scored on, or is made from one that was: snapshots and other
    members, stackers and other ensembles."""
    return [line for line in map(_flattered, bank.members()) if line]


def _flattered(address: str) -> str:
    folder = bank.folder(address)
    said = next(
        bank.read_meta(folder / f"{k}.arrow")
        for k in bank.KINDS
        if artifacts.manifest_entry(folder / f"{k}.arrow")
    )
    if "selected_on_fold" not in said["marks"]:
        return ""
    record = (
        artifacts.read_json(folder / "score.json") if artifacts.manifest_entry(folder / "score.json") else {}
    )
    if "members" in said:
        guilty = [m["address"] for m in record.get("members", []) if "selected_on_fold" in m["marks"]]
        return f"optimistic: {address} is made from {', '.join(guilty) or 'a member'}, which is marked selected_on_fold"
    amount = record.get("optimism")
    about = "" if amount is None else f", by about {amount:.4f}"
    return f"optimistic: {address} chose its epoch on the rows it is scored on (selected_on_fold){about}"


# --- samples and folds ---------------------------------------------------------------------------------------------------


def duplicates(cfg: Config, rows: Samples, split: Folds) -> list[Finding]:
    """The same bytes on both sides of a fold, wherever a path leads: files, members of archives, arrays; extra rows included.
    Pictures that only look alike: comp folds --duplicates."""
    from comp.engine.data import exact_duplicates
    from comp.engine.data import fold_audit as folds_audit

    images = exact_duplicates.find_by_bytes(cfg, rows)
    ids = rows.frame["id"].to_numpy(object)
    shared = folds_audit.shared_images(rows, split, images, images.by_bytes)
    found: list[Finding] = [
        Leak(
            "duplicates across folds",
            f"{', '.join(map(str, ids[each.rows[:3]]))} in {_folds(each.places)}",
            "hash",
        )
        for each in shared[:SHOWN]
    ]
    if len(shared) > SHOWN:
        more = f"{len(shared) - SHOWN} more pictures; comp folds --duplicates lists all"
        found.append(Leak("duplicates across folds", more, "hash"))
    used = {images.names[at] for at in images.image[np.isin(images.sample, rows.labeled)]}
    if unread := [why for name, why in images.unread.items() if name in used]:
        found.append(NotChecked(f"duplicates among {len(unread)} images that cannot be read", unread[0]))
    return found


def _folds(places: list[str]) -> str:
    """`folds 0, 3 and the train-only rows`"""
    numbers = [place.removeprefix("fold ") for place in places if place.startswith("fold ")]
    other = [place for place in places if not place.startswith("fold ")]
    return " and ".join([f"fold{'s' * (len(numbers) > 1)} {', '.join(numbers)}"] * bool(numbers) + other)


def groups(rows: Samples, split: Folds) -> list[Leak]:
    from comp.engine.data import fold_audit as folds_audit

    faults = folds_audit.errors(folds_audit.audit(rows, split))
    split_groups = [fault for fault in faults if fault.code == "group-across-folds" and fault.where]
    return [Leak("a split group", f"{fault.where} {fault.what}", "provenance") for fault in split_groups]


def pseudo(rows: Samples, split: Folds) -> list[Leak]:
    """Labels of source pseudo:<run>:fold<k> were made by models that did not see fold k, and may teach that fold alone. Without
    :fold<k> all folds' models made them, so each fold is taught by labels that its own rows helped to make."""
    source, found = rows.frame["source"].astype(str).to_numpy(), []
    for number in range(split.count):
        taught = split.split(number)[0]
        strange = sorted(
            {s for s in source[taught] if s.startswith("pseudo:") and not s.endswith(f":fold{number}")}
        )
        found += [
            Leak("pseudo-labels that saw the fold", f"{s} teaches fold {number}", "provenance")
            for s in strange
        ]
    return found


# --- ensembles -----------------------------------------------------------------------------------------------------------


def of_ensemble(name: str, cfg: Config, rows: Samples, split: Folds) -> list[Finding]:
    """Fitted again: what lies there must be what each fold gets from the others."""
    try:
        declared = blend_config.read(name)
        oof, test = (blend.member_predictions(declared, kind, rows, split) for kind in bank.KINDS)
        said = bank.load(name, "oof", rows, split)
        nested, refits = blend.member_recipes(declared), blend.member_refits(cfg, declared, rows, split)
    except UserError as refused:
        return [NotChecked(name, refused.lines[0])]
    made = fit.fit_ensemble(cfg, declared.blend, rows, split, oof, test, nested, refits)
    where = f"{paths.relative(bank.folder(name))}/oof.arrow"

    def equal(values: fit.Stored | None) -> bool:
        return values is not None and all(
            np.allclose(said.heads[h.name], values[h.name], atol=1e-5, equal_nan=True) for h in rows.heads
        )

    if equal(made.nested):
        return []
    if equal(made.in_sample):
        return [
            Leak("in-sample meta-model", f"{where} is scored on the rows that taught it", "recomputation")
        ]
    return [Leak("predictions that its members do not repeat", where, "recomputation")]
