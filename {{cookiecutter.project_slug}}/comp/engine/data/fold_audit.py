"""Reports the contents of the folds and faults that make their scores invalid. Depends on samples and folds
only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.data import exact_duplicates, image_key
from comp.engine.data.exact_duplicates import ImageFiles
from comp.engine.data.folds import HOLDOUT, TRAIN_ONLY, Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Head

SHOWN = 10  # shared images, and groups, that are listed one by one
LISTED = 20  # missing classes that are listed one by one
WIDE = 12  # classes up to which the table has a column for each; with more, only the rarest one
MOMENTS = ("mean", "std", "min", "max")

REMAKE = "make new folds with comp folds --remake"
OTHER_SCHEME = "remove rows from the table, or use another folds.scheme than time"


def audit(samples: Samples, folds: Folds, images: ImageFiles | None = None) -> dict[str, Any]:
    """Returns a report for JSON: one entry per fold, notes as text, and faults as the fields of UserError.

    `images`: files with their content, from exact_duplicates.find_by_bytes (default: paths alone are
    compared).
    """
    k, repeats = int(folds.meta["k"]), int(folds.meta["repeats"])
    group, names = _groups(samples)
    entries = [_fold(samples, folds, group, repeat, fold) for repeat in range(repeats) for fold in range(k)]
    images = exact_duplicates.find_by_path(samples) if images is None else images
    faults = _empty(entries, repeats) + _images_across_folds(samples, folds, images)
    notes = _duplicates_of_scored_rows(samples, folds)
    if images.unread:
        reason = next(iter(images.unread.values()))
        notes.append(f"{len(images.unread)} images cannot be read, so their duplicates are unknown: {reason}")
    if group is not None:
        split_groups = _groups_across_folds(samples, folds, group, names)
        if folds.meta.get("blind_to_groups"):
            notes.append(f"folds.blind_to_groups: {len(split_groups)} groups are in several folds")
        else:
            faults += _split_group_faults(split_groups)
    if folds.meta["gap"] and folds.meta["rule"] != "earlier":
        notes.append(f"folds.gap {folds.meta['gap']:g} has no effect: only folds.scheme time uses it")
    in_groups = group if "group" in folds.meta["scheme"] else None
    for head in samples.heads:
        missing = _missing_classes(samples, folds, head, in_groups)[:LISTED] if head.classes else []
        # Of hundreds of labels some are absent from a fold; an absent class leaves a score undefined.
        if head.task == "multilabel":
            notes += [fault.line for fault in missing]
        else:
            faults += missing
    return {
        "scheme": folds.meta["scheme"],
        "k": k,
        "repeats": repeats,
        "seed": folds.meta["seed"],
        "rule": folds.meta["rule"],
        "gap": folds.meta["gap"],
        "rows": len(samples.positions("train")),
        "holdout_rows": len(folds.holdout_rows()),
        "train_only_rows": int((folds.assignment[0, samples.labeled] != HOLDOUT).sum() - len(folds.oof_rows)),
        "folds": entries,
        "notes": notes,
        "faults": [
            {"code": f.code, "where": f.where, "key": f.key, "what": f.what, "remedy": f.remedy}
            for f in faults
        ],
    }


def errors(report: dict[str, Any]) -> list[UserError]:
    """The faults of a report."""
    return [UserError(**fault) for fault in report["faults"]]


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per fold, then notes and faults."""
    repeats, folds = report["repeats"], report["folds"]
    header = ["fold", "valid", "train"]
    body = [[_name(each, repeats)[5:], each["valid_rows"], each["train_rows"]] for each in folds]
    if "groups" in folds[0]:
        header.append("groups")
        for row, each in zip(body, folds, strict=True):
            row.append(each["groups"])
    targets = folds[0]["targets"]
    narrow = sum(len(first.get("shares", ())) for first in targets.values()) <= WIDE
    for name, first in targets.items():
        prefix = f"{name} " if len(targets) > 1 else ""
        classes = list(first.get("shares", ())) if narrow else []
        header += [f"{prefix}{what}" for what in [*classes, *(["rarest"] if "shares" in first else MOMENTS)]]
        for row, each in zip(body, folds, strict=True):
            target = each["targets"][name]
            row += [f"{100 * target['shares'][name]:.1f}%" for name in classes]
            if "shares" in first:
                row.append(f"{target['rarest']} ({target['rarest_rows']})")
            else:
                row += [f"{target[what]:.4g}" for what in MOMENTS]
    cells = [[str(cell) for cell in row] for row in [header, *body]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, width, strict=True)) for row in cells]
    if report["holdout_rows"]:
        lines.append(f"{report['holdout_rows']} rows are the locked hold-out, read only with --last-look")
    if report["train_only_rows"]:
        lines.append(f"{report['train_only_rows']} rows are trained on and never scored")
    return "\n".join([*lines, *report["notes"], *(f"FAULT {fault.line}" for fault in errors(report))])


