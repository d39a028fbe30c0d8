"""The result of a study: plots, report.html, a W&B run, and how far the best trial is ahead of the
experiment. Also comp studies, the table of all studies."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from comp.engine import text_table
from comp.engine.bank import score
from comp.engine.report import html
from comp.engine.run import tracking
from comp.engine.store import artifacts, locks, paths
from comp.engine.tune import live
from comp.engine.tune.storage import all_studies, best_trial, url_of
from comp.engine.tune.study import OpenStudy, budgeted, setting_of

MIN_FOR_IMPORTANCE = 4  # completed trials
CONFIRMED = "confirmed.json"  # of a trial's run: its scores on the seeds of --confirm
SIGNIFICANT = 2.0  # standard errors between a difference and 0


def write(opened: OpenStudy) -> list[Path]:
    """studies/<name>/*.png and report.html, and the W&B run of the study."""
    completed = opened.ranked()
    if not completed:
        return []
    with locks.lock(opened.folder, "writing its report", wait=True):
        images = _plots(opened, completed)
        _write_html(opened, images)
        with tracking.open_log(
            opened.folder,
            run_id=f"{opened.name}-{opened.study.user_attrs['token']}-study",
            name=opened.name,
            group=opened.name,
            job_type="study",
            config=opened.cfg.model_dump(),
            settings=opened.cfg.track,
        ) as log:
            for image in images:
                log.image(image.stem, image)
            best = completed[0]
            log.summary(
                {"best_trial": best.number, "best_value": best.values[0], **setting_of(opened.space, best)}
            )
    return images


def _plots(opened: OpenStudy, completed: list[FrozenTrial]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as plots

    study, two = opened.study, len(opened.study.directions) > 1
    searched = {key for t in completed for key in t.params}
    varied = {key for key in searched if len({str(t.params.get(key)) for t in completed}) > 1}
    target: dict[str, Any] = {"target": lambda t: t.values[0], "target_name": "score"} if two else {}
    by_name: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, **target),
        "slice": lambda: plots.plot_slice(study, **target),
    }
    if len(completed) >= MIN_FOR_IMPORTANCE and varied:
        by_name["importance"] = lambda: plots.plot_param_importances(study, **target)
    if two:
        by_name["pareto"] = lambda: plots.plot_pareto_front(study, target_names=list(opened.space.objectives))
    return [_save(plot, opened.folder / f"{name}.png") for name, plot in by_name.items()]


def _save(plot: Callable[[], Any], file: Path) -> Path:
    import matplotlib.pyplot as plt
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, tight layout
        figure = np.ravel(plot())[0].figure
        with artifacts.atomic(file) as temporary:
            figure.savefig(temporary, format="png", dpi=90, bbox_inches="tight")
    plt.close("all")
    return file


def _write_html(opened: OpenStudy, images: list[Path]) -> Path:
    rows = [
        [
            str(t.number),
            t.state.name.lower(),
            " ".join(f"{v:.4f}" for v in t.values or []),
            live.setting_text(setting_of(opened.space, t)),
            str(t.user_attrs.get("error", {}).get("message", t.user_attrs.get("from", ""))),
        ]
        for t in budgeted(opened.trials())
    ]
    columns = ["trial", "state", ", ".join(opened.space.objectives), "setting", "note"]
    return html.write(opened.folder / "report.html", opened.name, summary(opened), columns, rows, images)


# --- best trial against the experiment ----------------------------------------------------------------------


def baseline(opened: OpenStudy) -> FrozenTrial | None:
    """The completed trial with the experiment's own setting."""
    trials = (t for t in opened.trials() if t.state == TrialState.COMPLETE)
    return next((t for t in trials if t.user_attrs.get("from") == opened.experiment), None)


def summary(opened: OpenStudy) -> list[str]:
    completed = opened.ranked()
    if not completed:
        return [f"{opened.name}: no trial is complete yet"]
    best, first = completed[0], baseline(opened)
    setting = live.setting_text(setting_of(opened.space, best))
    lines = [f"best: trial {best.number}, {best.user_attrs['result']['text']}: {setting}"]
    if len(opened.study.directions) > 1:
        front = ", ".join(
            f"trial {t.number} ({t.values[0]:.4f}, {t.values[1]:.3f} ms)" for t in opened.study.best_trials
        )
        lines.append(f"Pareto front of score and time an image: {front}")
    if first is None:
        lines.append(
            f"{opened.experiment} itself is not among the completed trials, so nothing is compared with it"
        )
    elif first.number == best.number:
        lines.append(f"no trial is better than {opened.experiment} itself")
    else:
        lines.append(compared_with_baseline(opened, best, first))
    return lines


def compared_with_baseline(opened: OpenStudy, best: FrozenTrial, baseline: FrozenTrial) -> str:
    """On the seeds of --confirm if both were confirmed; otherwise on the one seed of the search."""
    confirmed = confirmed_scores(opened)
    if best.number in confirmed and baseline.number in confirmed:
        return compared_on_seeds(opened, best.number, baseline.number, confirmed)
    gain = abs(best.values[0] - baseline.values[0])
    return (
        f"{gain:.4f} ahead of {opened.experiment} ({baseline.values[0]:.4f}) on one seed, as the best of "
        f"{len(opened.ranked())}, which is optimistic; "
        f"{opened.command} --confirm 3 measures it on new seeds"
    )


def confirmed_scores(opened: OpenStudy) -> dict[int, list[float]]:
    """trial -> scores on the seeds of --confirm, of those that were confirmed on this machine."""
    found = {}
    for trial in opened.ranked():
        file = paths.run_folder(opened.run_name(trial)) / CONFIRMED
        if file.exists():
            found[trial.number] = artifacts.read_json(file)["scores"]
    return found


def compared_on_seeds(opened: OpenStudy, best: int, baseline: int, scores: dict[int, list[float]]) -> str:
    """Mean of the paired differences with its standard error."""
    sign = score.metric_of(opened.cfg).sign
    gains = [sign * (a - b) for a, b in zip(scores[best], scores[baseline], strict=True)]
    gain, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    if abs(gain) > SIGNIFICANT * error:
        conclusion = f"{'better' if gain > 0 else 'worse'}, beyond the noise of seeds"
    else:
        conclusion = "within the noise of seeds"
    return (
        f"trial {best} against {opened.experiment} on {len(gains)} new seeds: "
        f"{mean_std(scores[best])} against {mean_std(scores[baseline])}, "
        f"{sign * gain:+.4f} ± {error:.4f}: {conclusion}"
    )


def mean_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


# --- printing -----------------------------------------------------------------------------------------------


def print_summary(opened: OpenStudy) -> None:
    for line in summary(opened):
        print(line)
    trials = budgeted(opened.trials())
    ended = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL) for t in trials)
    folder = paths.relative(opened.folder)
    print(
        f"{opened.name}: {ended} of {opened.max_trials} trials; written: {folder}/report.html and its plots"
    )
    if any(t.state == TrialState.COMPLETE for t in trials):
        print(f"next: {opened.command} --export NAME writes configs/NAME.yaml")


def print_studies(storage: str | None) -> None:
    """comp studies: every study with its best trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    studies = all_studies(url_of("", storage) if storage else None)
    rows = [_study_row(database, name) for database, name in studies]
    if not rows:
        print("no studies yet\nnext: comp tune exp001")
        return
    numbers = ["done", "pruned", "failed", "running", "queued"]
    print(text_table.render(["study", *numbers, "best", "setting"], rows, numbers))
    print("details: studies/<study>/report.html, or optuna-dashboard sqlite:///studies/<study>/study.db")


def _study_row(database: optuna.storages.RDBStorage, name: str) -> list[str]:
    study = optuna.load_study(study_name=name, storage=database)
    trials, best = budgeted(study.get_trials(deepcopy=False)), best_trial(study)
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING)
    counts = [str(sum(t.state == state for t in trials)) for state in states]
    if best is None:
        return [name, *counts, "-", "-"]
    text = best.user_attrs.get("result", {}).get("text", "-")
    return [name, *counts, text, f"trial {best.number}: {live.setting_text(best.params)}"]
