"""comp bank: all predictions with their scores; one of them as csv."""

from __future__ import annotations

import csv as csv_format
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import bank as banked
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble import member_filter
from comp.engine.errors import UserError
from comp.engine.extras import run_status
from comp.engine.extras.run_status import Record
from comp.engine.store import artifacts

HEADING = ["member", "has", "CV", "OOF", "size", "like best", "made from"]


def bank(csv: str | None = None, filters: Sequence[str] = ()) -> None:
    """`filters`: conditions that must all hold, like score>0.9 model~convnext."""
    rows = samples.load()
    split = folds.load(rows)
    if csv is not None:
        _print_csv(csv, rows, split)
        return
    addresses = banked.members()
    if not addresses:
        print("no predictions yet\nnext: comp train exp001")
        return
    if filters:
        known, addresses = addresses, member_filter.matching(" ".join(filters), addresses)
        if not addresses:
            raise UserError(
                "filter-without-match",
                where=" ".join(filters),
                what=f"no predictions match; there are {', '.join(known)}",
            )
    oof: dict[str, NDArray[np.float64]] = {}
    errors: dict[str, str] = {}
    for address in addresses:
        try:
            oof |= {address: _flat(address, rows, split)} if _has(address, "oof") else {}
        except UserError as error:
            errors[address] = f"error: {error}"
    records = {address: run_status.read_record(banked.folder(address)) for address in addresses}
    best = _best(records, oof)
    lines = []
    for address in addresses:
        files = [banked.folder(address) / f"{kind}.arrow" for kind in banked.KINDS if _has(address, kind)]
        size = artifacts.format_size(sum(file.stat().st_size for file in files))
        like_best = f"{_correlation(oof[address], oof[best]):.3f}" if best and address in oof else "-"
        kinds = "+".join(file.stem for file in files)
        made_from = errors.get(address) or _made_from(files[0], records[address])
        lines.append([address, kinds, *run_status.score_cells(records[address]), size, like_best, made_from])
    print(text_table.cut_to_terminal(text_table.render(HEADING, lines, ["OOF", "size", "like best"])))
    if best:
        print(f"best: {best}; like best: correlation of OOF predictions with it; low values help a blend")
    print(
        "next: comp bank --csv NAME prints one; comp ensemble NAME blends what configs/ensembles/NAME.yaml "
        "lists"
    )


def _best(records: dict[str, Record | None], oof: dict[str, NDArray[np.float64]]) -> str | None:
    scored = {a: r for a, r in records.items() if r and r["oof"] is not None and a in oof}
    sign = {"max": 1, "min": -1}
    return max(scored, key=lambda a: sign[scored[a]["direction"]] * scored[a]["oof"], default=None)


def _has(address: str, kind: str) -> bool:
    return artifacts.manifest_entry(banked.folder(address) / f"{kind}.arrow") is not None


def _flat(address: str, rows: Samples, split: Folds) -> NDArray[np.float64]:
    predictions = banked.load(address, "oof", rows, split)
    return np.concatenate([predictions.probability(head).ravel() for head in rows.heads])


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = ~np.isnan(a) & ~np.isnan(b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(a[both], b[both])[0, 1])


def _made_from(file: Path, record: Record | None) -> str:
    """`mean of exp001, exp002` or `5 checkpoints, identity+hflip`"""
    meta = banked.read_meta(file)
    if "members" in meta:
        method = record["method"] if record else "blend"
        return f"{method} of {', '.join(meta['members'])}"
    views = "+".join(meta.get("tta") or ["identity"])
    return f"{len(meta['weights'])} checkpoints, {views}"


def _print_csv(address: str, rows: Samples, split: Folds) -> None:
    """Probabilities or values, one line per row, for spreadsheets."""
    many = len(rows.heads) > 1
    outputs = [f"{head.name}.{name}" if many else name for head in rows.heads for name in head.outputs]
    writer = csv_format.writer(sys.stdout, lineterminator="\n")
    ids = rows.frame["id"].to_numpy()
    for i, kind in enumerate(kind for kind in banked.KINDS if _has(address, kind) or kind == "test"):
        stored = banked.load(address, kind, rows, split)
        if i == 0:
            writer.writerow(["id", "kind", "fold", *outputs])
        values = np.concatenate([stored.probability(head) for head in rows.heads], axis=1)
        fold = [""] * len(stored.row) if stored.fold is None else stored.fold.tolist()
        for id_, of_fold, line in zip(ids[stored.row], fold, values.tolist(), strict=True):
            writer.writerow([id_, kind, of_fold, *map(repr, line)])
