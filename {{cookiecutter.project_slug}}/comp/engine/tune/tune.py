"""comp tune: searches, or confirms and exports what a search found."""

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
    """Options that have no effect together are refused before optuna is imported."""
    options = {"trials": trials, "hours": hours, "until": until, "on": on}
    searching = [f"--{name}" for name, value in options.items() if value is not None]
    finishing = "--export" if export is not None else "--confirm" if confirm is not None else ""
    if finishing and searching:
        what = f"has no effect with {finishing}, which runs no further trials"
        raise UserError("option-unused", where=searching[0], what=what, remedy="leave it out")
    if trial is not None and export is None:
        raise UserError("option-unused", where="--trial", what="has no effect without --export NAME")
    from comp.engine.tune import confirm as confirming
    from comp.engine.tune import export as exporting
    from comp.engine.tune import search

    if not finishing:
        search.tune(
            experiment,
            overrides,
            space_name=space,
            trials=trials,
            hours=hours,
            until=until,
            storage=storage,
            on=on,
        )
        return
    joined = search.join(experiment, overrides, space, storage)
    if confirm is not None:
        confirming.confirm(joined, confirm)
    if export is not None:
        exporting.export(joined, export, trial)
