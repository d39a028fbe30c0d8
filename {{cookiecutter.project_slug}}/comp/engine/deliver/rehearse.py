"""comp kernel NAME --rehearse: run the bundle here as it will run on Kaggle, before anything is uploaded.

It runs twice: on a hidden test set (another size, new ids, a missing and a truncated image), and on the
visible one, whose predictions must equal the stored ones. In Linux namespaces there is no network, /kaggle is
where it is on Kaggle, and its inputs are read-only. Where namespaces are not permitted, sockets are blocked
inside Python instead, and the output says so.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import samples
from comp.engine.deliver import kernel, recheck, rehearsal_inputs, validate
from comp.engine.errors import UserError
from comp.engine.store import artifacts, locks, paths

NAMESPACES = """
set -e
new=$1; kaggle=$2; shift 2
mount -t tmpfs tmpfs "$new"
for entry in /*; do
  if [ "$entry" = /kaggle ]; then continue
  elif [ -L "$entry" ]; then cp -P "$entry" "$new$entry"
  elif [ -d "$entry" ]; then mkdir "$new$entry"; mount --rbind "$entry" "$new$entry"; fi
done
mkdir "$new/kaggle"; mount --bind "$kaggle" "$new/kaggle"
mount --bind "$kaggle/input" "$new/kaggle/input"; mount -o remount,bind,ro "$new/kaggle/input"
exec chroot "$new" "$@"
"""
BLOCKED = """
import socket
def connect(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("no network in a rehearsal")
    return original(self, address)
original = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = connect
def getaddrinfo(*args, **kwargs):
    raise OSError("no network in a rehearsal")
socket.getaddrinfo = getaddrinfo
"""


def file_of(name: str) -> Path:
    return kernel.folder(name) / "rehearsal.json"


def last_report(name: str) -> dict[str, Any]:
    """Of the last rehearsal; build and rehearse if there is none. That the kernel takes too long is not an
    error here."""
    if not file_of(name).exists():
        kernel.build(name)
        try:
            rehearse(name)
        except UserError:
            if not file_of(name).exists():
                raise
    return dict(artifacts.read_json(file_of(name)))


def rehearse(name: str, python: str = sys.executable) -> dict[str, Any]:
    cfg = resolve.load(paths.root(), "base").config
    folder = kernel.folder(name)
    content = kernel.bundle_hash(folder)
    # In the folder of the kernel, so that gigabytes are linked and not copied, and the next call removes what
    # a killed one left.
    with locks.lock(folder, f"rehearsing {name}"):
        temporary = folder / ".rehearsal"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            hidden = _run(cfg, name, temporary / "hidden", True, python)
            visible = _run(cfg, name, temporary / "visible", False, python)
            predictions = temporary / "visible" / "kaggle" / "working" / "predictions.npz"
            difference = recheck.compare_file(name, predictions, visible["tolerance"])
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    per_image = {address: seconds / visible["rows"] for address, seconds in visible["seconds"].items()}
    limits = cfg.competition.kernel
    hidden_rows = limits.hidden_rows or len(samples.load().positions("test"))
    report = {
        "bundle": content,
        "isolation": hidden["isolation"],
        "seconds_per_image": per_image,
        "start_seconds": visible["start_seconds"],
        "hidden_rows": hidden_rows,
        "gpus": hidden["gpus"],
        "seconds": visible["start_seconds"] + sum(per_image.values()) * hidden_rows,
        "peak": max(hidden["peak"], visible["peak"]),
        "max_difference": difference,
    }
    artifacts.write_json(file_of(name), report)
    _print(name, cfg, report, hidden, visible)
    _validate_limits(name, cfg, report)
    print(f'next: comp kernel {name} --push -m "…"')
    return report


def _print(
    name: str, cfg: Config, report: dict[str, Any], hidden: dict[str, Any], visible: dict[str, Any]
) -> None:
    limits = cfg.competition.kernel
    print(f"{name}: {report['isolation']}")
    print(
        f"hidden set of {hidden['rows']} rows with new ids, {hidden['damaged']} images damaged: "
        "submission.csv is valid"
    )
    print(
        f"visible set of {visible['rows']} rows: largest difference from the stored predictions "
        f"{report['max_difference']:.1e}"
    )
    print(
        f"{1000 * sum(report['seconds_per_image'].values()):.1f} ms an image, "
        f"{report['seconds'] / 3600:.2f} h for {report['hidden_rows']:,} rows on this machine "
        f"(limit {limits.hours:g} h); "
        f"memory {artifacts.format_size(report['peak'])} (limit {limits.ram:g} GB)"
    )
    if not limits.hidden_rows:
        print("competition.kernel.hidden_rows is not declared; assumed the number of visible test rows")


def _validate_limits(name: str, cfg: Config, report: dict[str, Any]) -> None:
    limits = cfg.competition.kernel
    if report["seconds"] > limits.hours * 3600:
        raise UserError(
            "kernel-time",
            where=name,
            what=f"takes {report['seconds'] / 3600:.1f} h on this machine, {limits.hours:g} h are allowed",
            remedy=f"comp kernel {name} --budget {limits.hours:g}h drops the members that gain least",
        )
    if report["peak"] > limits.ram * 1e9:
        raise UserError(
            "kernel-memory",
            where=name,
            what=f"needs {artifacts.format_size(report['peak'])} of memory, "
            f"competition.kernel.ram allows {limits.ram:g} GB",
            remedy="set predict.batch_size lower",
        )


def _run(cfg: Config, name: str, folder: Path, hidden: bool, python: str) -> dict[str, Any]:
    """One run of the bundle; its report, with the kind of isolation and the tolerance of its predictions."""
    competition = cfg.competition
    place, slug = folder / "kaggle", kernel.slug(name)
    (place / "working").mkdir(parents=True)
    (place / "input").mkdir()
    command, environment, isolation = _isolated(place, folder, python, slug)
    weaker = isolation.startswith("weaker")
    rehearsal_inputs.lay_out(competition, place / "input" / competition.slug, hidden, linked=not weaker)
    rehearsal_inputs.link_folder(kernel.folder(name) / "bundle", place / "input" / slug)
    if weaker:
        environment["COMP_KAGGLE"] = str(place)
    done = subprocess.run(
        command,
        env=environment,
        cwd=place / "working",
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: _limit_memory(competition.kernel.ram),
    )
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()[-15:]
        raise UserError(
            "rehearsal-failed",
            where=name,
            what=f"the rehearsal on the {'hidden' if hidden else 'visible'} test set failed ({isolation}) "
            f"with exit code {done.returncode}; its output ends:",
            others=[UserError("rehearsal-failed", what=line) for line in output],
        )
    submission = place / "working" / "submission.csv"
    validate.validate_declared(
        submission, "submission.csv", place / "input" / competition.slug, competition, samples.load().heads
    )
    return {
        **artifacts.read_json(place / "working" / "report.json"),
        "isolation": isolation,
        "tolerance": recheck.tolerance([run["run"] for run in kernel.member_runs(name)]),
    }


def _isolated(place: Path, folder: Path, python: str, slug: str) -> tuple[list[str], dict[str, str], str]:
    """(command, environment, description of the isolation)."""
    run = [python, "-m", "comp", "predict", "--kernel"]
    dropped = ("COMP_ROOT", "PYTHONPATH", "COMP_KAGGLE")
    environment = {
        key: value for key, value in os.environ.items() if key not in dropped and "proxy" not in key.lower()
    }
    environment |= {"COMP_REHEARSAL": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    root = folder / "root"
    root.mkdir()
    (place / "tmp").mkdir()
    setup = ["--mount", "--net", "sh", "-c", NAMESPACES, "sh", str(root), str(place)]
    unshare, as_root = ["unshare", "--user", "--map-root-user", *setup], ["unshare", *setup]
    # Workers of the data loader use sockets in the temporary folder, whose paths are limited to about a
    # hundred characters.
    inside = ["env", "-C", "/kaggle/working", f"PYTHONPATH=/kaggle/input/{slug}", "TMPDIR=/kaggle/tmp"]
    for command in (unshare, as_root):
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            return (
                [*command, *inside, *run],
                environment,
                "rehearsed in an isolated process: no network, /kaggle as on Kaggle, inputs read-only",
            )
    guard = folder / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(BLOCKED)
    environment["PYTHONPATH"] = f"{guard}{os.pathsep}{place / 'input' / slug}"
    return (
        run,
        environment,
        "weaker: Linux namespaces are not permitted here, so sockets were blocked inside Python, and inputs "
        "could be written",
    )


def _limit_memory(gigabytes: float) -> None:
    """Limits memory that is really used. Not with a GPU, whose address space counts too: there it is only
    measured."""
    if not Path("/dev/nvidia0").exists():
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9),) * 2)
