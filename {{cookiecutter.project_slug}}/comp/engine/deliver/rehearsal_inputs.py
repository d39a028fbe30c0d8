"""The competition's folder as a kernel finds it, laid out for a rehearsal: the visible test set, or a made-up
hidden one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine import pages
from comp.engine.config.competition_schema import Competition
from comp.engine.data import raw_tables
from comp.engine.data.sample_submission import id_column_candidates, read_sample
from comp.engine.deliver import bundle, validate
from comp.engine.store import artifacts, paths

ROWS = 512  # of the visible test set that are predicted, and at most of a hidden one


def lay_out(competition: Competition, target: Path, hidden: bool, linked: bool = False) -> None:
    """Tables, the sample submission and test images; no training images. `linked`: with hard links, possible
    only if nothing can write to `target`, since data/raw must not change.

    The hidden set has another size, new ids, one missing and one truncated image.
    """
    raw = paths.path(competition.raw)
    if competition.test.table is None or not competition.test.image or not _is_plain(competition, raw):
        # Other rows cannot be made up, so the kernel gets all files with their own ids.
        if not linked:
            artifacts.require_space(
                sum(f.stat().st_size for f in raw.rglob("*") if f.is_file()), "the rehearsal"
            )
        shutil.copytree(raw, target, copy_function=bundle.link if linked else shutil.copy2)
        return
    target.mkdir(parents=True)
    for file in raw.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    source = raw_tables.read(raw / competition.test.table)
    old = _chosen_rows(source.frame, hidden)
    id_column = competition.test.id or competition.id
    ids = [f"hidden{i:06d}" for i in range(len(old))] if hidden else old[id_column].tolist()
    new = old.assign(**{id_column: ids})
    for template in competition.test.image:
        old_paths = raw_tables.expand_template(replace(source, frame=old), template)
        new_paths = raw_tables.expand_template(replace(source, frame=new), template)
        for i, (old_path, new_path) in enumerate(zip(old_paths, new_paths, strict=True)):
            damage = i if hidden and new_path != old_path and i < 2 else None
            _copy_image(raw / old_path, target / new_path, damage)
    if competition.test.table != competition.submission.sample:
        _write_table(target / competition.test.table, new)
    _write_sample(competition, raw, target, ids)


def link_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=bundle.link)


def _chosen_rows(frame: Any, hidden: bool) -> Any:
    """A hidden set gets another size than at home, and no power of two, so that code which assumes a number
    of rows fails."""
    count = min(round(1.3 * len(frame)) + 3, ROWS + 1) if hidden else min(len(frame), ROWS)
    repeated = np.arange(count) % len(frame)
    spread = np.linspace(0, len(frame) - 1, count).round().astype(int)
    return frame.iloc[repeated if hidden else spread].reset_index(drop=True)


def _copy_image(source: Path, target: Path, damage: int | None) -> None:
    """damage 0: missing, 1: truncated."""
    target.parent.mkdir(parents=True, exist_ok=True)
    data = source.read_bytes() if source.is_file() else b""
    if damage is not None:
        data = data[: len(data) // 2] if damage else b""
    if data:
        target.write_bytes(data)


def _write_sample(competition: Competition, raw: Path, target: Path, ids: list[str]) -> None:
    sample = read_sample(raw / competition.submission.sample, *id_column_candidates(competition))
    lines = [list(sample.rows[0]) for _ in ids]
    for number, (line, id_) in enumerate(zip(lines, ids, strict=True)):
        line[sample.id_position] = id_
        for place in sample.index:
            line[place] = str(number)
    file = target / competition.submission.sample
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(validate.csv_line(line, sample.delimiter) for line in [list(sample.columns), *lines])
    )


def _is_plain(competition: Competition, raw: Path) -> bool:
    """Whether test rows are lines of a table whose ids name their image files, and lines of the sample."""
    templates = competition.test.image or []
    if (
        pages.get("read_samples")
        or competition.gather
        or any("*" in template for template in templates)
        or competition.submission.rows
    ):
        return False
    source = raw_tables.read(raw / str(competition.test.table))
    few = replace(source, frame=source.frame.head(20))
    # Not if images are inside an archive, or one path names several channels: there is no file that could be
    # truncated.
    return all(
        any((raw / path).is_file() for path in raw_tables.expand_template(few, each)) for each in templates
    )


def _write_table(file: Path, frame: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".parquet", ".pq"):
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
