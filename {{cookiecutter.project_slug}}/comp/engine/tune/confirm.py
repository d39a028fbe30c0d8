"""comp tune --confirm N: train the best N settings and the experiment's own again, on seeds that no trial has
used.

The best of many trials is in part the luckiest; scores on other seeds do not have that bias.
"""

from __future__ import annotations

from comp.engine import hardware
from comp.engine.errors import UserError
from comp.engine.run import loading
from comp.engine.store import artifacts, paths
from comp.engine.tune import objective, report
from comp.engine.tune.study import OpenStudy, setting_of

SEEDS = 3  # for each setting


def new_seeds(opened: OpenStudy) -> list[int]:
    first = opened.cfg.train.seeds[0]
    return [first + 1000 + i for i in range(1, SEEDS + 1)]


def confirm(opened: OpenStudy, n: int) -> None:
    if n < 1:
        raise UserError("option-value", where=f"--confirm {n}", what="must be 1 or more")
    hardware.set_threads(opened.cfg.train.threads)
    completed = opened.ranked()
    if not completed:
        raise UserError("study-empty", where=opened.name, what="no trial is complete yet")
    baseline = report.baseline(opened)
    chosen = completed[:n]
    if baseline is not None and baseline.number not in {t.number for t in chosen}:
        chosen.append(baseline)
    from comp.engine.run import execute  # imports torch

    stop = hardware.Stop()
    for trial in chosen:
        cfg = opened.config(setting_of(opened.space, trial))
        name = opened.run_name(trial)
        context = loading.start_run(name, cfg, opened.command)
        scores: list[float] = []
        for seed in new_seeds(opened):
            for fold in range(opened.n_folds):
                execute.run_fold(context, name, seed, fold, stop=stop, search=True)
                if stop.requested:
                    raise KeyboardInterrupt(f"trial {trial.number} seed {seed} fold {fold} is done")
            scores.append(float(objective.cv_score(opened, context, name, seed)["value"]))
        artifacts.write_json(
            paths.run_folder(name) / report.CONFIRMED, {"seeds": new_seeds(opened), "scores": scores}
        )
        print(
            f"trial {trial.number}: {report.mean_std(scores)} over {len(scores)} new seeds, "
            f"{trial.values[0]:.4f} in the search",
            flush=True,
        )
    report.write(opened)
    report.print_summary(opened)
