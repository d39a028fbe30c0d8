"""The whole road on real digits: bake a project into build/demo, fill it, train, blend, write a validated submission."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bake import CHECKOUT, bake, copy_template

EXPERIMENTS, BLEND = ["exp001", "exp002"], "blend001"
LEAST = 0.95  # hidden accuracy on whole unseen writers; below it something is broken
ROAD = [
    ["practice"],
    ["prepare"],
    ["check"],
    ["folds"],
    ["cache", EXPERIMENTS[0]],
    *(["train", name, "--on", "local"] for name in EXPERIMENTS),  # a fold a core
    *(["predict", name] for name in EXPERIMENTS),
    ["ensemble", BLEND],
    ["submit", BLEND, "--dry-run"],
]


def comp(project: Path, *arguments: str, show: bool = True) -> str:
    """One verb in the project, as a person would type it. A failure ends the demo with the verb's own words."""
    print("+ comp", *arguments, flush=True)
    command = [sys.executable, "-m", "comp", *arguments]
    done = subprocess.run(
        command, cwd=project, check=False, text=True, stdout=None if show else subprocess.PIPE
    )
    if done.returncode:
        sys.exit(f"comp {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout or ""


def row(project: Path, folder: str) -> list[str]:
    score = json.loads((project / folder / "score.json").read_text())
    spread = "" if score["std"] is None else f" ± {score['std']:.4f}"
    return [folder, score["metric"], f"{score['mean']:.4f}{spread}", f"{score['oof']:.4f}"]


def main() -> None:
    began = time.perf_counter()
    folder = CHECKOUT / "build" / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    project = bake(copy_template(folder / "template"), folder, {})
    for arguments in ROAD:
        comp(project, *arguments)

    hidden = re.search(r"accuracy ([\d.]+)", said := comp(project, "practice", "--score", BLEND, show=False))
    assert hidden, said
    lines = [["", "metric", "CV mean ± std", "OOF"]]
    lines += [row(project, f"runs/{name}") for name in EXPERIMENTS]
    lines += [row(project, f"ensembles/{BLEND}")]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("  " + "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"""
  hidden labels    {hidden[1]} accuracy of {BLEND}, on writers that no model has seen
  submission       {(project / "submissions" / f"{BLEND}.csv").relative_to(CHECKOUT)}
  took             {time.perf_counter() - began:.0f} s""")
    if float(hidden[1]) < LEAST:
        sys.exit(f"{hidden[1]} is less than {LEAST}, the lowest accuracy expected of a working project")


if __name__ == "__main__":
    main()
