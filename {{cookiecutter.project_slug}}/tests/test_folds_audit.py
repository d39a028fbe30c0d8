"""The audit of folds, and comp folds: what they hold, what makes them worthless, and that they are frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config
from test_folds import made, table

from comp import folds, samples, store
from comp.config import Refused
from comp.folds import LOCKED, TAUGHT_ONLY, Folds
from comp.prepare import assign, audit
from comp.samples import Samples

# --- audit ---------------------------------------------------------------------------------------------------------------


def altered(found: Folds, rows: Any, fold: int) -> Folds:
    frame = found.frame.copy()
    frame.loc[rows, "fold"] = fold
    return Folds(frame, found.meta, found.samples)


def faults(found: Folds) -> list[str]:
    return list(audit.audit(found.samples, found)["faults"])


def test_the_audit_counts() -> None:
    found = made(table(), "stratified_group", holdout=0.1)
    report = audit.audit(found.samples, found)
    assert sum(line["rows"] for line in report["folds"]) + report["locked"] == 600
    for line in report["folds"]:
        taught, scored = found.split(line["fold"])
        assert (line["rows"], line["taught"]) == (len(scored), len(taught))
        assert line["groups"] == found.samples.frame["group"].iloc[scored].nunique()
        there = np.bincount(found.samples.frame["target.y"].iloc[scored].to_numpy(np.int64), minlength=4)
        shares = line["targets"]["y"]
        assert list(shares["shares"].values()) == (there / there.sum()).tolist()
        assert shares["rarest"] == "abcd"[there.argmin()] and shares["rarest_rows"] == there.min()
    text = audit.table(report).splitlines()
    assert text[0].split() == ["fold", "rows", "taught", "groups", "a", "b", "c", "d", "rarest"]
    assert len(text) == 7 and f"{report['locked']} rows are locked away" in text[6]


def test_the_audit_of_numbers() -> None:
    found = made(table(task="regression"), "quantiles")
    first = audit.audit(found.samples, found)["folds"][0]
    values = found.samples.frame["target.y"].to_numpy()[found.split(0)[1]]
    assert first["targets"]["y"] == {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
    }


def test_a_group_in_two_folds_is_a_fault() -> None:
    found = made(table(), "stratified_group")
    group = found.samples.frame["group"]
    name = group.value_counts().index[0]
    rows = group.index[group == name]
    here = int(found.of_sample[0, rows[0]])
    (line,) = faults(altered(found, rows[0], (here + 1) % 5))
    assert line.startswith(f"group {name!r} stands in fold ") and f"fold {here}" in line
    (line,) = faults(altered(found, rows[0], LOCKED))
    assert line == f"group {name!r} stands in the hold-out and fold {here}"
    (line,) = faults(altered(found, rows[0], TAUGHT_ONLY))
    assert line == f"group {name!r} stands in the rows never scored and fold {here}"
    blind = made(table(), "stratified")
    report = audit.audit(blind.samples, blind)
    assert report["faults"] == [] and report["notes"][0].startswith("blind to groups on purpose: 5")


def test_an_empty_fold_is_a_fault() -> None:
    found = made(table(), "stratified")
    assert "fold 3 is empty" in faults(altered(found, found.of_sample[0] == 3, 2))
    few = table(600, group=[f"g{i % 3}" for i in range(600)])
    assert "fold 3 is empty" in faults(made(few, "group"))


def test_a_class_that_could_be_everywhere_and_is_not_is_a_fault() -> None:
    one = table()
    rare = np.zeros(600)
    rare[:5] = 3
    found = made(Samples(one.frame.assign(**{"target.y": rare}), one.heads, "hash"), "kfold")
    found = altered(found, slice(0, 4), 0)
    (line,) = faults(altered(found, 4, 1))
    assert line == "y: class 'd' has 5 rows and none in fold 2, 3, 4; use stratified"
    rare[4] = 0  # four rows cannot be in five folds
    found = made(Samples(one.frame.assign(**{"target.y": rare}), one.heads, "hash"), "kfold")
    assert faults(altered(found, slice(0, 4), 0)) == []


def test_with_groups_a_class_needs_as_many_groups_as_folds() -> None:
    target = np.zeros(600)
    group = np.array([f"g{i % 60}" for i in range(600)], object)
    target[np.isin(group, ["g0", "g1", "g2", "g3"])] = 1  # 40 rows, but four groups
    one = table(600, group=group, target=target)
    assert faults(made(one, "stratified_group")) == []
    target[group == "g4"] = 1
    one = table(600, group=group, target=target)
    found = made(one, "stratified_group")
    assert faults(found) == [], "five groups, one in each fold"
    there = found.of_sample[0]
    moved = altered(found, np.isin(there, [there[0]]) & (target == 1), int((there[0] + 1) % 5))
    assert any("class 'b' has 5 groups and none in fold" in line for line in faults(moved))


# --- comp folds ----------------------------------------------------------------------------------------------------------


def again(remake: bool = False) -> Folds:
    assign.make(config(experiment="base"), samples.load(), remake)
    return folds.load(samples.load())


def test_folds_are_written_with_their_audit(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = folds.load(samples.load())
    assert {k: found.meta[k] for k in ("scheme", "k", "repeats", "seed", "rule", "gap")} == {
        "scheme": "stratified_group", "k": 5, "repeats": 1, "seed": 0, "rule": "others", "gap": 0,
    }  # fmt: skip
    written = store.read_json(project / "data" / "folds_audit.json")
    assert written == audit.audit(found.samples, found) and written["faults"] == []
    before = store.folds_file().read_bytes()
    again()
    printed = capsys.readouterr().out
    assert (
        "unchanged" in printed
        and audit.table(written) in printed
        and printed.splitlines()[-1].startswith("next: comp train")
    )
    assert audit.table(written) + "\n" == (project / "data" / "folds_audit.txt").read_text()
    again(remake=True)
    assert store.folds_file().read_bytes() == before
    store.folds_file().unlink()
    again()
    assert store.folds_file().read_bytes() == before


def test_other_settings_are_refused_by_name(project: Path) -> None:
    before = store.folds_file().read_bytes()
    file = project / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("k: 5, seed: 0", "k: 4, seed: 1"))
    with pytest.raises(Refused) as refused:
        again()
    assert refused.value.lines[:2] == [
        "data/folds.parquet: made with folds.k 5, which is 4 now",
        "data/folds.parquet: made with folds.seed 0, which is 1 now",
    ]
    assert "comp folds --remake" in refused.value.lines[-1]
    assert store.folds_file().read_bytes() == before
    assert again(remake=True).meta["k"] == 4


def test_other_samples_are_refused_by_name(project: Path) -> None:
    one = samples.load()
    samples.save(one.frame.iloc[3:].reset_index(drop=True), one.heads)
    with pytest.raises(Refused, match="0 rows are new and 3 are gone"):
        again()
    assert len(again(remake=True).frame) == 1434


def test_folds_that_fail_their_audit_are_not_written(project: Path) -> None:
    file = project / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("k: 5", "k: 17"))
    before = {
        name: (project / "data" / name).read_bytes()
        for name in ("folds.parquet", "folds_audit.json", "manifest.json")
    }
    with pytest.raises(Refused, match="fold 16 is empty"):
        again(remake=True)
    assert before == {name: (project / "data" / name).read_bytes() for name in before}
    refused = store.read_json(project / "data" / "folds_refused.json")
    assert refused["k"] == 17 and "fold 16 is empty" in refused["faults"]
    assert "FAULT fold 16 is empty" in (project / "data" / "folds_refused.txt").read_text()
    file.write_text(file.read_text().replace("k: 17", "k: 5"))
    again()
    assert not list((project / "data").glob("folds_refused.*")), "what was mended is no longer told"


def test_a_flipped_byte_is_refused(project: Path) -> None:
    data = bytearray(store.folds_file().read_bytes())
    data[len(data) // 2] ^= 1
    store.folds_file().write_bytes(bytes(data))
    for read in (again, lambda: folds.load(samples.load())):
        with pytest.raises(Refused, match=r"data/folds\.parquet: damaged"):
            read()
    again(remake=True)


def test_killed_before_the_seal_it_is_made_again(project: Path) -> None:
    before = store.folds_file().read_bytes()
    manifest = store.read_json(project / "data" / "manifest.json")
    del manifest["folds.parquet"]
    store.write_json(project / "data" / "manifest.json", manifest)
    again()
    assert store.folds_file().read_bytes() == before
