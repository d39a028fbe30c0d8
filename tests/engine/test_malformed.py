"""Malformed tables and samples by the hundred: one line each, with file and row, and exit 2."""

from __future__ import annotations

from pathlib import Path

import cv2
import malformed
import numpy as np
import pytest

from comp.engine import cli

DECLARED = """
slug: tables
title: Tables
raw: data/raw
train: {table: train.csv, image: "{id}.png"}
test: {table: test.csv, image: "{id}.png"}
id: id
target: label
task: binary
classes: [cat, dog]
metric: roc_auc
group: writer
weight: quality
metadata: [pen]
folds: {scheme: group, k: 2, seed: 0}
submission: {sample: sample_submission.csv, form: label}
"""


def laid_out(root: Path) -> Path:
    raw = root / "data" / "raw"
    raw.mkdir(parents=True)
    image = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for name, rows in malformed.TABLES.items():
        (raw / name).write_bytes(malformed.text(rows))
        if name != "sample_submission.csv":
            for row in rows[1:]:
                (raw / f"{row[0]}.png").write_bytes(image)
    (root / "configs" / "competition.yaml").write_text(DECLARED)
    return raw


def each_is_one_line(root: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    raw = laid_out(root)
    assert cli.main(["check"]) == 0
    capsys.readouterr()
    for number in range(count):
        kind = malformed.KINDS[number % len(malformed.KINDS)]
        broken = kind(number // len(malformed.KINDS))
        file = raw / broken.file
        before = file.read_bytes() if file.exists() else None
        if before is None:  # another kind of table
            declared = DECLARED.replace("train.csv", broken.file)
            (root / "configs" / "competition.yaml").write_text(declared)
        file.write_bytes(broken.data) if broken.data is not None else file.unlink()
        # prepare and check read tables alike, so two of each kind suffice. It reads no images and no sample.
        both = number < 2 * len(malformed.KINDS) and "sample" not in broken.file
        for verb in ("check", "prepare") if both and kind is not malformed.image_absent else ("check",):
            status = cli.main([verb])
            out, err = capsys.readouterr()
            lines = [
                line
                for line in (out + err).splitlines()
                if "configs/competition.yaml:" in line or "data/raw/" in line
            ]
            report = f"{kind.__name__} {number}: comp {verb} prints {lines} and exits {status}"
            assert status == 2 and len(lines) == 1, report
            assert broken.where in lines[0] and broken.why in lines[0], report
        (root / "configs" / "competition.yaml").write_text(DECLARED)
        file.write_bytes(before) if before is not None else file.unlink()


def test_every_kind_of_malformed_table(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each_is_one_line(empty, 2 * len(malformed.KINDS), capsys)


@pytest.mark.slow
def test_500_malformed_tables(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each_is_one_line(empty, 500, capsys)
