"""For comp audit: leaks that samples and folds alone show. Duplicates, split groups, pseudo-labelled
samples."""

from __future__ import annotations

import numpy as np

from comp.engine.config.schema import Config
from comp.engine.data import exact_duplicates, fold_audit
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.extras.findings import DUPLICATES, GROUPS, PSEUDO, Finding, Leak, NotChecked

SHOWN = 10  # images with copies


def duplicates(cfg: Config, rows: Samples, split: Folds) -> list[Finding]:
    """The same bytes on both sides of a fold, wherever a path leads: files, members of archives, arrays;
    extra rows included. Images that are only similar: comp folds --duplicates."""
    images = exact_duplicates.find_by_bytes(cfg, rows)
    ids = rows.frame["id"].to_numpy(object)
    shared = fold_audit.shared_images(rows, split, images, images.by_bytes)
    found: list[Finding] = [
        Leak(
            DUPLICATES,
            f"{', '.join(map(str, ids[copies.rows[:3]]))} in {_folds(copies.places)}",
            "hash",
        )
        for copies in shared[:SHOWN]
    ]
    if len(shared) > SHOWN:
        more = f"{len(shared) - SHOWN} more images; comp folds --duplicates lists all"
        found.append(Leak(DUPLICATES, more, "hash"))
    used = {images.names[at] for at in images.image[np.isin(images.sample, rows.labeled)]}
    if unread := [reason for name, reason in images.unread.items() if name in used]:
        what = f"duplicates among {len(unread)} images that cannot be read"
        found.append(NotChecked(what, unread[0], (DUPLICATES,)))
    return found


def _folds(places: list[str]) -> str:
    """`folds 0, 3 and the train-only rows`"""
    numbers = [place.removeprefix("fold ") for place in places if place.startswith("fold ")]
    other = [place for place in places if not place.startswith("fold ")]
    return " and ".join([f"fold{'s' * (len(numbers) > 1)} {', '.join(numbers)}"] * bool(numbers) + other)


def groups(rows: Samples, split: Folds) -> list[Leak]:
    """Groups with rows on both sides of a fold."""
    faults = fold_audit.errors(fold_audit.audit(rows, split))
    split_groups = [fault for fault in faults if fault.code == "group-across-folds" and fault.where]
    return [Leak(GROUPS, f"{fault.where} {fault.what}", "provenance") for fault in split_groups]


def pseudo_sources(rows: Samples, split: Folds) -> list[Leak]:
    """Samples with the source pseudo:RUN:foldK were labelled by models that were not trained on fold K, so
    only fold K may train on them. Without :foldK the models of all folds made the labels, which leak the rows
    of every fold."""
    source, found = rows.frame["source"].astype(str).to_numpy(), []
    for fold in range(split.count):
        train_rows = split.split(fold)[0]
        wrong = sorted(
            {
                name
                for name in source[train_rows]
                if name.startswith("pseudo:") and not name.endswith(f":fold{fold}")
            }
        )
        found += [
            Leak(
                PSEUDO,
                f"fold {fold} is trained on {name}",
                "provenance",
            )
            for name in wrong
        ]
    return found
