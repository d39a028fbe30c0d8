"""What the folds really hold. A pure function of samples and folds, so that every run can log it beside its scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.data import exact_duplicates, image_key
from comp.engine.data.exact_duplicates import ImageFiles
from comp.engine.data.folds import HOLDOUT, TRAIN_ONLY, Folds
from comp.engine.data.samples import Positions, Samples
from comp.engine.tasks.kinds import Head

SHOWN = 10  # images on both sides of a fold, and groups, that are told one by one
LISTED = 20  # missing classes that are told one by one
WIDE = 12  # classes that a table shows one by one; above, the rarest only
MOMENTS = ("mean", "std", "min", "max")


def audit(samples: Samples, folds: Folds, images: ImageFiles | None = None) -> dict[str, Any]:
    """Plain numbers, for JSON: one entry a fold, and `faults`: one line for each thing that makes scores worthless. Without
    `images`, which say what files hold, images are the same by their path alone."""
    k, repeats = int(folds.meta["k"]), int(folds.meta["repeats"])
    group, names = _groups(samples)
    lines = [_fold(samples, folds, group, repeat, number) for repeat in range(repeats) for number in range(k)]
    report: dict[str, Any] = {
        "scheme": folds.meta["scheme"],
        "k": k,
        "repeats": repeats,
        "seed": folds.meta["seed"],
        "rule": folds.meta["rule"],
        "gap": folds.meta["gap"],
        "rows": len(samples.positions("train")),
        "locked": len(folds.holdout_rows()),
        "taught_only": int((folds.assignment[0, samples.labeled] != HOLDOUT).sum() - len(folds.oof_rows)),
        "folds": lines,
        "notes": [],
        "faults": [f"{_name(line, repeats)} is empty" for line in lines if not line["rows"]],
    }
    report["faults"] += [
        f"{_name(line, repeats)}: nothing may teach it" for line in lines if not line["taught"]
    ]
    images = exact_duplicates.find_by_path(samples) if images is None else images
    report["faults"] += _images_on_both_sides(samples, folds, images)
    report["notes"] += _kept_out(samples, folds)
    if images.unread:
        report["notes"].append(
            f"{len(images.unread)} images cannot be read, so copies of them are not known: {next(iter(images.unread.values()))}"
        )
    if group is not None:
        crossing = _crossing(samples, folds, group, names)
        if folds.meta.get("blind_to_groups"):
            report["notes"] += [f"blind to groups on purpose: {len(crossing)} groups stand in several folds"]
        else:
            report["faults"] += [f"group {name!r} stands in {text}" for name, text in crossing[:SHOWN]]
            if len(crossing) > SHOWN:
                report["faults"].append(f"and {len(crossing) - SHOWN} more groups stand in several folds")
    if folds.meta["gap"] and folds.meta["rule"] != "earlier":
        report["notes"].append(
            f"folds.gap {folds.meta['gap']:g} has no effect: only the time scheme knows it"
        )
    grouped = group if "group" in folds.meta["scheme"] else None
    for head in samples.heads:
        if head.classes:
            # Of hundreds of labels some stay away from a fold; of classes that is a mistake.
            kind = "notes" if head.task == "multilabel" else "faults"
            report[kind] += _missing_classes(samples, folds, head, grouped)[:LISTED]
    return report


class Shared(NamedTuple):
    """An image that a fold, or the hold-out, both trains and scores."""

    names: list[str]  # its paths
    rows: Positions  # that have it, in order, but for test rows
    places: list[str]  # where they stand: fold 3, the hold-out, the rows never scored


def shared_images(samples: Samples, folds: Folds, images: ImageFiles, code: NDArray) -> list[Shared]:
    """By the rule of the split itself, so under any scheme, and with extra and pseudo-labelled rows. `code`: images.by_path or
    images.by_bytes."""
    guilty = np.zeros(0, np.int64)
    everyone = folds.split("full")[0]
    for taught, scored in [*(folds.split(fold) for fold in _filled(folds)), (everyone, folds.holdout_rows())]:
        sides = []
        for rows in (taught, scored):
            inside = np.zeros(len(samples.frame), bool)
            inside[rows] = True
            sides.append(code[inside[images.sample]])
        guilty = np.union1d(guilty, np.intersect1d(sides[0], sides[1]))
    found = []
    mine = np.flatnonzero(np.isin(code, guilty) & np.isin(images.sample, samples.labeled))
    order = mine[np.argsort(code[mine], kind="stable")]
    for lines in np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(order) else []:
        rows = np.unique(images.sample[lines])
        repeat = next(r for r in folds.assignment if len(np.unique(r[rows])) > 1)
        names = list(dict.fromkeys(images.names[at] for at in images.image[lines]))
        found.append(Shared(names, rows, [_place(f) for f in np.unique(repeat[rows]).tolist()]))
    return found


def _filled(folds: Folds) -> list[int]:
    """Folds with rows: what the others are is told as a fault by itself."""
    k = int(folds.meta["k"])
    return [f for f in range(folds.count) if ((folds.assignment[f // k] == f % k) & folds.scorable).any()]


def _place(fold: int) -> str:
    return {TRAIN_ONLY: "the rows never scored", HOLDOUT: "the hold-out"}.get(fold, f"fold {fold}")


def _images_on_both_sides(samples: Samples, folds: Folds, images: ImageFiles) -> list[str]:
    if folds.meta["rule"] == "earlier":
        remedy = "a split by time cannot keep them together: take rows out of the table, or use another folds.scheme"
    elif folds.meta.get("duplicates") == "group":
        remedy = "comp folds --remake keeps them together"
    else:
        remedy = "folds.duplicates: group in configs/competition.yaml, then comp folds --remake, keeps them together"
    ids = samples.frame["id"].to_numpy(object)

    def told(shared: list[Shared], how: str, remedy: str) -> list[str]:
        lines = [
            f"image {', '.join(map(image_key.paths, each.names[:2]))}: {how} of {len(each.rows)} rows ({', '.join(map(str, ids[each.rows[:3]]))}) in "
            f"{' and '.join(each.places)}; {remedy}"
            for each in shared[:SHOWN]
        ]
        more = len(shared) - SHOWN
        return lines + [f"and {more} more images, each {how} of rows on both sides of a fold"] * (more > 0)

    by_path = shared_images(samples, folds, images, images.by_path)
    known = {name for each in by_path for name in each.names}
    by_bytes = [
        each
        for each in shared_images(samples, folds, images, images.by_bytes)
        if not known.issuperset(each.names)
    ]
    anyway = remedy if folds.meta["rule"] == "earlier" else "comp folds --remake keeps them together"
    return [*told(by_path, "the file", anyway), *told(by_bytes, "the same bytes", remedy)]


def _kept_out(samples: Samples, folds: Folds) -> list[str]:
    """What the column `fold` says of rows that are not scored."""
    source, here = samples.frame["source"].to_numpy(), folds.assignment[0] != TRAIN_ONLY
    says = {
        "extra": "extra rows share an image with a scored row, and do not train the fold that scores it",
        "test": "test rows share an image with a training row; with pseudo-labels they do not train the fold that scores it",
    }
    counts = {kind: int((here & (source == kind)).sum()) for kind in says}
    notes = [f"{count} {says[kind]}" for kind, count in counts.items() if count]
    if "unit" in folds.frame:
        own = np.flatnonzero(folds.scorable)
        images = exact_duplicates.find_by_path(samples)
        tied = int(np.isin(own, exact_duplicates.duplicate_pairs(images, images.by_path)).sum())
        notes += [f"{tied} training rows name an image that another row names"] * (tied > 0)
    return notes


def table(report: dict[str, Any]) -> str:
    """The audit as text: a line a fold."""
    repeats = report["repeats"]
    header, body = (
        ["fold", "rows", "taught"],
        [[_name(f, repeats)[5:], f["rows"], f["taught"]] for f in report["folds"]],
    )
    if "groups" in report["folds"][0]:
        header.append("groups")
        for row, line in zip(body, report["folds"], strict=True):
            row.append(line["groups"])
    targets = report["folds"][0]["targets"]
    narrow = sum(len(first.get("shares", ())) for first in targets.values()) <= WIDE
    for name, first in targets.items():
        prefix = f"{name} " if len(targets) > 1 else ""
        classes = list(first.get("shares", ())) if narrow else []
        header += [f"{prefix}{what}" for what in [*classes, *(["rarest"] if "shares" in first else MOMENTS)]]
        for row, line in zip(body, report["folds"], strict=True):
            target = line["targets"][name]
            row += [f"{100 * target['shares'][name]:.1f}%" for name in classes]
            if "shares" in first:
                row.append(f"{target['rarest']} ({target['rarest_rows']})")
            else:
                row += [f"{target[what]:.4g}" for what in MOMENTS]
    cells = [[str(cell) for cell in row] for row in [header, *body]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, width, strict=True)) for row in cells]
    if report["locked"]:
        lines.append(f"{report['locked']} rows are locked away: no verb reads them but an explicit last look")
    if report["taught_only"]:
        lines.append(f"{report['taught_only']} rows teach and are never scored")
    return "\n".join([*lines, *report["notes"], *(f"FAULT {fault}" for fault in report["faults"])])


def _fold(samples: Samples, folds: Folds, group: NDArray | None, repeat: int, number: int) -> dict[str, Any]:
    taught = scored = np.zeros(0, np.int64)
    if ((folds.assignment[repeat] == number) & folds.scorable).any():
        taught, scored = folds.split(repeat * int(folds.meta["k"]) + number)
    line: dict[str, Any] = {"repeat": repeat, "fold": number, "rows": len(scored), "taught": len(taught)}
    if group is not None:
        line["groups"] = len(np.unique(group[scored])) if len(scored) else 0
    line["targets"] = {head.name: _target(samples, head, scored) for head in samples.heads}
    return line


def _target(samples: Samples, head: Head, scored: NDArray) -> dict[str, Any]:
    columns = samples.targets(head)[scored]
    if not head.classes and head.task == "regression":
        if not len(scored):
            return dict.fromkeys(MOMENTS, 0.0)
        return {what: float(getattr(columns, what)()) for what in MOMENTS}
    counts = _counts(head, columns)
    names = head.classes or ("0", "1")
    rarest = int(counts.argmin())
    total = max(float(counts.sum()), 1.0)
    return {
        "shares": {name: float(count) / total for name, count in zip(names, counts, strict=True)},
        "rarest": names[rarest],
        "rarest_rows": float(counts[rarest]) if counts[rarest] % 1 else int(counts[rarest]),
    }


def _counts(head: Head, columns: NDArray) -> NDArray:
    """Rows of each class; soft labels add up their shares."""
    if columns.shape[1] > 1:
        return np.asarray(columns.sum(axis=0))
    if not head.classes:
        return np.array([(1 - columns).sum(), columns.sum()])
    return np.bincount(columns[:, 0].astype(np.int64), minlength=len(head.classes))


def _groups(samples: Samples) -> tuple[NDArray | None, NDArray]:
    """Codes, -1 where a row has none, and what they stand for."""
    import pandas as pd

    if "group" not in samples.frame:
        return None, np.zeros(0, str)
    codes, names = pd.factorize(samples.frame["group"], sort=True)
    return codes, np.asarray(names, object)


def _crossing(samples: Samples, folds: Folds, group: NDArray, names: NDArray) -> list[tuple[str, str]]:
    """Groups on both sides: in several folds, in a fold and the hold-out, or in a fold and among rows that always teach."""
    taught = samples.labeled[group[samples.labeled] >= 0]
    taught = taught[np.isin(group[taught], group[folds.scorable])]  # others are never scored
    codes = group[taught]
    found: dict[str, str] = {}
    for repeat in range(int(folds.meta["repeats"])):
        wide = int(folds.meta["k"]) + 2  # with LOCKED and TAUGHT_ONLY
        pairs = np.unique(codes * wide + folds.assignment[repeat, taught] + 2)
        several = np.flatnonzero(np.bincount(pairs // wide) > 1)
        for code in several.tolist():
            if str(names[code]) not in found and len(found) < SHOWN:  # more are counted, not told
                mine = (pairs[pairs // wide == code] % wide - 2).tolist()
                special = {TRAIN_ONLY: "the rows never scored", HOLDOUT: "the hold-out"}
                found[str(names[code])] = " and ".join(special.get(f, f"fold {f}") for f in mine)
            found.setdefault(str(names[code]), "")
    return list(found.items())


def _missing_classes(samples: Samples, folds: Folds, head: Head, group: NDArray | None) -> list[str]:
    """A class that could be in every fold and is not: its score would be undefined there."""
    k, width, faults = int(folds.meta["k"]), len(head.classes), []
    columns = samples.targets(head)
    for repeat in range(int(folds.meta["repeats"])):
        fold = folds.assignment[repeat]
        scored = np.flatnonzero((fold >= 0) & folds.scorable)
        if columns.shape[1] == 1:
            row, code = scored, columns[scored, 0].astype(np.int64)
        else:
            row, code = np.nonzero(columns[scored] > 0)
            row = scored[row]
        there = np.bincount(fold[row] * width + code, minlength=k * width).reshape(k, width)
        if group is None:
            chances = np.bincount(code, minlength=width)
        else:
            chances = np.bincount(np.unique(group[row] * width + code) % width, minlength=width)
        for class_ in np.flatnonzero((chances >= k) & (there == 0).any(axis=0)).tolist():
            absent = ", ".join(str(f) for f in np.flatnonzero(there[:, class_] == 0))
            what = f"{chances[class_]} {'rows' if group is None else 'groups'}"
            where = f"fold {absent}" + (f" of repeat {repeat}" if folds.meta["repeats"] > 1 else "")
            faults.append(
                f"{head.name}: class {head.classes[class_]!r} has {what} and none in {where}; {_remedy(folds)}"
            )
    return faults


def _remedy(folds: Folds) -> str:
    scheme = folds.meta["scheme"]
    known = {
        "time": "other blocks of time: folds.k",
        "group": "use stratified_group",
        "stratified_group": "try another folds.seed",
    }
    return known.get(scheme, "use stratified")


def _name(line: dict[str, Any], repeats: int) -> str:
    return f"fold {line['fold']}" + (f" of repeat {line['repeat']}" if repeats > 1 else "")
