"""comp kernel NAME --rehearse: the bundle runs here as it will on Kaggle, before anything is uploaded.

Twice: on a hidden test set (another size, new ids, a missing and a truncated picture) and on the visible one, whose
predictions must be those stored at home. In namespaces of its own there is no network, /kaggle is where it is on Kaggle, and
its inputs cannot be written; where namespaces may not be made, sockets are blocked instead, and that is said.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from comp.engine import pages
from comp.engine.bank import bank
from comp.engine.config import experiments, resolve
from comp.engine.config.competition_schema import Competition
from comp.engine.config.schema import Config
from comp.engine.data import folds, raw_tables, samples
from comp.engine.data.sample_submission import id_column_candidates, read_sample
from comp.engine.deliver import kernel, validate
from comp.engine.deliver.cell_format import rules_of_cells
from comp.engine.errors import Refused
from comp.engine.store import artifacts, locks, paths

ROWS = 512  # of the visible test set that are compared, and the most of a hidden one
NAMESPACES = """
set -e
new=$1; kaggle=$2; shift 2
mount -t tmpfs tmpfs "$new"
for each in /*; do
  if [ "$each" = /kaggle ]; then continue
  elif [ -L "$each" ]; then cp -P "$each" "$new$each"
  elif [ -d "$each" ]; then mkdir "$new$each"; mount --rbind "$each" "$new$each"; fi
done
mkdir "$new/kaggle"; mount --bind "$kaggle" "$new/kaggle"
mount --bind "$kaggle/input" "$new/kaggle/input"; mount -o remount,bind,ro "$new/kaggle/input"
exec chroot "$new" "$@"
"""
BLOCKED = """
import socket
def refused(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("no network in a rehearsal")
    return original(self, address)
original = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refused
def unknown(*given, **named):
    raise OSError("no network in a rehearsal")
socket.getaddrinfo = unknown
"""


def file_of(name: str) -> Path:
    return kernel.folder(name) / "rehearsal.json"


def rehearse(name: str, python: str = sys.executable) -> dict[str, Any]:
    cfg = resolve.load(paths.root(), "base").config
    made = kernel.folder(name)
    size = kernel.content(made)
    # Beside what it runs, so that gigabytes are linked and not copied, and a killed one is cleaned up by the next.
    with locks.lock(made, f"rehearsing {name}"):
        space = made / ".rehearsal"
        shutil.rmtree(space, ignore_errors=True)
        try:
            hidden = _run(cfg, name, space / "hidden", True, python)
            visible = _run(cfg, name, space / "visible", False, python)
            far = compare(name, space / "visible" / "kaggle" / "working" / "said.npz", visible["half"])
        finally:
            shutil.rmtree(space, ignore_errors=True)
    each = {address: visible["seconds"][address] / visible["rows"] for address in visible["seconds"]}
    limit = cfg.competition.kernel
    wanted = limit.hidden_rows or len(samples.load().positions("test"))
    total = visible["ready"] + sum(each.values()) * wanted
    facts = {
        "bundle": size,
        "isolation": hidden["isolation"],
        "seconds_an_image": each,
        "start": visible["ready"],
        "hidden_rows": wanted,
        "cards": hidden["cards"],
        "seconds": total,
        "peak": max(hidden["peak"], visible["peak"]),
        "apart": far,
    }
    artifacts.write_json(file_of(name), facts)
    print(f"{name}: {hidden['isolation']}")
    print(
        f"hidden set of {hidden['rows']} rows with new ids, {hidden['damaged']} pictures damaged: submission.csv is valid"
    )
    print(f"visible set, {visible['rows']} rows: at most {far:.1e} from what is stored")
    print(
        f"{1000 * sum(each.values()):.1f} ms an image, {total / 3600:.2f} h for {wanted:,} rows on this machine, of {limit.hours:g} h; memory {artifacts.format_size(facts['peak'])} of {limit.ram:g} GB"
    )
    if not limit.hidden_rows:
        print("competition.kernel.hidden_rows is not declared: as many as the visible ones assumed")
    if total > limit.hours * 3600:
        raise Refused(
            f"{name}: takes {total / 3600:.1f} h here, {limit.hours:g} h are allowed; comp kernel {name} --budget {limit.hours:g}h drops what gains least"
        )
    if facts["peak"] > limit.ram * 1e9:
        raise Refused(
            f"{name}: needs {artifacts.format_size(facts['peak'])} of memory, competition.kernel.ram allows {limit.ram:g} GB; set predict.batch_size lower"
        )
    print(f'next: comp kernel {name} --push -m "…"')
    return facts


def _run(cfg: Config, name: str, space: Path, hidden: bool, python: str) -> dict[str, Any]:
    place, slug = space / "kaggle", kernel.slug(name)
    (place / "working").mkdir(parents=True)
    (place / "input").mkdir()
    command, environment, isolation = _isolated(place, space, python, slug)
    weaker = isolation.startswith("weaker")
    lay_out(cfg, place / "input" / cfg.competition.slug, hidden, linked=not weaker)
    shutil.copytree(kernel.folder(name) / "bundle", place / "input" / slug, copy_function=kernel.link)
    if weaker:
        environment["COMP_KAGGLE"] = str(place)
    done = subprocess.run(
        command,
        env=environment,
        cwd=place / "working",
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: _ceiling(cfg.competition.kernel.ram),
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise Refused(
            f"{name}: the rehearsal on the {'hidden' if hidden else 'visible'} test set failed ({isolation}), exit code {done.returncode}:",
            last,
        )
    home = cfg.competition
    sample = read_sample(place / "input" / home.slug / home.submission.sample, *id_column_candidates(home))
    rules = rules_of_cells(home.submission, samples.load().heads, sample)
    validate.check((place / "working" / "submission.csv").read_bytes(), "submission.csv", sample, rules)
    half = any(experiments.stored_config(leaf["run"]).train.amp != "fp32" for leaf in kernel.leaves_of(name))
    return {**artifacts.read_json(place / "working" / "report.json"), "isolation": isolation, "half": half}


def _isolated(place: Path, space: Path, python: str, slug: str) -> tuple[list[str], dict[str, str], str]:
    run = [python, "-m", "comp", "predict", "--kernel"]
    dropped = ("COMP_ROOT", "PYTHONPATH", "COMP_KAGGLE")
    environment = {
        key: value for key, value in os.environ.items() if key not in dropped and "proxy" not in key.lower()
    }
    environment |= {"COMP_REHEARSAL": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    root = space / "root"
    root.mkdir()
    (place / "tmp").mkdir()
    names = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "--net",
        "sh",
        "-c",
        NAMESPACES,
        "sh",
        str(root),
        str(place),
    ]
    # Loader processes talk through sockets in the temporary folder, and the path of one may have a hundred characters.
    inside = ["env", "-C", "/kaggle/working", f"PYTHONPATH=/kaggle/input/{slug}", "TMPDIR=/kaggle/tmp"]
    for flags in (names, [part for part in names if part not in ("--user", "--map-root-user")]):
        if (
            shutil.which("unshare")
            and subprocess.run([*flags, "true"], capture_output=True, check=False).returncode == 0
        ):
            return (
                [*flags, *inside, *run],
                environment,
                "rehearsed in namespaces of its own: no network at all, /kaggle as on Kaggle, inputs read-only",
            )
    guard = space / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(BLOCKED)
    environment["PYTHONPATH"] = f"{guard}{os.pathsep}{place / 'input' / slug}"
    return (
        run,
        environment,
        "weaker: namespaces may not be made here, so sockets were blocked inside Python, and inputs could be written",
    )


def _ceiling(gigabytes: float) -> None:
    """Of memory that is really used; a GPU's address space is no memory, so there it is only measured."""
    if not Path("/dev/nvidia0").exists():
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9),) * 2)


# --- test sets -----------------------------------------------------------------------------------------------------------


def lay_out(cfg: Config, target: Path, hidden: bool, linked: bool = False) -> None:
    """The competition's folder as the notebook finds it: tables, the sample, test pictures; no training pictures. `linked`
    where nobody can write there, since data/raw is never changed."""
    home, raw = cfg.competition, paths.path(cfg.competition.raw)
    if home.test.table is None or not home.test.image or not _plain(home, raw):
        # Other rows cannot be made up: it gets everything, and the ids that there are.
        if not linked:
            artifacts.require_space(
                sum(f.stat().st_size for f in raw.rglob("*") if f.is_file()), "the rehearsal"
            )
        shutil.copytree(raw, target, copy_function=kernel.link if linked else shutil.copy2)
        return
    target.mkdir(parents=True)
    for file in raw.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    source = raw_tables.read(raw / home.test.table)
    rows = source.frame
    # Another size than at home, and no power of two: whatever counts on a number of rows shows.
    number = min(round(1.3 * len(rows)) + 3, ROWS + 1) if hidden else min(len(rows), ROWS)
    chosen = rows.iloc[
        np.arange(number) % len(rows) if hidden else np.linspace(0, len(rows) - 1, number).round().astype(int)
    ].reset_index(drop=True)
    key = home.test.id or home.id
    before = chosen[key].tolist()
    after = [f"hidden{i:06d}" for i in range(number)] if hidden else before
    came_from = [raw_tables.expand_template(replace(source, frame=chosen), each) for each in home.test.image]
    chosen = chosen.assign(**{key: after})
    goes_to = [raw_tables.expand_template(replace(source, frame=chosen), each) for each in home.test.image]
    pairs = [
        (i, *pair)
        for old, new in zip(came_from, goes_to, strict=True)
        for i, pair in enumerate(zip(old, new, strict=True))
    ]
    for i, old, new in pairs:
        place = target / new
        place.parent.mkdir(parents=True, exist_ok=True)
        data = (raw / old).read_bytes() if (raw / old).is_file() else b""
        if hidden and new != old and i < 2:
            data = data[: len(data) // 2] if i else b""
        if data:
            place.write_bytes(data)
    if home.test.table != home.submission.sample:
        _write(target / home.test.table, chosen)
    sample = read_sample(raw / home.submission.sample, *id_column_candidates(home))
    lines = [list(sample.rows[0]) for _ in after]
    for number, (line, each) in enumerate(zip(lines, after, strict=True)):
        line[sample.key] = each
        for at in sample.index:
            line[at] = str(number)
    place = target / home.submission.sample
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(
        "".join(validate.written(row, sample.delimiter) for row in [list(sample.columns), *lines])
    )


def _plain(home: Competition, raw: Path) -> bool:
    """Whether test rows are lines of a table whose ids name their files, and lines of the sample."""
    templates = home.test.image or []
    if (
        pages.get("read_samples")
        or home.gather
        or any("*" in each for each in templates)
        or home.submission.rows
    ):
        return False
    few = raw_tables.read(raw / str(home.test.table))
    few = replace(few, frame=few.frame.head(20))
    # Inside an archive, or several channels in one path: no files that could be cut.
    return all(
        any((raw / path).is_file() for path in raw_tables.expand_template(few, each)) for each in templates
    )


def _write(place: Path, frame: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix in (".parquet", ".pq"):
        frame.to_parquet(place)
    else:
        frame.to_csv(place, index=False, sep="\t" if place.suffix == ".tsv" else ",")


def compare(name: str, file: Path, half: bool) -> float:
    """The largest difference from the predictions at home, in probabilities; values above 1 relative to their size."""
    table = samples.load()
    stored = bank.load(name, "test", table, folds.load(table))
    said = np.load(file)
    place = {each: i for i, each in enumerate(table.frame["row"].to_numpy()[stored.row])}
    at = [place[each] for each in said["ids"].tolist()]
    worst = 0.0
    for head in table.heads:
        before = stored.probability(head)[at]
        after = head.spec.to_probability(said[f"head.{head.name}"].astype(np.float64))
        off = np.abs(after - before) / np.maximum(1.0, np.abs(before))
        worst = max(worst, float(np.where(np.isnan(off), np.inf, off).max(initial=0.0)))
    tolerance = 1e-3 if half else 1e-5
    if worst > tolerance:
        raise Refused(
            f"{name}: the bundle says something else than what is stored, by up to {worst:.1e} (more than {tolerance:g}); weights, pictures or a version differ"
        )
    return worst
