"""How much of a leaderboard score is luck: public and private leaderboards simulated by resampling OOF rows,
and which two submissions to select as final."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.bank import bank, nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.deliver.ledger import Entry, cv_score
from comp.engine.ensemble import comparison
from comp.engine.errors import UserError
from comp.engine.store import artifacts

DRAWS = 300  # simulated pairs of a public and a private leaderboard
PUBLIC_SHARE = 0.3  # of the test rows, if competition.submission.public is not declared
LATEST = 20  # submissions that are simulated


def simulate(cfg: Config, scored: Sequence[Entry], table: Samples, split: Folds) -> list[str]:
    """Resample OOF rows to leaderboards of the real sizes: the noise of a public score, and how far places
    move."""
    share = cfg.competition.submission.public
    assumed = "" if share else " (assumed: competition.submission.public is not declared)"
    share = share or PUBLIC_SHARE
    scorers = []
    for entry in _current(scored)[-LATEST:]:
        try:
            scorers.append(_scorer(cfg, entry["name"], table, split))
        except (UserError, MetricUndefined):
            continue  # its predictions are gone, or belong to other folds
    if not scorers:
        return []
    boards = _boards(cfg, scorers, share, table, split)
    valid = np.isfinite(boards).all(axis=(0, 2))
    if valid.sum() < DRAWS / 2:
        return ["shake-up: too few rows of some class to simulate leaderboards"]
    public, private = boards[:, valid]
    noise = public.std(axis=0, ddof=1).max()
    lines = [
        f"shake-up: at a public share of {share:.0%}{assumed} chance alone moves a public score by "
        f"± {noise:.4f}"
    ]
    if len(scorers) > 1:
        places = [board.argsort(axis=1)[:, ::-1].argsort(axis=1) for board in (public, private)]
        stays_first = np.mean(public.argmax(axis=1) == private.argmax(axis=1))
        moved = np.abs(places[0] - places[1]).mean()
        lines.append(
            f"  of {len(scorers)} submissions the public best is also the private best in "
            f"{stays_first:.0%} of {int(valid.sum())} simulations; a place moves by {moved:.1f} on average"
        )
    return lines


def _boards(
    cfg: Config, scorers: Sequence[comparison.Scorer], share: float, table: Samples, split: Folds
) -> NDArray[np.float64]:
    """(public and private, draws, submissions): scores with their sign, so that more is better; NaN where
    undefined."""
    rng = np.random.default_rng(0)
    n_test = len(set(table.frame["row"].to_numpy()[table.positions("test")]))
    sign = score.metric_of(cfg).sign
    oof, groups = _oof_rows(table, split)
    codes = nested_cv.group_codes(np.arange(len(oof)) if groups is None else groups)
    units = int(codes.max()) + 1
    boards = np.full((2, DRAWS, len(scorers)), np.nan)
    for board, size in enumerate((share, 1 - share)):
        count = max(2, round(units * n_test * size / len(oof)))
        for i in range(DRAWS):
            times = np.bincount(rng.integers(0, units, count), minlength=units)[codes]
            for j, scorer in enumerate(scorers):
                try:
                    boards[board, i, j] = sign * scorer(times)
                except MetricUndefined:
                    continue
    return boards


def final_two(cfg: Config, scored: Sequence[Entry], table: Samples, split: Folds) -> list[str]:
    """The best CV score, and of those that are not significantly worse the one least correlated with it."""
    sign = score.metric_of(cfg).sign
    ranked = sorted(_current(scored), key=lambda entry: -sign * float(cv_score(entry) or 0))
    if not ranked:
        return []
    best = ranked[0]
    lines = [f"final two: {best['number']} ({best['name']}), the best CV"]
    try:
        predictions = _test_predictions(best["name"], table, split)
        noise = _bootstrap_std(cfg, best["name"], table, split)
    except (UserError, MetricUndefined):
        return lines
    rivals = []
    for entry in ranked[1:]:
        try:
            theirs = _test_predictions(entry["name"], table, split)
        except UserError:
            continue
        correlation = float(np.corrcoef(predictions, theirs)[0, 1])
        near = abs(float(cv_score(entry) or 0) - float(cv_score(best) or 0)) <= 2 * noise
        rivals.append((not near, correlation, entry))
    if not rivals:
        return [*lines, "  no second one to select: submit one that is made differently"]
    worse, correlation, second = min(rivals, key=lambda rival: rival[:2])
    why = "the least correlated" + (", though its CV is significantly worse" if worse else "")
    return [*lines, f"  and {second['number']} ({second['name']}), {why} (correlation {correlation:.3f})"]


def _scorer(cfg: Config, name: str, table: Samples, split: Folds) -> comparison.Scorer:
    """times -> score of the OOF rows, each repeated so often: the mean over targets, each by its own
    metric."""
    prediction = bank.load(run_members.cv_address(name), "oof", table, split)
    assert prediction.fold is not None
    if not prediction.predicted.all():
        raise MetricUndefined("not every row is predicted")
    lines = score.scored_rows(table, prediction.row.astype(np.int64), prediction.fold.astype(np.int64))
    return comparison.mean_scorer(cfg, table, split, prediction, prediction.predicted, lines)


def _oof_rows(table: Samples, split: Folds) -> tuple[NDArray[np.int64], Any]:
    """The units to resample: rows that the host scores, the first of several samples of one row; and their
    groups."""
    oof = split.oof_rows
    rows = score.scored_rows(table, oof, split.assignment[0][oof]).rows
    return rows, score.groups_of(table, rows)


def _bootstrap_std(cfg: Config, name: str, table: Samples, split: Folds) -> float:
    scorer = _scorer(cfg, name, table, split)
    oof, groups = _oof_rows(table, split)
    return float(
        np.std([scorer(times) for times in nested_cv.bootstrap_counts(len(oof), groups, 200, 0)], ddof=1)
    )


def _test_predictions(name: str, table: Samples, split: Folds) -> NDArray[np.float64]:
    prediction = bank.load(name, "test", table, split)
    return np.concatenate([prediction.probability(head).reshape(-1) for head in table.heads])


def _current(scored: Sequence[Entry]) -> list[Entry]:
    """The latest entry of each name, if its predictions on disk are still those that were sent."""
    latest = {entry["name"]: entry for entry in scored}
    found = []
    for entry in latest.values():
        file = bank.folder(entry["name"]) / "test.arrow"
        if file.exists() and artifacts.sha256(file) == entry["predictions"]:
            found.append(entry)
    return found
