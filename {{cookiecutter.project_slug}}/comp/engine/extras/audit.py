"""comp audit: searches the samples, folds, runs and ensembles of this project for leaks.

duplicates across folds               bytes of every training image, in archives too
a split group                         groups of the samples against the folds
in-sample base predictions            the weights a set names; some rows again, by the weights of the fold
misaligned rows                       some rows again; folds and seeds merged again
statistics fitted on validation rows  mean, deviation and whitening of the training part again
best epoch picked on the scored fold  log.jsonl against the score of the OOF rows
in-sample meta-model                  the ensemble fitted again, fold by fold
pseudo-labels from models trained on the fold    the models that made them; the labels made again

What could not be checked is listed too, and so is whatever was selected on the rows that it is scored on
(selected_on_fold). That the engine itself does not leak is tested in the template's own tests
(tests/engine/test_coin_flips.py).
"""

from __future__ import annotations

from comp.engine import text_table
from comp.engine.config import resolve
from comp.engine.data import folds, samples
from comp.engine.data.samples import Samples
from comp.engine.extras import audit_ensembles, audit_folds, audit_runs, findings
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.store import artifacts, paths


def audit() -> int:
    """Prints what was checked and every leak. Exit code 1 if there is one."""
    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    runs = [
        folder.name
        for folder in sorted(paths.path("runs").glob("*"))
        if artifacts.manifest_entry(folder / "config.yaml") and folder.name[0] != "."
    ]
    folders = sorted(paths.path("ensembles").glob("*"))
    ensembles = [folder.name for folder in folders if artifacts.manifest_entry(folder / "apply.json")]
    found: list[Finding] = [
        *audit_folds.duplicates(cfg, rows, split),
        *audit_folds.groups(rows, split),
        *audit_folds.pseudo_sources(rows, split),
    ]
    for run in runs:
        found += audit_runs.of_run(run, rows, split)
    for name in ensembles:
        found += audit_ensembles.of_ensemble(name, cfg, rows, split)
    print(
        f"checked: {len(rows.positions('train'))} training rows, runs {', '.join(runs) or '-'}, "
        f"ensembles {', '.join(ensembles) or '-'}"
    )
    for line in audit_ensembles.selected_on_fold():
        print(line)
    leaks = [finding for finding in found if isinstance(finding, Leak)]
    gaps = [finding for finding in found if isinstance(finding, NotChecked)]
    for gap in gaps:
        print(f"not checked: {gap.what}: {gap.reason}")
    if leaks:
        print(text_table.render(["LEAK", "where", "found by"], [[*leak] for leak in leaks]))
    print(text_table.render(["check", "result"], _by_check(found, rows, runs, ensembles)))
    also = f"; {len(gaps)} not checked, see above" if gaps else ""
    print(f"{len(leaks) or 'no'} leak{'s' * (len(leaks) != 1)}{also}\nnext: comp runs")
    return 1 if leaks else 0


def _by_check(found: list[Finding], rows: Samples, runs: list[str], ensembles: list[str]) -> list[list[str]]:
    """A line per check: its leaks, what it left out, or that there was nothing to check."""
    absent = {
        findings.GROUPS: "" if "group" in rows.frame else "the samples have no groups",
        findings.META_MODEL: "" if ensembles else "there are no ensembles",
    } | dict.fromkeys(findings.OF_RUNS, "" if runs else "there are no runs")
    lines = []
    for check in (
        findings.DUPLICATES,
        findings.GROUPS,
        *findings.OF_RUNS,
        findings.META_MODEL,
        findings.PSEUDO,
    ):
        leaks = sum(isinstance(finding, Leak) and finding.name == check for finding in found)
        gaps = sum(isinstance(finding, NotChecked) and check in finding.checks for finding in found)
        result = f"{leaks} leak{'s' * (leaks != 1)}" if leaks else "no leak found"
        if gaps:
            result += f", {gaps} not checked"
        lines.append([check, f"not checked: {absent[check]}" if absent.get(check) else result])
    other = sum(isinstance(finding, Leak) and " that differ from " in finding.name for finding in found)
    lines.append(["values that differ when computed again", str(other) if other else "none found"])
    return lines
