"""comp runs, comp bank, comp config: what there is, what it scores, and what made it."""

from __future__ import annotations

import csv as csv_format
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import bank as banked
from comp.engine.bank import score
from comp.engine.config import experiments, run_members
from comp.engine.config import resolve as configs
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble import blend, member_filter
from comp.engine.errors import Refused, UserError
from comp.engine.extras import compare
from comp.engine.run import tracking
from comp.engine.store import artifacts, locks, paths

PAUSE = 600  # seconds: a longer silence of a log is a night between two starts, not work
Record = dict[str, Any]


# --- runs ----------------------------------------------------------------------------------------------------------------


def runs() -> None:
    """One line a run or ensemble."""
    base = configs.load(paths.root(), "base").config
    folders = [
        p
        for p in sorted(paths.path("runs").glob("*"))
        if (p / "config.yaml").exists() and p.name[0] != "." and _begun(p)
    ]
    lines = [_run(folder, base) for folder in folders]
    ensembles = [p for p in sorted(paths.path("ensembles").glob("*")) if p.is_dir() and p.name[0] != "."]
    lines += [_ensemble(folder, base) for folder in ensembles]
    if not lines:
        print("no runs yet\nnext: comp train exp001")
        return
    heading = ["name", "task", "model", "folds", "CV", "OOF", "marks", "time", "differs from base.yaml in"]
    text = text_table.render(heading, [cells for cells, _ in lines], ["folds", "OOF", "time"])
    print(fitted(text))
    scored = [
        (cells[0], record)
        for cells, record in lines
        if record and record["oof"] is not None and "partial" not in record["marks"]
    ]
    metric = score.metric_of(base)
    scored = [(name, record) for name, record in scored if record["metric"] == metric.name]
    if scored:
        name, record = max(scored, key=lambda each: metric.sign * each[1]["oof"])
        print(f"best: {name}, {score.summary(record)}")
        print(*compare.by_yardstick(metric, scored), sep="\n")
        print(f"next: comp submit {name} --dry-run")
    else:
        print("nothing has a score yet\nnext: comp train exp001")


Line = tuple[list[str], Record | None]


def _run(folder: Path, base: Config) -> Line:
    name = folder.name
    try:
        cfg = configs.from_yaml(artifacts.verified(folder / "config.yaml"))
        record = _record(folder)
    except UserError as refused:
        return [name, "-", "-", "-", "-", "-", refused.lines[0], "-", ""], None
    count = experiments.fold_count(cfg)
    by_seed = {seed: len(_scored_folds(name, seed, count)) for seed in experiments.seeds(name)}
    by_seed = dict.fromkeys(cfg.train.seeds, 0) | {seed: n for seed, n in by_seed.items() if n}
    done, wanted = sum(by_seed.values()), count * len(by_seed)
    marks = _marks(record)
    if done < wanted:
        marks.append("unfinished")
    if _holders(folder):
        marks.append("training now")
    if artifacts.manifest_entry(paths.member_folder(name, run_members.REFIT) / "test.arrow"):
        marks.append(f"has :{run_members.REFIT}")
    changed = configs.diff(base, cfg)
    cells = [
        name,
        ", ".join(dict.fromkeys(cfg.competition.tasks.values())),
        cfg.model.name,
        f"{done}/{wanted}" + (f" of {len(by_seed)} seeds" if len(by_seed) > 1 else ""),
        *_scores(record),
        ", ".join(marks),
    ]
    return [
        *cells,
        spent(folder),
        " ".join(f"{key}={_plain(now)}" for key, (_, now) in changed.items()),
    ], record


def _begun(folder: Path) -> bool:
    """A start that was refused or killed before it saved anything left a config and nothing to go on from."""
    made = (file for place in ("seed*/fold*/*", "members/*/*", "*") for file in folder.glob(place))
    kinds = (".arrow", ".safetensors", ".pt", ".npy")
    return any(file.suffix in kinds for file in made) or bool(_holders(folder))


