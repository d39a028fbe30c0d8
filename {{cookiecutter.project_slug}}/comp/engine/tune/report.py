"""What a study found: pictures, a page, and how far the winner is ahead of where the search began."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from comp.engine.report import html
from comp.engine.run import tracking
from comp.engine.store import artifacts, locks, paths
from comp.engine.tune import confirmed, live
from comp.engine.tune.study import counted, setting_of
from comp.engine.tune.trial import ranked

if TYPE_CHECKING:
    from comp.engine.tune.study import Joined

MANY = 4  # completed trials that a picture of importance needs


def write(joined: Joined) -> list[Path]:
    """studies/<name>/*.png and report.html, and a W&B run that speaks for the study."""
    done = [t for t in joined.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if not done:
        return []
    with locks.lock(joined.folder, "writing its report", wait=True):
        images = _pictures(joined, done)
        _page(joined, images)
        with tracking.open_log(
            joined.folder,
            run_id=f"{joined.name}-{joined.study.user_attrs['birth']}-study",
            name=joined.name,
            group=joined.name,
            job_type="study",
            config=joined.cfg.model_dump(),
            settings=joined.cfg.track,
        ) as log:
            for image in images:
                log.image(image.stem, image)
            best = ranked(joined, done)[0]
            log.summary(
                {"best_trial": best.number, "best_value": best.values[0], **setting_of(joined.space, best)}
            )
    return images


def _pictures(joined: Joined, done: list[FrozenTrial]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as plots

    study, two = joined.study, len(joined.study.directions) > 1
    searched = {key for t in done for key in t.params}
    varied = {key for key in searched if len({str(t.params.get(key)) for t in done}) > 1}
    target: dict[str, Any] = {"target": lambda t: t.values[0], "target_name": "score"} if two else {}
    wanted: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, **target),
        "slice": lambda: plots.plot_slice(study, **target),
    }
    if len(done) >= MANY and varied:
        wanted["importance"] = lambda: plots.plot_param_importances(study, **target)
    if two:
        wanted["pareto"] = lambda: plots.plot_pareto_front(study, target_names=list(joined.space.objectives))
    return [_drawn(draw, joined.folder / f"{name}.png") for name, draw in wanted.items()]


def _drawn(draw: Callable[[], Any], file: Path) -> Path:
    import matplotlib.pyplot as plt
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, tight layout
        figure = np.ravel(draw())[0].figure
        with artifacts.atomic(file) as temporary:
            figure.savefig(temporary, format="png", dpi=90, bbox_inches="tight")
    plt.close("all")
    return file


def _page(joined: Joined, images: list[Path]) -> Path:
    trials = counted(joined.study.get_trials(deepcopy=False))
    rows = [
        [
            str(t.number),
            t.state.name.lower(),
            " ".join(f"{v:.4f}" for v in t.values or []),
            live.words(setting_of(joined.space, t)),
            str(t.user_attrs.get("error", {}).get("message", t.user_attrs.get("from", ""))),
        ]
        for t in trials
    ]
    heads = ["trial", "state", ", ".join(joined.space.objectives), "setting", "note"]
    return html.write(joined.folder / "report.html", joined.name, sentences(joined), heads, rows, images)


def baseline(joined: Joined) -> FrozenTrial | None:
    """The trial with the experiment's own setting."""
    done = [t for t in joined.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    return next((t for t in done if t.user_attrs.get("from") == joined.experiment), None)


def sentences(joined: Joined) -> list[str]:
    done = [t for t in joined.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if not done:
        return [f"{joined.name}: no trial has ended yet"]
    best, begun = ranked(joined, done)[0], baseline(joined)
    lines = [
        f"best: trial {best.number}, {best.user_attrs['result']['text']}: {live.words(setting_of(joined.space, best))}"
    ]
    if len(joined.study.directions) > 1:
        front = ", ".join(
            f"trial {t.number} ({t.values[0]:.4f}, {t.values[1]:.3f} ms)" for t in joined.study.best_trials
        )
        lines.append(f"front of score and time an image: {front}")
    if begun is None:
        lines.append(
            f"{joined.experiment} itself is not among the completed trials, so there is nothing to compare with"
        )
    elif begun.number == best.number:
        lines.append(f"nothing beats {joined.experiment} as it stands")
    else:
        lines.append(versus(joined, best, begun))
    return lines


def versus(joined: Joined, best: FrozenTrial, begun: FrozenTrial) -> str:
    """By the seeds of --confirm where there are any; otherwise one seed each says little, and that is said."""
    fresh = confirmed.scores(joined)
    if best.number in fresh and begun.number in fresh:
        return confirmed.verdict(joined, best.number, begun.number, fresh)
    gain = abs(best.values[0] - begun.values[0])
    return (
        f"{gain:.4f} ahead of {joined.experiment} ({begun.values[0]:.4f}) on one seed, as the best of "
        f"{sum(t.state == TrialState.COMPLETE for t in joined.study.trials)}: part of it is luck; "
        f"comp tune {joined.experiment} --space {joined.space.name} --confirm 3 says how much"
    )


def tell(joined: Joined) -> None:
    for line in sentences(joined):
        print(line)
    trials = counted(joined.study.get_trials(deepcopy=False))
    ended = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL) for t in trials)
    print(
        f"{joined.name}: {ended} of {joined.total} trials; written: {paths.relative(joined.folder)}/report.html and its pictures"
    )
    if any(t.state == TrialState.COMPLETE for t in trials):
        print(
            f"next: comp tune {joined.experiment} --space {joined.space.name} --export NAME writes configs/NAME.yaml"
        )


def state_of(study: optuna.Study) -> dict[str, int]:
    trials = counted(study.get_trials(deepcopy=False))
    return {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState}
