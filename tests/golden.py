"""Golden values: the numbers of nine runs on the practice digits, compared between two commits on one
machine.

    python tests/golden.py compare BASE     BASE, then this checkout (make golden BASE=<commit>)
    python tests/golden.py record FILE      this checkout alone, as JSON

Only numbers are compared: sorted hashes of weight tensors, value buffers of prediction sets, submissions, the
fold of every row, the rows drawn in epochs 0 and 1. File names, metadata and digests are not, because names
stand in them. Each commit runs its own copy of this script, so knobs and verbs may have other names there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from bake import bake, copy_template  # noqa: E402

SPLIT = "folds: {scheme: stratified, k: 3, seed: 0}"
TABLES = (
    'train: {table: train.csv, image: "train/{id}.png"}\ntest: {table: test.csv, image: "test/{id}.png"}\n'
)
COMMON = "slug: practice\ntitle: Practice\nraw: data/raw\nid: id\n"
SHIPPED = "exp001, exp002 and blend001 as the template ships them"
TINY = (
    "base: base\ndata: {size: 32, channels: 1}\naugment: {recipe: light}\n"
    "model: {name: test_resnet, pretrained: false}\n"
    "optim: {lr: 5e-3}\nmachine: {num_workers: 0}\ntrack: {mode: none}\n"
)
SUM = "sample: sample_submission.csv"

Row = dict[str, str]


def even_and_large(row: Row) -> Row:
    digit = int(row["label"])
    return {"id": row["id"], "even": str(1 - digit % 2), "large": str(int(digit > 4)), "round": str(int(digit in (0, 6, 8, 9)))}  # fmt: skip


def number(row: Row) -> Row:
    return {"id": row["id"], "value": str(10 * int(row["label"]))}


# name -> (competition.yaml, configs by name, what becomes of a labelled row, columns of the sample
# submission)
COMPETITIONS: dict[str, tuple[str, dict[str, str], Callable[[Row], Row], dict[str, str]]] = {
    "shipped": ("", {
        "snapshots": f"{TINY}train: {{epochs: 6}}\nsnapshots: {{cycles: 3}}\n",
        "averages": f"{TINY}train: {{epochs: 4, ema_decay: 0.98, grad_accum_steps: 2}}\n"
                    "average: {predict_with: swa, members: [raw, ema], swa_start: 0.5}\nschedule: {name: constant, warmup: 10 steps}\n",
    }, dict, {"label": "0"}),
    "multilabel": (
        f"{COMMON}{TABLES}target: [even, large, round]\ntask: multilabel\nmetric: f1_micro\n{SPLIT}\n"
        f"submission: {{{SUM}, form: probabilities, sums_to_one: false}}\n",
        {"multilabel": f"{TINY}train: {{epochs: 3}}\n"}, even_and_large, {"even": "0", "large": "0", "round": "0"},
    ),
    "regression": (
        f"{COMMON}{TABLES}target: value\ntask: regression\nmetric: rmse\n{SPLIT.replace('stratified', 'quantiles')}\nsubmission: {{{SUM}, form: value}}\n",
        {"regression": f"{TINY}train: {{epochs: 3}}\n"}, number, {"value": "0"},
    ),
    "retrieval": (
        f"{COMMON}{TABLES}target: label\ntask: retrieval\nmetric: map@5\n{SPLIT}\nsubmission: {{{SUM}, form: ranking, k: 5}}\n",
        {"retrieval": f"{TINY.replace('pretrained: false', 'pretrained: false, embedding_size: 16')}train: {{epochs: 3}}\nloss: {{name: arcface}}\n"},
        dict, {"label": "0 1 2 3 4"},
    ),
    "two_heads": (
        f"{COMMON}{TABLES.replace('{id}.png', '{file}')}gather: true\ntarget: {{digit: multiclass, value: regression}}\n"
        f"metric: {{digit: accuracy, value: r2}}\n{SPLIT.replace('stratified', 'kfold')}\n"
        f"submission: {{{SUM}, form: {{digit: label, value: value}}}}\n",
        {"two_heads": f"{TINY.replace('pretrained: false', 'pretrained: false, image_pool: attention')}train: {{epochs: 3}}\n"},
        lambda row: {"digit": row["label"], "value": str(10 * int(row["label"]))}, {"digit": "0", "value": "0"},
    ),
}  # fmt: skip


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "record":
        target = Path(sys.argv[2]).resolve()
        found = record(target.with_suffix(""))
        target.write_text(json.dumps(found, indent=1, sort_keys=True))
        print(f"{len(found)} golden values: {target}")
    elif len(sys.argv) == 3 and sys.argv[1] == "compare":
        compare(sys.argv[2])
    else:
        sys.exit(__doc__)


def compare(base: str) -> None:
    """Ends with 1 and the names of the values that differ."""
    work = CHECKOUT / "build" / "golden"
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}")
    then = work / commit[:12]
    if not then.is_dir():
        git("worktree", "add", "--detach", str(then), commit)
    try:
        if not (then / "tests" / "golden.py").is_file():
            sys.exit(f"{base}: has no tests/golden.py, so it cannot be compared")
        values = {}
        for name, checkout in (("base", then), ("now", CHECKOUT)):
            file = work / f"{name}.json"
            subprocess.run(
                [sys.executable, str(checkout / "tests/golden.py"), "record", str(file)], check=True
            )
            values[name] = json.loads(file.read_text())
    finally:
        git("worktree", "remove", "--force", str(then))
    differ = sorted(key for key in values["base"].keys() | values["now"].keys()
                    if values["base"].get(key) != values["now"].get(key))  # fmt: skip
    for key in differ:
        print(
            f"differs: {key}: {values['base'].get(key, 'absent')} at {base}, "
            f"{values['now'].get(key, 'absent')} now"
        )
    print(f"{len(values['now']) - len(differ)} of {len(values['now'])} golden values are those of {base}")
    sys.exit(1 if differ else 0)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


# --- the nine runs ------------------------------------------------------------------------------------------


def record(folder: Path) -> dict[str, str]:
    """Bakes a project of this checkout into `folder`, trains the nine runs, and says what came out."""
    began = time.perf_counter()
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    project = bake(copy_template(folder / "template"), folder, {})
    comp(project, project, "practice")
    found: dict[str, str] = {}
    for name, (declared, experiments, become, sample) in COMPETITIONS.items():
        root = project if not declared else lay_out(project, folder / name, declared, become, sample)
        for experiment, text in experiments.items():
            (root / "configs" / f"{experiment}.yaml").write_text(text)
        runs = [*(["exp001", "exp002"] if not declared else []), *experiments]
        for verb in ("prepare", "folds"):
            comp(project, root, verb)
        for run in runs:
            comp(project, root, "train", run)
        if not declared:
            comp(project, root, "ensemble", "blend001")
        for run in [*runs, *([] if declared else ["blend001"])]:
            comp(project, root, "submit", run, "--dry-run")
        found |= {f"{name}/{key}": value for key, value in read(root).items()}
        found |= {f"{name}/{key}": value for key, value in json.loads(drawn(project, root, runs)).items()}
        print(f"{name}: {len(found)} values, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def lay_out(
    project: Path, root: Path, declared: str, become: Callable[[Row], Row], sample: dict[str, str]
) -> Path:
    """A project folder around the practice images with targets of its own. Of two heads, two images of one
    digit are a sample."""
    raw = root / "data" / "raw"
    raw.mkdir(parents=True)
    (root / "configs").mkdir()
    for name in ("base.yaml", "debug.yaml"):
        (root / "configs" / name).write_bytes((project / "configs" / name).read_bytes())
    (root / "configs" / "competition.yaml").write_text(declared)
    for kind in ("train", "test"):
        (raw / kind).symlink_to(project / "data" / "raw" / kind)
    train, test = (table(project / "data" / "raw" / f"{kind}.csv") for kind in ("train", "test"))
    train, test = train[:600], test[:100]
    if "gather" in declared:
        train.sort(key=lambda row: row["label"])  # stable: neighbours show the same digit, nearly always
        pairs = [(f"{i // 2:05d}", train[i - i % 2], row) for i, row in enumerate(train)]
        rows = [{"id": id, "file": f"{row['id']}.png"} | become(first) for id, first, row in pairs]
        write(raw / "train.csv", rows)
        write(raw / "test.csv", [{"id": f"t{i // 2:05d}", "file": f"{row['id']}.png"} for i, row in enumerate(test)])  # fmt: skip
        ids = list(dict.fromkeys(f"t{i // 2:05d}" for i in range(len(test))))
    else:
        write(raw / "train.csv", [become(row) for row in train])
        write(raw / "test.csv", [{"id": row["id"]} for row in test])
        ids = [row["id"] for row in test]
    write(raw / "sample_submission.csv", [{"id": id} | sample for id in ids])
    return root


def table(file: Path) -> list[Row]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def write(file: Path, rows: list[Row]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def comp(project: Path, root: Path, *arguments: str) -> None:
    """A verb of the project's code on the folder `root`. One thread: the thread count changes the order of
    sums."""
    run([sys.executable, "-m", "comp", *arguments], project, root)


def run(command: list[str], project: Path, root: Path) -> str:
    environment = os.environ | {"COMP_ROOT": str(root), "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(command[1:])} in {root} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


# --- what came out ------------------------------------------------------------------------------------------


def read(root: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    found = {}
    for file in sorted(root.glob("runs/**/*.safetensors")):
        tensors = sorted(sha256([value.tobytes()]) for value in load_file(file).values())
        found[str(file.relative_to(root))] = sha256(text.encode() for text in tensors)
    for file in sorted([*root.glob("runs/**/*.arrow"), *root.glob("ensembles/**/*.arrow")]):
        batch = pa.ipc.open_file(file).get_batch(0)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            buffers = [buffer for buffer in column.buffers() if buffer is not None]
            found[f"{file.relative_to(root)}:{name}"] = sha256(bytes(buffer) for buffer in buffers)
    for file in sorted(root.glob("submissions/*.csv")):
        found[str(file.relative_to(root))] = sha256([file.read_bytes()])
    folds = pq.read_table(root / "data" / "folds.parquet").select(["id", "repeat", "fold"])
    found["folds"] = sha256([json.dumps(folds.to_pylist()).encode()])
    return found


# In a process of its own, because the project's code is not this checkout's.
DRAWN = """
import hashlib, json, sys
from comp.engine.data import folds, samples
from comp.engine.config import experiments
from comp.engine.data import class_balance
from comp.data import epoch_rows
table = samples.load()
split = folds.load(table)
found = {}
for run in sys.argv[1:]:
    cfg = experiments.stored_config(run)
    rows = split.split(0)[0]
    draw = class_balance.make_sampler(cfg, table, rows)
    for epoch in (0, 1):
        drawn = epoch_rows(rows, 0, epoch, draw)
        digest = hashlib.sha256(drawn.astype("int64").tobytes()).hexdigest()
        found[f"{run}: rows drawn in epoch {epoch}"] = digest[:16]
print(json.dumps(found))
"""


def drawn(project: Path, root: Path, runs: list[str]) -> str:
    return run([sys.executable, "-c", DRAWN, *runs], project, root)


def sha256(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


if __name__ == "__main__":
    main()