def _holders(folder: Path) -> list[str]:
    """Who trains in a run."""
    return [held for lock in folder.glob("seed*/fold*/.lock") if (held := locks.owner(lock.parent))]


def _scored_folds(run: str, seed: int, folds: int) -> list[int]:
    return [
        n for n in range(folds) if artifacts.manifest_entry(paths.fold_folder(run, seed, n) / "oof.arrow")
    ]


def _ensemble(folder: Path, base: Config) -> Line:
    try:
        record = _record(folder)
    except UserError as refused:
        return [folder.name, "-", "-", "-", "-", "-", refused.lines[0], "-", ""], None
    if record is None:
        return [
            folder.name,
            "-",
            "-",
            "-",
            "-",
            "-",
            f"unfinished: comp ensemble {folder.name}",
            "-",
            "",
        ], None
    marks = _marks(record) + (["stale"] if blend.stale(folder.name, record) else [])
    made = " ".join(
        member["address"] if member["weight"] is None else f"{member['weight']:.2f} {member['address']}"
        for member in record["members"]
        if member["weight"] != 0
    )
    cells = [
        folder.name,
        ", ".join(dict.fromkeys(base.competition.tasks.values())),
        record["method"],
        str(record["n"]),
        *_scores(record),
    ]
    return [*cells, ", ".join(marks), "-", made], record


def _record(folder: Path) -> Record | None:
    file = folder / "score.json"
    record: Record | None = (
        artifacts.read_json(artifacts.verified(file)) if artifacts.manifest_entry(file) else None
    )
    return record


def _scores(record: Record | None) -> list[str]:
    return ["-", "-"] if record is None else [score.mean_std(record), number(record["oof"])]


def _marks(record: Record | None) -> list[str]:
    """What stands in the score, and whether it is still about the samples and folds of today."""
    if record is None:
        return []
    now = {"samples": paths.samples_file(), "folds": paths.folds_file()}
    other = [
        f"other {what}"
        for what, file in now.items()
        if (artifacts.manifest_entry(file) or {}).get("hash") != record["made_for"][what]
    ]
    return [*record["marks"], *other[:1]]


def spent(folder: Path) -> str:
    """Time at work, by the clocks in the logs of all folds."""
    seconds = 0.0
    for log in folder.glob("seed*/fold*/log.jsonl"):
        clocks = [line["clock"] for line in tracking.read(log) if "clock" in line]
        seconds += sum(gap for gap in np.diff(clocks) if 0 < gap < PAUSE)
    if not seconds:
        return "-"
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{int(seconds % 60):02d}"


# --- bank ----------------------------------------------------------------------------------------------------------------


def bank(csv: str | None = None, filters: Sequence[str] = ()) -> None:
    """`filters`: conditions that must all hold, like score>0.9 model~convnext."""
    only = " ".join(filters)
    rows = samples.load()
    split = folds.load(rows)
    if csv is not None:
        _csv(csv, rows, split)
        return
    addresses = banked.members()
    if not addresses:
        print("no predictions yet\nnext: comp train exp001")
        return
    if only:
        everything, addresses = addresses, member_filter.matching(only, addresses)
        if not addresses:
            raise Refused(f"{only}: nothing in the bank is like that; there are {', '.join(everything)}")
    said: dict[str, NDArray[np.float64]] = {}
    faults: dict[str, str] = {}
    for address in addresses:
        try:
            said |= {address: _flat(address, rows, split)} if _has(address, "oof") else {}
        except UserError as refused:
            faults[address] = f"refused: {refused}"
    records = {address: _record(banked.folder(address)) for address in addresses}
    scored = {a: r for a, r in records.items() if r and r["oof"] is not None and a in said}
    sign = {"max": 1, "min": -1}
    best = max(scored, key=lambda a: sign[scored[a]["direction"]] * scored[a]["oof"], default=None)
    lines = []
    for address in addresses:
        files = [banked.folder(address) / f"{kind}.arrow" for kind in banked.KINDS if _has(address, kind)]
        bytes_ = artifacts.format_size(sum(file.stat().st_size for file in files))
        like = f"{_correlation(said[address], said[best]):.3f}" if best and address in said else "-"
        kinds = "+".join(file.stem for file in files)
        made = faults.get(address) or _made(files[0], records[address])
        lines.append([address, kinds, *_scores(records[address]), bytes_, like, made])
    print(
        fitted(
            text_table.render(
                ["member", "has", "CV", "OOF", "size", "like best", "made from"],
                lines,
                ["OOF", "size", "like best"],
            )
        )
    )
    if best:
        print(
            f"best: {best}; like best: correlation of OOF predictions with it, the lower the more a blend may gain"
        )
    print(
        "next: comp bank --csv NAME prints one; comp ensemble NAME blends what configs/ensembles/NAME.yaml lists"
    )


