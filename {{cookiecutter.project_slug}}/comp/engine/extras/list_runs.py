"""comp runs: all runs and ensembles with scores, marks, training time and what distinguishes them."""

from __future__ import annotations

from pathlib import Path

from comp.engine import text_table
from comp.engine.bank import score
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.ensemble import members
from comp.engine.errors import UserError
from comp.engine.extras import run_status, seed_noise
from comp.engine.extras.run_status import Record
from comp.engine.extras.show_config import format_value
from comp.engine.store import artifacts, paths

HEADING = ["name", "task", "model", "folds", "CV", "OOF", "marks", "time", "differs from base.yaml in"]
Line = tuple[list[str], Record | None]  # cells of HEADING, and the score


def runs() -> None:
    """One line per run or ensemble, then the best one and every difference in terms of seed noise."""
    base = resolve.load(paths.root(), "base").config
    folders = [
        folder
        for folder in sorted(paths.path("runs").glob("*"))
        if (folder / "config.yaml").exists() and folder.name[0] != "." and run_status.is_started(folder)
    ]
    lines = [_run_line(folder, base) for folder in folders]
    ensembles = sorted(paths.path("ensembles").glob("*"))
    lines += [
        _ensemble_line(folder, base) for folder in ensembles if folder.is_dir() and folder.name[0] != "."
    ]
    if not lines:
        print("no runs yet\nnext: comp train exp001")
        return
    table = text_table.render(HEADING, [cells for cells, _ in lines], ["folds", "OOF", "time"])
    print(text_table.cut_to_terminal(table))
    metric = score.metric_of(base)
    scored = [
        (cells[0], record)
        for cells, record in lines
        if record
        and record["oof"] is not None
        and "partial" not in record["marks"]
        and not run_members.is_auxiliary(cells[0])
        and record["metric"] == metric.name
    ]
    if scored:
        name, record = max(scored, key=lambda line: metric.sign * line[1]["oof"])
        print(f"best: {name}, {score.summary(record)}")
        print(*seed_noise.differences(metric, scored), sep="\n")
        print(f"next: comp submit {name} --dry-run")
    else:
        print("no scores yet\nnext: comp train exp001")


def _unreadable(name: str, reason: str) -> Line:
    return [name, "-", "-", "-", "-", "-", reason, "-", ""], None


def _run_line(folder: Path, base: Config) -> Line:
    try:
        cfg = resolve.from_yaml(artifacts.verified(folder / "config.yaml"))
        record = run_status.read_record(folder)
    except UserError as error:
        return _unreadable(folder.name, error.lines[0])
    folds, marks = run_status.folds_and_marks(folder, cfg, record)
    changed = resolve.diff(base, cfg)
    return [
        folder.name,
        ", ".join(dict.fromkeys(cfg.competition.tasks.values())),
        cfg.model.name,
        folds,
        *run_status.score_cells(record),
        ", ".join(marks),
        run_status.training_time(folder),
        " ".join(f"{key}={format_value(value)}" for key, (_, value) in changed.items()),
    ], record


def _ensemble_line(folder: Path, base: Config) -> Line:
    try:
        record = run_status.read_record(folder)
    except UserError as error:
        return _unreadable(folder.name, error.lines[0])
    if record is None:
        return _unreadable(folder.name, f"unfinished: comp ensemble {folder.name}")
    stale = ["stale"] if members.stale(folder.name, record) else []
    weights = " ".join(
        member["address"] if member["weight"] is None else f"{member['weight']:.2f} {member['address']}"
        for member in record["members"]
        if member["weight"] != 0
    )
    return [
        folder.name,
        ", ".join(dict.fromkeys(base.competition.tasks.values())),
        record["method"],
        str(record["n"]),
        *run_status.score_cells(record),
        ", ".join(run_status.score_marks(record) + stale),
        "-",
        weights,
    ], record
