"""--confirm N: the best N settings and the experiment's own once more, on seeds that no trial has seen.

The winner of many trials is in part the luckiest; on fresh seeds the luck is gone.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import TrialState

from comp.engine import hardware
from comp.engine.bank import bank, predictions, score
from comp.engine.errors import Refused
from comp.engine.run import execute, loading
from comp.engine.store import artifacts, paths
from comp.engine.tune import report
from comp.engine.tune.confirmed import fresh, spread
from comp.engine.tune.study import Joined, setting_of
from comp.engine.tune.trial import config_of, count_of, name_of, ranked


def confirm(joined: Joined, n: int) -> None:
    if n < 1:
        raise Refused(f"--confirm {n}: must be 1 or more")
    hardware.set_threads(joined.cfg.train.threads)
    done = [t for t in joined.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if not done:
        raise Refused(f"{joined.name}: no trial is complete yet, so there is nothing to confirm")
    begun = report.baseline(joined)
    chosen = ranked(joined, done)[:n]
    if begun is not None and begun.number not in {t.number for t in chosen}:
        chosen.append(begun)
    stop = hardware.Stop()
    for trial in chosen:
        cfg = config_of(joined, setting_of(joined.space, trial))
        name = name_of(joined, trial)
        context = loading.start_run(name, cfg, f"comp tune {joined.experiment} --space {joined.space.name}")
        values: list[float] = []
        for seed in fresh(joined):
            for number in range(count_of(joined)):
                execute.run_fold(context, name, seed, number, stop=stop, search=True)
                if stop.requested:
                    raise KeyboardInterrupt(f"trial {trial.number} seed {seed} fold {number} is done")
            values.append(_score(joined, context, name, seed))
        artifacts.write_json(
            paths.run_folder(name) / "confirmed.json", {"seeds": fresh(joined), "scores": values}
        )
        print(
            f"trial {trial.number}: {spread(values)} over {len(values)} fresh seeds, {trial.values[0]:.4f} in the search",
            flush=True,
        )
    report.write(joined)
    report.tell(joined)


def _score(joined: Joined, context: Any, name: str, seed: int) -> float:
    facts = (context.samples, context.folds)
    sets = [
        bank.read(paths.fold_folder(name, seed, n) / "oof.arrow", *facts) for n in range(count_of(joined))
    ]
    record = score.evaluate(
        context.cfg, *facts, predictions.merge(sets, *facts, context.cfg.predict.averaging_space)
    )
    value = record["oof"] if record["oof"] is not None else record["mean"]
    if value is None:
        raise Refused(score.summary(record))
    return float(value)
