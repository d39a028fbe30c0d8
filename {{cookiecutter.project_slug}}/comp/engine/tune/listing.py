"""comp studies: every study with what it found."""

from __future__ import annotations

import optuna

from comp.engine import text_table
from comp.engine.tune import live, report, search
from comp.engine.tune import storage as storages


def studies(storage: str | None) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lines = []
    for database, name in search.studies(storages.address("", storage) if storage else None):
        study = optuna.load_study(study_name=name, storage=database)
        count, best = report.state_of(study), search.best_of(study)
        told = best.user_attrs.get("result", {}).get("text", "-") if best else "-"
        setting = live.words(best.params) if best else "-"
        numbers = [str(count[state]) for state in ("complete", "pruned", "fail", "running", "waiting")]
        lines.append([name, *numbers, told, f"trial {best.number}: {setting}" if best else "-"])
    if not lines:
        print("no studies yet\nnext: comp tune exp001")
        return
    heading = ["study", "done", "pruned", "failed", "running", "queued", "best", "setting"]
    print(text_table.render(heading, lines, ["done", "pruned", "failed", "running", "queued"]))
    print("look closer: studies/<study>/report.html, or optuna-dashboard sqlite:///studies/<study>/study.db")
