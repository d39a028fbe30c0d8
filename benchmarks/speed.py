"""make bench: every question of speed, one script after the other, into build/bench/*.json and the table of README.md.

Each script compares ours with what users have, in one process, taking turns. A bar is what must hold on two quiet cores.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


# What would take half an hour at full length: 200 steps a side of a network that is large for a CPU.
SHORT = {"step": ["--blocks", "3", "--steps", "2"], "loop": ["--blocks", "3", "--steps", "4"]}


class Line(NamedTuple):
    script: str
    where: str  # path into what the script prints, parted by " / "
    says: str
    bar: str


LINES = [
    Line("loader", "1024 px / same_times_typical", "1,024 px files, cached, same albumentations chain: times the typical loader", "≥ 3"),
    Line("loader", "1024 px / fast_times_typical", "1,024 px files, cached, crop and flip in threads, color ops on the device: times the typical loader", "≥ 20"),
    Line("loader", "512 px / fast_times_typical", "the same from 512 px files", "≥ 10"),
    Line("decode", "decode / faster_than_typical", "1,024 px JPEG to 256 px: times full decode, cvtColor and area resize", "≥ 2"),
    Line("decode", "decode / times_the_floor", "the same: cost over the floor, a reduced gray decode", "≤ 1.3"),
    Line("decode", "build / times_bare_decode", "filling the cache: cost over the bare decode on all cores", "≤ 1.3"),
    Line("inference", "once_times_four_typical_passes", "four views of TTA, mobilenetv3_small: times four typical passes", "≥ 2"),
    Line("inference", "once_times_four_passes_of_ours", "the same: times four passes of our own, bit for bit the same", ""),
    Line("step", "step / loader_times_memory", "a step through the loader: cost over the same step on a batch in memory", "≤ 1.10"),
    Line("step", "memory / megabytes above an empty set / 1,000 rows", "private memory of the loader's processes above those of an empty set, MB: 1,000 rows", "≤ 77"),
    Line("step", "memory / megabytes above an empty set / 1,000,000 rows", "the same: 1,000,000 rows", "≤ 77"),
    Line("step", "memory / seconds until 1,000,000 rows give their first batch", "seconds until 1,000,000 rows give their first batch", "≤ 10"),
    Line("loop", "loop_times_bare", "the loop with everything on, resnet18 at 64 px: cost over bare forward, backward, step", "≤ 1.10"),
    Line("search", "auc / ratio", "a candidate of greedy selection, 200 members x 100,000 rows, AUC: times scikit-learn's metric", "≥ 30"),
    Line("search", "log_loss / ratio", "the same, log loss of two classes", "≥ 30"),
    Line("search", "log_loss_5 / ratio", "the same, log loss of five", "≥ 30"),
    Line("search", "auc_5 / ratio", "the same, AUC of five classes", "≥ 30"),
    Line("search", "auc_labels_5 / ratio", "the same, mean AUC of five labels", "≥ 20"),
    Line("search", "qwk / ratio", "the same, quadratic weighted kappa", "≥ 20"),
    Line("search", "f1 / ratio", "the same, F1", "≥ 20"),
    Line("search", "f1_macro_5 / ratio", "the same, macro F1 of five classes", "≥ 20"),
    Line("search", "hillclimbers / ratio", "hill climbing, 8 members x 100,000 rows, same picks: times the package hillclimbers", "≥ 20"),
    Line("bank", "noted_ratio", "200 prediction sets of 100,000 x 5 into one array: cost over a copy", "≤ 3"),
    Line("bank", "first_ratio", "the same, with every sha256 checked", "≤ 15"),
]  # fmt: skip


def main() -> None:
    began, found = time.perf_counter(), {}
    for script in dict.fromkeys(line.script for line in LINES):
        print(f"+ benchmarks/{script}.py, after {time.perf_counter() - began:.0f} s", flush=True)
        done = subprocess.run(
            [sys.executable, str(HERE / f"{script}.py"), *SHORT.get(script, [])],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout, flush=True)
        found[script] = json.loads(done.stdout[done.stdout.index("{") :])
        target = HERE.parent / "build" / "bench" / f"{script}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found[script], indent=1) + "\n")
    rows = [
        f"| {line.says} | {shown(value(found, line))} | {line.bar} | {line.script}.py |" for line in LINES
    ]
    written = "\n".join(["| | measured | bar | script |", "|---|---|---|---|", *rows])
    page = README.read_text("utf-8")
    page, count = re.subn(
        r"(<!-- make bench -->\n).*?(\n<!-- end -->)",
        lambda match: match[1] + written + match[2],
        page,
        flags=re.DOTALL,
    )
    assert count == 1, "README.md has lost the place of its table"
    README.write_text(page, "utf-8")
    print(f"{written}\n\nwritten: README.md and build/bench/*.json, in {time.perf_counter() - began:.0f} s")


def value(found: dict[str, Any], line: Line) -> Any:
    at = found[line.script]
    for key in line.where.split(" / "):
        at = at[key]
    return at


def shown(value: Any) -> str:
    """A median with the range of its rounds, or a number that has none."""
    if isinstance(value, dict):
        return f"**{value['median']:g}** ({value['low']:g} to {value['high']:g})"
    return f"**{value:g}**"


if __name__ == "__main__":
    main()