# --- one entry per fold -------------------------------------------------------------------------------------


def _fold(samples: Samples, folds: Folds, group: NDArray | None, repeat: int, fold: int) -> dict[str, Any]:
    train_rows = valid_rows = np.zeros(0, np.int64)
    if ((folds.assignment[repeat] == fold) & folds.scorable).any():
        train_rows, valid_rows = folds.split(repeat * int(folds.meta["k"]) + fold)
    entry: dict[str, Any] = {
        "repeat": repeat,
        "fold": fold,
        "valid_rows": len(valid_rows),
        "train_rows": len(train_rows),
    }
    if group is not None:
        entry["groups"] = len(np.unique(group[valid_rows])) if len(valid_rows) else 0
    entry["targets"] = {head.name: _target(samples, head, valid_rows) for head in samples.heads}
    return entry


def _target(samples: Samples, head: Head, valid_rows: Positions) -> dict[str, Any]:
    columns = samples.targets(head)[valid_rows]
    if not head.classes and head.task == "regression":
        if not len(valid_rows):
            return dict.fromkeys(MOMENTS, 0.0)
        return {what: float(getattr(columns, what)()) for what in MOMENTS}
    counts = _class_counts(head, columns)
    names = head.classes or ("0", "1")
    rarest = int(counts.argmin())
    total = max(float(counts.sum()), 1.0)
    return {
        "shares": {name: float(count) / total for name, count in zip(names, counts, strict=True)},
        "rarest": names[rarest],
        "rarest_rows": float(counts[rarest]) if counts[rarest] % 1 else int(counts[rarest]),
    }


def _class_counts(head: Head, columns: NDArray) -> NDArray:
    """Rows of each class; soft labels add their shares."""
    if columns.shape[1] > 1:
        return np.asarray(columns.sum(axis=0))
    if not head.classes:
        return np.array([(1 - columns).sum(), columns.sum()])
    return np.bincount(columns[:, 0].astype(np.int64), minlength=len(head.classes))


def _name(entry: dict[str, Any], repeats: int) -> str:
    return f"fold {entry['fold']}" + (f" of repeat {entry['repeat']}" if repeats > 1 else "")


def _place(fold: int) -> str:
    return {TRAIN_ONLY: "the train-only rows", HOLDOUT: "the hold-out"}.get(fold, f"fold {fold}")


def _empty(entries: list[dict[str, Any]], repeats: int) -> list[UserError]:
    remedy = "lower folds.k, or use another folds.scheme"
    no_valid = [
        UserError("fold-empty", where=_name(each, repeats), what="has no validation rows", remedy=remedy)
        for each in entries
        if not each["valid_rows"]
    ]
    no_train = [
        UserError("fold-untrained", where=_name(each, repeats), what="has no training rows", remedy=remedy)
        for each in entries
        if not each["train_rows"]
    ]
    return no_valid + no_train


# --- images in training and validation rows -----------------------------------------------------------------


class SharedImage(NamedTuple):
    """An image in both the training and the validation rows of a fold, or in a fold and the hold-out."""

    names: list[str]  # its paths
    rows: Positions  # that have it, in order, without test rows
    places: list[str]  # fold 3, the hold-out, the train-only rows


