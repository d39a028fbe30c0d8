"""Thousands of damaged and unusual files: each has the right pixels, or a reason."""

from __future__ import annotations

from pathlib import Path

import cv2
import mutated
import numpy as np
import pytest
from conftest import config

from comp.engine.extras import check
from comp.engine.readers import decode
from comp.engine.readers.arrays import DamagedImage


def independent(data: bytes) -> np.ndarray | None:
    """By OpenCV; the project decodes with Pillow and simplejpeg. (height, width, RGB)"""
    try:
        made = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if made is None else made[:, :, ::-1]


def far(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference in grey levels; decoders differ by rounding alone."""
    return float(np.abs(a.astype(int) - b).mean()) if a.shape == b.shape else np.inf


def laid_out(project: Path, count: int) -> dict[str, mutated.File]:
    files = {}
    raw = project / "data" / "raw"
    for number in range(count):
        file = mutated.KINDS[number % len(mutated.KINDS)](number // len(mutated.KINDS))
        kind = mutated.KINDS[number % len(mutated.KINDS)].__name__
        name = f"{kind}{number}.{file.suffix}"
        files[name] = file
        (raw / "train").mkdir(parents=True, exist_ok=True)
        (raw / "train" / name).write_bytes(file.data)
    (raw / "train.csv").write_text(
        "id,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(files))
    )
    some = next(name for name, file in files.items() if file.bad is False)
    (raw / "test").mkdir()
    (raw / "test" / some).write_bytes(files[some].data)
    (raw / "test.csv").write_text(f"id\n{some}\n")
    (raw / "sample_submission.csv").write_text(f"id,label\n{some},0\n")
    declared = (project / "configs" / "competition.yaml").read_text()
    declared = (
        declared.replace("{id}.png", "{id}").replace("group: writer\n", "").replace("metadata: [pen]\n", "")
    )
    (project / "configs" / "competition.yaml").write_text(declared.replace("stratified_group", "stratified"))
    return files


def through_check(project: Path, count: int) -> None:
    files = laid_out(project, count)
    lines = {name: i for i, name in enumerate(files, 2)}
    named = {}
    for fault in check.run(config(experiment="base")):
        where, _, reason = fault.line.partition(": image train/")
        name, _, reason = reason.partition(": ")
        named[name] = reason
        assert where == f"data/raw/train.csv:{lines[name]}" and reason
    for name, file in files.items():
        if file.bad is not None:
            assert (name in named) == file.bad, f"{name}: {named.get(name, 'was taken for whole')}"
        if name in named:
            continue
        pixels, other = decode.decode(file.data, None, "stretch", 3, name), independent(file.data)
        if file.bad is None and other is None:
            continue
        assert other is not None and far(pixels, other) < 2.0, f"{name}: other pixels than OpenCV's"
    for name in named:
        with pytest.raises(DamagedImage):
            decode.decode(files[name].data, 32, "cover", 1, name)


def test_140_mutated_files(empty: Path) -> None:
    through_check(empty, 140)


@pytest.mark.slow
def test_2000_mutated_files(empty: Path) -> None:
    through_check(empty, 2000)
