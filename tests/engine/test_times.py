"""The time column: dates in digits are days, what may be either is refused with the line that decides, and
the decision is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import config
from test_prepare import error_lines, lay, prepared

from comp.engine import cli
from comp.engine.data import folds, make_folds

FOLDS = {"scheme": "time", "k": 2, "seed": 0}


def laid(root: Path, cells: list[str], **more: Any) -> None:
    rows = "".join(f"{chr(97 + i)},{1 + i % 2},{cell}\n" for i, cell in enumerate(cells))
    lay(root, f"id,label,t\n{rows}", time="t", folds=FOLDS | more.pop("folds", {}), **more)


def times() -> list[float]:
    made = prepared()
    return [float(value) for value in made.frame["time"][made.positions("train")]]


def test_eight_digits_are_dates_and_a_gap_is_days(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From 31 January to 10 February are 10 days, not 79."""
    laid(empty, ["20200131", "20200201", "20200210", "19991231"])
    found = times()
    assert found[1] - found[0] == 1 and found[2] - found[0] == 10 and found[3] == 10956
    printed = capsys.readouterr().out
    assert (
        "time: t: dates like 20200131" in printed and "days" in printed and "time_format: number" in printed
    )
    days = [f"2020{month:02}{day:02}" for month in (1, 2, 3) for day in range(1, 29)]
    laid(empty, days, folds={"gap": 20})
    table = prepared()
    make_folds.make(config(experiment="base"), table)
    split, time = folds.load(table), table.frame["time"].to_numpy()
    train, valid = split.split(1)
    gap = time[valid].min() - time[train].max()
    assert 20 <= gap < 25


@pytest.mark.parametrize(
    ("cells", "where", "lines"),
    [
        (["202001", "202002", "201912"], "train.csv:2", ('"%Y%m"', "number")),
        (["1580428800", "1580515200", "1480428800"], "train.csv:2", ("unix", "number")),
        (["1580428800000", "1580515200000"], "train.csv:2", ("unix_ms", "number")),
        (["20200131120000", "20200201000000"], "train.csv:2", ('"%Y%m%d%H%M%S"', "number")),
        (["20200131", "20200230", "20200301"], "train.csv:3", ('"%Y%m%d"', "number")),
    ],
)
def test_ambiguous_times_are_an_error_with_the_lines_that_decide(
    empty: Path, cells: list[str], where: str, lines: tuple[str, ...]
) -> None:
    laid(empty, cells)
    (line,) = error_lines()
    assert where in line and " t: " in line
    for form in lines:
        assert f"configs/competition.yaml: time_format: {form}" in line


@pytest.mark.parametrize(
    ("form", "cells", "days"),
    [
        ("number", ["20200131", "202001", "7.5"], [20200131, 202001, 7.5]),
        ("%Y%m", ["202001", "202002", "197001"], [18262, 18293, 0]),
        ("unix", ["86400", "1580428800"], [1, 18292]),
        ("unix_ms", ["86400000", "1580428800000"], [1, 18292]),
        ("%d.%m.%Y", ["31.01.2020", "01.02.2020"], [18292, 18293]),
    ],
)
def test_a_declared_format(
    empty: Path, capsys: pytest.CaptureFixture[str], form: str, cells: list[str], days: list[float]
) -> None:
    laid(empty, cells, time_format=form)
    assert times() == days
    assert ("numbers" if form == "number" else "days") in capsys.readouterr().out


def test_numbers_and_iso_dates_stay_what_they_are(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cells, days, what in (
        (["2019", "2020", "2021"], [2019, 2020, 2021], "numbers"),
        (["31", "99999999", "12"], [31, 99999999, 12], "numbers"),
        (["99000101", "12345678"], [99000101, 12345678], "numbers"),
        (["2020-01-31", "2020-02-01"], [18292, 18293], "dates"),
    ):
        laid(empty, cells)
        assert times() == days and f"time: t: {what}" in capsys.readouterr().out


def test_a_format_that_does_not_fit(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laid(empty, ["31.01.2020", "2020-02-01"], time_format="%d.%m.%Y")
    (line,) = error_lines()
    assert "train.csv:3: t: '2020-02-01'" in line and "%d.%m.%Y" in line
    lay(empty, time_format="number")
    assert cli.main(["prepare"]) == 2
    assert "competition.time" in capsys.readouterr().err
