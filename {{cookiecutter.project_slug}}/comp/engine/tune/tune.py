"""comp tune: search, or confirm and export what a search found."""

from __future__ import annotations

from comp.engine.errors import UserError


def tune(
    experiment: str,
    overrides: list[str],
    *,
    space: str,
    trials: int | None = None,
    hours: float | None = None,
    until: str | None = None,
    storage: str | None = None,
    on: str | None = None,
    confirm: int | None = None,
    export: str | None = None,
    trial: int | None = None,
) -> None:
    """Options without effect are reported before optuna is imported."""
    options = {"trials": trials, "hours": hours, "until": until, "on": on}
    searching = [f"--{name}" for name, value in options.items() if value is not None]
    finishing = "--export" if export is not None else "--confirm" if confirm is not None else ""
    if finishing and searching:
        what = f"has no effect with {finishing}, which runs no further trials"
        raise UserError("option-unused", where=searching[0], what=what, remedy="leave it out")
    if trial is not None and export is None:
        raise UserError("option-unused", where="--trial", what="has no effect without --export NAME")
    from comp.engine.tune.confirm import confirm as confirm_best
    from comp.engine.tune.export import export as export_trial
    from comp.engine.tune.open_study import open_study
    from comp.engine.tune.search import search

    if not finishing:
        search(
            experiment,
            overrides,
            space=space,
            trials=trials,
            hours=hours,
            until=until,
            storage=storage,
            on=on,
        )
        return
    opened = open_study(experiment, overrides, space, storage)
    if confirm is not None:
        confirm_best(opened, confirm)
    if export is not None:
        export_trial(opened, export, trial)