def shared_images(samples: Samples, folds: Folds, images: ImageFiles, image_id: NDArray) -> list[SharedImage]:
    """Images in training and validation rows by Folds.split, hence for every scheme and also for extra and
    pseudo-labeled rows.

    `image_id`: images.by_path or images.by_bytes.
    """
    leaking = np.zeros(0, np.int64)
    holdout = (folds.split("full")[0], folds.holdout_rows())
    for train_rows, valid_rows in [*(folds.split(fold) for fold in _not_empty(folds)), holdout]:
        sides = []
        for rows in (train_rows, valid_rows):
            inside = np.zeros(len(samples.frame), bool)
            inside[rows] = True
            sides.append(image_id[inside[images.sample]])
        leaking = np.union1d(leaking, np.intersect1d(sides[0], sides[1]))
    found = []
    lines = np.flatnonzero(np.isin(image_id, leaking) & np.isin(images.sample, samples.labeled))
    order = lines[np.argsort(image_id[lines], kind="stable")]
    for part in np.split(order, np.flatnonzero(np.diff(image_id[order])) + 1) if len(order) else []:
        rows = np.unique(images.sample[part])
        repeat = next(r for r in folds.assignment if len(np.unique(r[rows])) > 1)
        names = list(dict.fromkeys(images.names[at] for at in images.image[part]))
        found.append(SharedImage(names, rows, [_place(f) for f in np.unique(repeat[rows]).tolist()]))
    return found


