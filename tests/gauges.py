"""Gauges of the structure, as one table: python tests/gauges.py (make gauges).

Static, from the sources: files, lines, import cycles (lazy and typing imports included), modules with more
than 12 imports of ours, functions over 60 lines, lines over 110 columns, the largest folders. Dynamic, from
one `comp train exp001 --fold 0` and one `comp submit exp001 --dry-run` on the practice digits: the modules
whose functions run, and the reading path, which is the project's files on the Python stack at
optimizer.step(), at the decode of an image, in the recipe, in the network's forward, in the loss, and where
the submission is written.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from bake import PROJECT, bake, copy_template  # noqa: E402

SOURCE = CHECKOUT / PROJECT
FAN_OUT, FUNCTION, COLUMNS = 12, 60, 110

Graph = dict[str, set[str]]


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Dotted name -> file, of everything below comp/."""
    found = {}
    for file in sorted((source / "comp").rglob("*.py")):
        name = ".".join(file.relative_to(source).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    assert len(found) > 20
    return found


def page(module: str) -> bool:
    """Pages lie in comp/ itself; what lies in folders is the engine."""
    return not module.startswith("comp.engine")


def imports(module: str, file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports: at the top, inside functions and for types alike."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name not in ("", "comp", module):
                found.add(name)
    return found


def graph(known: dict[str, Path]) -> Graph:
    return {module: imports(module, file, known) for module, file in known.items()}


def cycles(arrows: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    reach: Graph = {}
    for start in arrows:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        reach[start] = seen
    groups = {tuple(sorted({b for b in reach[a] if a in reach[b]})) for a in arrows}
    return [list(group) for group in sorted(groups) if group]


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, methods and nested ones included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def long_functions(known: dict[str, Path]) -> dict[str, int]:
    return {
        f"{module}:{name}": lines
        for module, file in known.items()
        for name, lines in functions(file)
        if lines > FUNCTION
    }


def long_lines(text: str) -> list[int]:
    """Numbers of the lines over 110 columns. Not counted: tables, which are statements and decorators that
    end with `# fmt: skip`, and what `# type: ignore` and `# noqa` add to a line."""
    lines = text.splitlines()
    marked = {i for i, line in enumerate(lines, 1) if line.endswith("# fmt: skip")}
    tables: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno or node.lineno  # of a block: its header
        spans = [(node.lineno, end)]
        spans += [(d.lineno, d.end_lineno or d.lineno) for d in getattr(node, "decorator_list", [])]
        for first, last in spans:
            if marked & set(range(first, last + 1)):
                tables |= set(range(first, last + 1))
    bare = [re.sub(r"  # (type: ignore|noqa).*", "", line) for line in lines]
    return [i for i, line in enumerate(bare, 1) if len(line) > COLUMNS and i not in tables]


# --- what runs ----------------------------------------------------------------------------------------------

# Runs before the verb, in its process: notes every file of comp/ in which a function is called, and the stack
# at certain calls.
TRACE = """
import json, os, sys, threading
project, target = sys.argv[1:3]
inside = os.path.join(project, "comp") + os.sep
ran, path = set(), {}

def stack(what, frame):
    found = []
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(inside) and frame.f_code.co_name != "<module>":
            found.append(os.path.relpath(name, project))
        frame = frame.f_back
    path.setdefault(what, set()).add(tuple(dict.fromkeys(found)))

AT = {
    ("step", "torch/optim"): "optimizer.step", ("step", "timm/optim"): "optimizer.step",
    ("__call__", "albumentations/core/composition"): "recipe", ("forward", "timm/models"): "network forward",
    ("cross_entropy", "torch/nn/functional"): "loss", ("load", "PIL/ImageFile"): "decode",
}

def profile(frame, event, arg):
    if event == "call":
        name = frame.f_code.co_filename
        if name.startswith(inside):
            if frame.f_code.co_name != "<module>":
                ran.add(name)
            return
        for (function, part), what in AT.items():
            if frame.f_code.co_name == function and part in name:
                stack(what, frame)
    elif event == "c_call" and arg.__name__ in ("imdecode", "decode_jpeg"):
        stack("decode", frame)

def audit(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".csv") and "submissions" in str(arguments[1]):
        stack("submission.csv", sys._getframe(1))

sys.addaudithook(audit)
threading.setprofile(profile)
sys.argv = ["comp", *sys.argv[3:]]
from comp.engine import cli
sys.setprofile(profile)
try:
    code = cli.main(sys.argv[1:])
finally:
    sys.setprofile(None)
    stacks = {what: sorted(found) for what, found in path.items()}
    files = sorted(os.path.relpath(name, project) for name in ran)
    json.dump({"ran": files, "stacks": stacks}, open(target, "w"))
sys.exit(code)
"""


def traced(project: Path, *arguments: str) -> dict[str, Any]:
    """ran: files of the project in which a function was called. stacks: at each call of AT the project's
    files, innermost first."""
    target = project / "trace.json"
    comp(project, "-c", TRACE, str(project), str(target), *arguments)
    return json.loads(target.read_text())


def comp(project: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(project), "COMP_ROOT": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"{arguments[-3:]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def measured(folder: Path) -> dict[str, list[str]]:
    """Files that run, and the two reading paths: to the optimizer's step, and on to submission.csv."""
    shutil.rmtree(folder, ignore_errors=True)
    project = bake(copy_template(folder / "template"), folder, {})
    for verb in ("practice", "prepare", "folds"):
        comp(project, "-m", "comp", verb)
    quiet = ["machine.num_workers=0", "track.mode=none"]
    train = traced(project, "train", "exp001", "--fold", "0", *quiet)
    comp(project, "-m", "comp", "train", "exp001", *quiet)
    submit = traced(project, "submit", "exp001", "--dry-run")
    # The cache is filled in processes of its own; without one the decode stands on the stack of the loop.
    plain = traced(
        project,
        "train",
        "exp001",
        "--fold",
        "0",
        "--as",
        "plain",
        "data.cache=false",
        "train.epochs=2",
        *quiet,
    )
    stacks = train["stacks"] | {"decode": plain["stacks"]["decode"]}
    loop = stacks["optimizer.step"][0][0]
    # Validation, prediction and contact sheets call the same functions; only what the loop calls is on the
    # way to its step.
    to_step = {
        name
        for what in ("optimizer.step", "decode", "recipe", "network forward", "loss")
        for files in stacks[what]
        if loop in files
        for name in files
    }
    to_csv = {name for files in submit["stacks"]["submission.csv"] for name in files}
    return {"ran": train["ran"], "to the step": sorted(to_step), "to the csv": sorted(to_csv)}


def main() -> None:
    known = modules()
    arrows = graph(known)
    lines = {module: len(file.read_text().splitlines()) for module, file in known.items()}
    folders: dict[str, int] = {}
    for module, count in lines.items():
        if not page(module):
            folders[module.rpartition(".")[0]] = folders.get(module.rpartition(".")[0], 0) + count
    run = measured(CHECKOUT / "build" / "gauges")
    for name, value in {
        "files in comp/, in folders below it": (sum(map(page, known)), sum(not page(m) for m in known)),
        "lines in comp/, in folders below it": (
            sum(n for m, n in lines.items() if page(m)),
            sum(n for m, n in lines.items() if not page(m)),
        ),
        "longest file": max((n, m) for m, n in lines.items()),
        "ten largest folders": sorted(folders.items(), key=lambda item: -item[1])[:10],
        "import cycles": cycles(arrows),
        f"modules with more than {FAN_OUT} imports of ours": {
            m: len(a) for m, a in arrows.items() if len(a) > FAN_OUT
        },
        f"functions over {FUNCTION} lines": long_functions(known),
        f"lines over {COLUMNS} columns outside tables": sum(
            len(long_lines(file.read_text())) for file in known.values()
        ),
        "modules that run in comp train exp001 --fold 0": len(run["ran"]),
        "reading path to optimizer.step": (len(run["to the step"]), run["to the step"]),
        "reading path to submission.csv": (len(run["to the csv"]), run["to the csv"]),
    }.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
