"""comp ledger: all submissions as a table, how well CV and public score agree, and which two to select as
final."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.deliver import ledger, shake_up, submit
from comp.engine.deliver.ledger import Entry, cv_score
from comp.engine.errors import UserError
from comp.engine.run import tracking
from comp.engine.store import artifacts, paths

COLUMNS = ["ref", "sent", "name", "kind", "CV", "public", "private", "status", "message"]


def leaderboard() -> int:
    """The exit code: 2 if Kaggle could not be reached and the ledger is printed as it was."""
    cfg = resolve.load(paths.root(), "base").config
    error: UserError | None = None
    try:
        entries = submit.sync(cfg)
    except UserError as caught:
        error, entries = caught, ledger.submissions(cfg.competition.slug)
    for line in error.lines if error else []:
        print(f"{line}\nso the ledger is printed without new scores:")
    if not entries:
        print('nothing was sent yet\nnext: comp submit NAME -m "what is new"')
        return 2 if error else 0
    print(text_table.render(COLUMNS, [_table_row(entry) for entry in entries]))
    scored = [entry for entry in entries if entry["public"] is not None and cv_score(entry) is not None]
    lines = agreement(scored) if len(scored) > 1 else []
    table = samples.load() if paths.samples_file().exists() else None
    if table is not None and scored:
        split = folds.load(table)
        lines += shake_up.simulate(cfg, scored, table, split)
        lines += shake_up.final_two(cfg, scored, table, split)
    for line in lines:
        print(line)
    if len(scored) > 1:
        image = plot(cfg, scored)
        _log_to_wandb(cfg, scored, lines, image)
        print(f"written: {paths.relative(image)}")
    print(f"written: {paths.relative(ledger.file())}")
    print("next: select the final two on the competition's submissions page")
    return 2 if error else 0


def _table_row(entry: Entry) -> list[str]:
    numbers = [
        "-" if value is None else f"{value:.5g}"
        for value in (cv_score(entry), entry["public"], entry["private"])
    ]
    sent = [str(entry["number"]), str(entry["at"])[:16], entry["name"] or "(elsewhere)", entry["kind"]]
    return [*sent, *numbers, entry["status"] or "PENDING", entry["message"][:40]]


def agreement(scored: Sequence[Entry]) -> list[str]:
    """How well the CV score orders the public scores; entries are oldest first."""
    cv, public = _cv_and_public(scored)
    lines = [
        f"rank correlation of CV and public score over {len(scored)} submissions: "
        f"{rank_correlation(cv, public):.2f}"
    ]
    changes = [(a, b) for a, b in zip(np.sign(np.diff(cv)), np.sign(np.diff(public)), strict=True) if a and b]
    if changes:
        same = sum(a == b for a, b in changes)
        lines.append(f"consecutive changes of the same sign: {same} of {len(changes)}")
    return lines


def _cv_and_public(scored: Sequence[Entry]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        np.array([cv_score(entry) for entry in scored], np.float64),
        np.array([entry["public"] for entry in scored], np.float64),
    )


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's; NaN where one of them is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    std = [rank.std() for rank in ranks]
    return (
        float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (std[0] * std[1]))
        if all(std)
        else float("nan")
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((count.cumsum() - (count - 1) / 2)[place], np.float64)


def plot(cfg: Config, scored: Sequence[Entry]) -> Path:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    points = [(float(cv_score(entry) or 0), float(entry["public"]), entry["name"]) for entry in scored]
    axes.scatter([x for x, *_ in points], [y for _, y, _ in points], s=24)
    for x, y, name in points:
        axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(
        xlabel=f"CV, {scored[-1]['cv']['metric']}",
        ylabel="public score",
        title=cfg.competition.slug,
    )
    file = paths.path("submissions", "scores.png")
    with artifacts.atomic(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return file


def _log_to_wandb(cfg: Config, scored: Sequence[Entry], lines: Sequence[str], image: Path) -> None:
    """One W&B run for all submissions, logged again when something changed."""
    folder = paths.path("submissions", "tracked", "leaderboard")
    scores = [[entry["number"], entry["public"], entry["private"]] for entry in scored]
    logged = {"lines": list(lines), "scores": scores}
    if (folder / "logged.json").exists() and artifacts.read_json(folder / "logged.json") == logged:
        return
    slug = cfg.competition.slug
    with tracking.open_log(
        folder,
        run_id=f"submissions-{slug}",
        name="submissions",
        group="submissions",
        job_type="submit",
        config={"competition": {"slug": slug}},
        settings=cfg.track,
    ) as log:
        log.image("cv_against_leaderboard", image)
        log.summary(
            {
                "submissions": len(scored),
                "rank_correlation": rank_correlation(*_cv_and_public(scored)),
                "summary": "\n".join(lines),
            }
        )
    artifacts.write_json(folder / "logged.json", logged)