def _not_empty(folds: Folds) -> list[int]:
    """Folds with validation rows. The others are reported as separate faults."""
    k = int(folds.meta["k"])
    return [f for f in range(folds.count) if ((folds.assignment[f // k] == f % k) & folds.scorable).any()]


def _images_across_folds(samples: Samples, folds: Folds, images: ImageFiles) -> list[UserError]:
    by_time = folds.meta["rule"] == "earlier"
    by_path = shared_images(samples, folds, images, images.by_path)
    known = {name for each in by_path for name in each.names}
    by_bytes = [
        each
        for each in shared_images(samples, folds, images, images.by_bytes)
        if not known.issuperset(each.names)
    ]
    of_path = OTHER_SCHEME if by_time else REMAKE
    of_bytes = of_path
    if not by_time and folds.meta.get("duplicates") != "group":
        of_bytes = f"set folds.duplicates: group in configs/competition.yaml and {REMAKE}"
    return [
        *_shared_faults(samples, by_path, "the file", of_path),
        *_shared_faults(samples, by_bytes, "the same bytes", of_bytes),
    ]


def _shared_faults(samples: Samples, shared: list[SharedImage], how: str, remedy: str) -> list[UserError]:
    ids = samples.frame["id"].to_numpy(object)
    faults = [
        UserError(
            "image-across-folds",
            where=f"image {', '.join(map(image_key.paths, each.names[:2]))}",
            what=f"{how} of {len(each.rows)} rows ({', '.join(map(str, ids[each.rows[:3]]))}) in "
            + " and ".join(each.places),
            remedy=remedy,
        )
        for each in shared[:SHOWN]
    ]
    if len(shared) > SHOWN:
        what = f"and {len(shared) - SHOWN} more images, each {how} of rows in several folds"
        faults.append(UserError("image-across-folds", what=what, remedy=remedy))
    return faults


def _duplicates_of_scored_rows(samples: Samples, folds: Folds) -> list[str]:
    """Notes on extra and test rows with a fold: they duplicate a row of it, so it does not train on them."""
    source, has_fold = samples.frame["source"].to_numpy(), folds.assignment[0] != TRAIN_ONLY
    texts = {
        "extra": "extra rows share an image with a scored row; its fold is not trained on them",
        "test": "test rows share an image with a training row; its fold does not use their pseudo-labels",
    }
    counts = {kind: int((has_fold & (source == kind)).sum()) for kind in texts}
    notes = [f"{count} {texts[kind]}" for kind, count in counts.items() if count]
    if "group" in folds.frame:
        rows = np.flatnonzero(folds.scorable)
        images = exact_duplicates.find_by_path(samples)
        tied = int(np.isin(rows, exact_duplicates.duplicate_pairs(images, images.by_path)).sum())
        notes += [f"{tied} training rows name an image that another row names"] * (tied > 0)
    return notes


# --- groups and classes -------------------------------------------------------------------------------------


def _groups(samples: Samples) -> tuple[NDArray | None, NDArray]:
    """Group codes of the rows, -1 if a row has none, and the names of the codes."""
    import pandas as pd

    if "group" not in samples.frame:
        return None, np.zeros(0, str)
    codes, names = pd.factorize(samples.frame["group"], sort=True)
    return codes, np.asarray(names, object)


def _groups_across_folds(
    samples: Samples, folds: Folds, group: NDArray, names: NDArray
) -> list[tuple[str, str]]:
    """(group, where): groups in several folds, in a fold and the hold-out, or in a fold and the train-only
    rows. `where` is empty beyond the first SHOWN, which are only counted."""
    rows = samples.labeled[group[samples.labeled] >= 0]
    rows = rows[np.isin(group[rows], group[folds.scorable])]  # other groups are never scored
    codes = group[rows]
    found: dict[str, str] = {}
    for repeat in range(int(folds.meta["repeats"])):
        width = int(folds.meta["k"]) + 2  # with HOLDOUT and TRAIN_ONLY
        pairs = np.unique(codes * width + folds.assignment[repeat, rows] + 2)
        several = np.flatnonzero(np.bincount(pairs // width) > 1)
        for code in several.tolist():
            if str(names[code]) not in found and len(found) < SHOWN:
                places = (pairs[pairs // width == code] % width - 2).tolist()
                found[str(names[code])] = " and ".join(map(_place, places))
            found.setdefault(str(names[code]), "")
    return list(found.items())


def _split_group_faults(split_groups: list[tuple[str, str]]) -> list[UserError]:
    remedy = "use folds.scheme group or stratified_group, or set folds.blind_to_groups: true"
    faults = [
        UserError("group-across-folds", where=f"group {name!r}", what=f"is in {where}", remedy=remedy)
        for name, where in split_groups[:SHOWN]
    ]
    if len(split_groups) > SHOWN:
        what = f"and {len(split_groups) - SHOWN} more groups are in several folds"
        faults.append(UserError("group-across-folds", what=what, remedy=remedy))
    return faults


def _missing_classes(samples: Samples, folds: Folds, head: Head, group: NDArray | None) -> list[UserError]:
    """Classes with at least k rows (or groups) that are absent from a fold: the score is undefined there."""
    k, width, repeats = int(folds.meta["k"]), len(head.classes), int(folds.meta["repeats"])
    columns, faults = samples.targets(head), []
    for repeat in range(repeats):
        fold = folds.assignment[repeat]
        scored = np.flatnonzero((fold >= 0) & folds.scorable)
        if columns.shape[1] == 1:
            row, code = scored, columns[scored, 0].astype(np.int64)
        else:
            row, code = np.nonzero(columns[scored] > 0)
            row = scored[row]
        present = np.bincount(fold[row] * width + code, minlength=k * width).reshape(k, width)
        if group is None:
            count = np.bincount(code, minlength=width)
        else:
            count = np.bincount(np.unique(group[row] * width + code) % width, minlength=width)
        for class_ in np.flatnonzero((count >= k) & (present == 0).any(axis=0)).tolist():
            absent = ", ".join(str(f) for f in np.flatnonzero(present[:, class_] == 0))
            what = (
                f"class {head.classes[class_]!r} has {count[class_]} {'rows' if group is None else 'groups'}"
            )
            of_repeat = f" of repeat {repeat}" if repeats > 1 else ""
            faults.append(
                UserError(
                    "class-missing",
                    where=f"fold {absent}{of_repeat}",
                    key=head.name,
                    what=f"{what}, but none in this fold",
                    remedy=_other_scheme(folds),
                )
            )
    return faults


def _other_scheme(folds: Folds) -> str:
    remedies = {
        "time": "change folds.k, which moves the blocks of time",
        "group": "use folds.scheme: stratified_group",
        "stratified_group": "try another folds.seed",
    }
    return remedies.get(folds.meta["scheme"], "use folds.scheme: stratified")
