"""For comp audit: whose labels taught a run. Where they came from is written beside them; the labels themselves are made again from
the predictions that they should be from, which needs no network.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from comp.engine.config.schema import Config
from comp.engine.data import exact_duplicates
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import Refused, UserError
from comp.engine.extras import pseudo_labels
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.run import pseudo_rows, teachers
from comp.engine.store import artifacts, paths

SAW = "pseudo-labels that saw the fold"


def refuse_other_labels(run: str, cfg: Config, split: Folds) -> None:
    """Nothing that comes from the pseudo-labels of a run can be made again from others."""
    if cfg.data.pseudo is None:
        return
    file = paths.pseudo_file(cfg.data.pseudo)
    entry = artifacts.manifest_entry(file)
    then = artifacts.read_json(artifacts.verified(paths.run_folder(run) / "made_of.json"))["pseudo"]
    if entry is None or entry["sha256"] != then or entry["folds"] != split.hash:
        raise Refused(f"{paths.relative(file)} is not there as it taught it")
    artifacts.verified(file)


def leaks(run: str, cfg: Config, rows: Samples, split: Folds) -> list[Finding]:
    name = cfg.data.pseudo
    if name is None:
        return []
    file = paths.pseudo_file(name)
    try:
        refuse_other_labels(run, cfg, split)
    except UserError as refused:
        return [NotChecked(f"{run}, its pseudo-labels", refused.lines[0])]
    entry, table = artifacts.manifest_entry(file) or {}, pseudo_rows.read(name)
    found: list[Finding] = [*_copies(run, cfg, table, name, rows, split)]
    for number, weights in entry["weights"].items():
        if wrong := [each for each in weights if Path(each).name != f"fold{number}"]:
            found.append(Leak(SAW, f"{run}: fold {number} is taught by {', '.join(wrong)}", "provenance"))
    try:
        again = _again(entry, rows, split)
    except UserError as refused:
        why = f"{paths.relative(file)} cannot be made again: {refused.lines[0]}"
        return [*found, NotChecked(f"{run}, its pseudo-labels", why)]
    by_all = again[again["fold"] == pseudo_rows.FULL]
    for number in range(split.count):
        mine, wanted = (each[each["fold"] == number] for each in (table, again))
        if _same(mine, wanted):
            continue
        others = {f"of fold {n}": again[again["fold"] == n] for n in range(split.count) if n != number}
        guilty = next(
            (who for who, each in {"of all folds": by_all, **others}.items() if _same(mine, each)), None
        )
        where = f"{run}: {paths.relative(file)}, fold {number}"
        if guilty is None:
            found.append(Leak("pseudo-labels that their models do not repeat", where, "recomputation"))
        else:
            found.append(Leak(SAW, f"{where}: they are those {guilty}", "recomputation"))
    return found


def _copies(
    run: str, cfg: Config, table: pd.DataFrame, name: str, rows: Samples, split: Folds
) -> list[Finding]:
    """Pseudo-labelled test rows whose files have the bytes of rows that their fold scores."""
    images = exact_duplicates.find_by_bytes(cfg, rows)
    found: list[Finding] = []
    for number in range(split.count):
        joined = pseudo_rows.add_rows(rows, table, name, number)
        taught, scored = replace(split, samples=joined).split(number)
        test = taught[(rows.frame["source"].to_numpy()[taught] == "test")]
        code = [images.by_bytes[np.isin(images.sample, side)] for side in (test, scored)]
        if len(both := np.intersect1d(code[0], code[1])):
            where = f"{run}: {len(both)} images that fold {number} scores are among its pseudo-labels"
            found.append(Leak("duplicates across folds", where, "hash"))
    return found


def _again(entry: dict[str, object], rows: Samples, split: Folds) -> pd.DataFrame:
    wish = pseudo_labels.Wish(**entry["wish"])  # type: ignore[arg-type]
    who = teachers.load(str(entry["source"]), split, "comp audit")
    numbers: list[int | str] = [*range(split.count), "full"]
    return pd.concat(
        [
            pseudo_labels.lines(pseudo_labels.of_fold(who, n, rows, split, wish), n, rows, wish)
            for n in numbers
        ],
        ignore_index=True,
    )


def _same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    said = [each for each in map(str, one) if each.startswith(("target.", "soft.", "confidence"))]
    return (
        len(one) == len(other)
        and one["id"].tolist() == other["id"].tolist()
        and bool(np.allclose(one[said], other[said], atol=1e-6))
    )