def _has(address: str, kind: str) -> bool:
    return artifacts.manifest_entry(banked.folder(address) / f"{kind}.arrow") is not None


def _flat(address: str, rows: Samples, split: Folds) -> NDArray[np.float64]:
    predictions = banked.load(address, "oof", rows, split)
    return np.concatenate([predictions.probability(head).ravel() for head in rows.heads])


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = ~np.isnan(a) & ~np.isnan(b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(a[both], b[both])[0, 1])


def _made(file: Path, record: Record | None) -> str:
    said = banked.read_meta(file)
    if "members" in said:
        how = record["method"] if record else "blend"
        return f"{how} of {', '.join(said['members'])}"
    views = "+".join(said.get("tta") or ["identity"])
    return f"{len(said['weights'])} checkpoints, {views}"


def _csv(address: str, rows: Samples, split: Folds) -> None:
    """For people and spreadsheets: probabilities or values, one line a row."""
    many = len(rows.heads) > 1
    outputs = [f"{head.name}.{name}" if many else name for head in rows.heads for name in head.outputs]
    writer = csv_format.writer(sys.stdout, lineterminator="\n")
    ids = rows.frame["id"].to_numpy()
    for i, kind in enumerate(kind for kind in banked.KINDS if _has(address, kind) or kind == "test"):
        said = banked.load(address, kind, rows, split)
        if i == 0:
            writer.writerow(["id", "kind", "fold", *outputs])
        values = np.concatenate([said.probability(head) for head in rows.heads], axis=1)
        fold = [""] * len(said.row) if said.fold is None else said.fold.tolist()
        for id_, number_, line in zip(ids[said.row], fold, values.tolist(), strict=True):
            writer.writerow([id_, kind, number_, *map(repr, line)])


# --- config --------------------------------------------------------------------------------------------------------------


def config(experiment: str, overrides: list[str], debug: bool = False, against: str | None = None) -> None:
    """The resolved config as key=value with the place that each value comes from; or what differs from another one."""
    loaded = experiments.load(experiment, overrides, debug)
    if against is None:
        values = configs.flatten(loaded.config.model_dump())
        lines = [
            [f"{key}={_plain(value)}", loaded.origins.get(key, "not declared")]
            for key, value in values.items()
        ]
        print(text_table.render(["knob", "from"], lines))
        return
    other = experiments.load(against, (), debug).config
    changed = configs.diff(other, loaded.config, everything=True)
    if not changed:
        print(f"{experiment} and {against} are the same")
        return
    print(
        text_table.render(
            ["knob", against, experiment], [[key, *map(_plain, pair)] for key, pair in changed.items()]
        )
    )


def _plain(value: Any) -> str:
    """As it would be written behind key=."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def fitted(text: str) -> str:
    """On a terminal a long last column is cut; in a file or a pipe everything stays."""
    if not sys.stdout.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 60)
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in text.splitlines())
