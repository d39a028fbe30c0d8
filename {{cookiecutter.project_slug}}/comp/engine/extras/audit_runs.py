"""For comp audit: everything that is checked of one run. Its pseudo-labels, log, stored predictions and
fitted statistics.

Every prediction set of a fold is checked: kept snapshots and other views as well as the run itself.
"""

from __future__ import annotations

from comp.engine import hardware
from comp.engine.config import experiments
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.extras import audit_log, audit_predictions, audit_pseudo, audit_statistics
from comp.engine.extras.findings import OF_RUNS, PREDICTIONS, PSEUDO, STATISTICS, Finding, NotChecked
from comp.engine.run import loading


def of_run(run: str, rows: Samples, split: Folds) -> list[Finding]:
    try:
        cfg = experiments.stored_config(run)
    except UserError as error:
        return [NotChecked(run, error.lines[0], (*OF_RUNS, PSEUDO))]
    found: list[Finding] = [*audit_pseudo.leaks(run, cfg, rows, split)]
    sets, unread = audit_predictions.fold_sets(run, rows, split)
    found += unread
    for file, stored in sets.items():
        folder = audit_predictions.fold_of(file)
        if file.parent == folder:
            found += audit_log.selected_epoch(folder, cfg, rows, split)
        found += audit_predictions.other_folds(file, stored)
    with_weights, gone = audit_predictions.split_by_weights(run, sets)
    found += gone
    if with_weights:
        try:
            hardware.set_threads(cfg.train.threads)
            context = loading.load_context(cfg)
        except UserError as error:
            return [*found, NotChecked(run, error.lines[0], (*PREDICTIONS, STATISTICS))]
        found += audit_predictions.repredict(context, with_weights)
        weights = list(dict.fromkeys(map(audit_predictions.weights_of, with_weights.values())))
        if audit_statistics.has_statistics(context):
            try:
                audit_pseudo.validate_labels(run, cfg, context.folds)
            except UserError as error:
                found.append(NotChecked(f"{run}, its statistics", error.lines[0], (STATISTICS,)))
            else:
                found += audit_statistics.leaks(context, weights)
    return found + list(audit_predictions.merged_again(run, rows, split))
