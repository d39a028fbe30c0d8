"""What the folds really hold. A pure function of samples and folds, so that every run can log it beside its scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.folds import LOCKED, TAUGHT_ONLY, Folds
from comp.samples import Samples
from comp.tasks import Head

LISTED = 20  # missing classes that are told one by one
WIDE = 12  # classes that a table shows one by one; above, the rarest only
MOMENTS = ("mean", "std", "min", "max")


def audit(samples: Samples, folds: Folds) -> dict[str, Any]:
    """Plain numbers, for JSON: one entry a fold, and `faults`: one line for each thing that makes scores worthless."""
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
        "locked": int((folds.of_sample[0, samples.taught] == LOCKED).sum()),
        "taught_only": int((folds.of_sample[0, samples.taught] == TAUGHT_ONLY).sum()),
        "folds": lines,
        "notes": [],
        "faults": [f"{_name(line, repeats)} is empty" for line in lines if not line["rows"]],
    }
    report["faults"] += [
        f"{_name(line, repeats)}: nothing may teach it" for line in lines if not line["taught"]
    ]
    if group is not None:
        crossing = _crossing(samples, folds, group, names)
        if folds.meta.get("blind_to_groups"):
            report["notes"] += [f"blind to groups on purpose: {len(crossing)} groups stand in several folds"]
        else:
            report["faults"] += [f"group {name!r} stands in {text}" for name, text in crossing[:10]]
            if len(crossing) > 10:
                report["faults"].append(f"and {len(crossing) - 10} more groups stand in several folds")
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
    if (folds.of_sample[repeat] == number).any():
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
    taught = samples.taught[group[samples.taught] >= 0]
    codes = group[taught]
    found: dict[str, str] = {}
    for repeat in range(int(folds.meta["repeats"])):
        wide = int(folds.meta["k"]) + 2  # with LOCKED and TAUGHT_ONLY
        pairs = np.unique(codes * wide + folds.of_sample[repeat, taught] + 2)
        several = np.flatnonzero(np.bincount(pairs // wide) > 1)
        for code in several.tolist():
            if str(names[code]) not in found and len(found) < 10:  # more are counted, not told
                mine = (pairs[pairs // wide == code] % wide - 2).tolist()
                special = {TAUGHT_ONLY: "the rows never scored", LOCKED: "the hold-out"}
                found[str(names[code])] = " and ".join(special.get(f, f"fold {f}") for f in mine)
            found.setdefault(str(names[code]), "")
    return list(found.items())


def _missing_classes(samples: Samples, folds: Folds, head: Head, group: NDArray | None) -> list[str]:
    """A class that could be in every fold and is not: its score would be undefined there."""
    k, width, faults = int(folds.meta["k"]), len(head.classes), []
    columns = samples.targets(head)
    for repeat in range(int(folds.meta["repeats"])):
        fold = folds.of_sample[repeat]
        scored = np.flatnonzero(fold >= 0)
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
