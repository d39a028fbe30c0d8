"""comp check: reports what later verbs would not accept, before it costs a training run.

Each check is a function of the module that it concerns, and returns faults and notes.
"""

from __future__ import annotations

from collections.abc import Sequence

from comp.engine import hardware, pages
from comp.engine.bank import score
from comp.engine.config import experiments, resolve
from comp.engine.config.schema import Config
from comp.engine.data import check_data
from comp.engine.deliver import dummy_submission
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

SHOWN = 50  # lines printed; data/check.txt has all


def check(experiment: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Exit code 2 if there is a fault. Without an experiment images are decoded small, and torch is not
    imported."""
    if experiment is None:
        return 2 if run(resolve.load(paths.root(), "base").config) else 0
    cfg = experiments.load(experiment, overrides).config
    hardware.set_threads(cfg.train.threads)
    return 2 if run(cfg, exact=True) else 0


def run(cfg: Config, exact: bool = False) -> list[UserError]:
    """Prints and returns the faults. `exact`: also decode as `cfg` does and run its network on an image."""
    faults, notes = _checks(cfg, exact)
    faults = list({fault.line: fault for fault in faults}.values())
    file = paths.path("data", "check.txt")
    lines = [fault.line for fault in faults]
    artifacts.write_text(file, "\n".join([*notes, *lines]) + "\n")
    for part in (notes, lines):
        print(*part[:SHOWN], sep="\n", end="\n" if part else "")
        if len(part) > SHOWN:
            print(f"and {len(part) - SHOWN} more, all in {paths.relative(file)}")
    print(f"{len(faults)} error{'s' * (len(faults) != 1)}")
    if not faults:
        print(f"next: comp {_next_verb()}")
    return faults


def _next_verb() -> str:
    if not paths.samples_file().is_file():
        return "prepare"
    return "train exp001" if paths.folds_file().is_file() else "folds"


def _checks(cfg: Config, exact: bool) -> tuple[list[UserError], list[str]]:
    notes = [f"comp/competition.py defines {', '.join(pages.in_force()) or 'nothing'}"]
    faults = score.check_metric(cfg)
    try:
        data = check_data.check(cfg, exact)
    except UserError as error:
        return [*faults, *error.errors], notes
    faults += data.faults
    notes += data.notes
    if data.sample_fits:  # otherwise the made-up submission fails for the same reason
        faults += dummy_submission.check(cfg, data.prepared)
    if exact:
        from comp import models

        network_faults, network_notes = models.check_report(cfg)
        faults += network_faults
        notes += network_notes
    return faults, notes
