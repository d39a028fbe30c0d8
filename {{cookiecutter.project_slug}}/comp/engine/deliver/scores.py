"""comp ledger: the book of submissions, how far CV and leaderboard agree, how much of it is luck, and which two to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import text_table
from comp.engine.bank import bank, nested_cv, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.deliver import ledger, submit
from comp.engine.ensemble import report
from comp.engine.errors import UserError
from comp.engine.run import tracking
from comp.engine.store import artifacts, paths

DRAWS = 300  # of a public and a private leaderboard
ASSUMED = 0.3  # public share of the test rows, where competition.yaml does not say
LATEST = 20  # submissions that the draws compare
Entry = dict[str, Any]


def scores() -> int:
    cfg = resolve.load(paths.root(), "base").config
    fault: UserError | None = None
    try:
        book = submit.sync(cfg)
    except UserError as refused:
        fault, book = refused, ledger.submissions(cfg.competition.slug)
    for line in fault.lines if fault else []:
        print(f"{line}\nso this is the book as it was:")
    if not book:
        print('nothing was sent yet\nnext: comp submit NAME -m "what is new"')
        return 2 if fault else 0
    print(text_table.render(["ref", "sent", "name", "kind", "CV", "honest", "public", "private", "status", "message"], [_line(each) for each in book]))  # fmt: skip
    both = [each for each in book if each["public"] is not None and submit.worth(each) is not None]
    said = agreement(both) if len(both) > 1 else []
    rows = samples.load() if paths.samples_file().exists() else None
    if rows is not None and both:
        split = folds.load(rows)
        said += [*shake_up(cfg, both, rows, split), *advice(cfg, both, rows, split)]
    for line in said:
        print(line)
    if len(both) > 1:
        image = plot(cfg, both)
        _tell(cfg, both, said, image)
        print(f"written: {paths.relative(image)}")
    print(f"written: {paths.relative(ledger.file())}")
    print("next: choose the final two on the competition's page of submissions")
    return 2 if fault else 0


def _line(entry: Entry) -> list[str]:
    cv = (entry["cv"] or {}).get("oof")
    numbers = [
        "-" if value is None else f"{value:.5g}"
        for value in (cv, entry["honest"], entry["public"], entry["private"])
    ]
    return [str(entry["number"]), str(entry["at"])[:16], entry["name"] or "(elsewhere)", entry["kind"], *numbers, entry["status"] or "PENDING", entry["message"][:40]]  # fmt: skip


def _tell(cfg: Config, both: Sequence[Entry], said: Sequence[str], image: Path) -> None:
    """One W&B run for the book as a whole, told anew when it says something new."""
    folder = paths.path("submissions", "tracked", "book")
    told = {
        "said": list(said),
        "scores": [[each["number"], each["public"], each["private"]] for each in both],
    }
    if (folder / "told.json").exists() and artifacts.read_json(folder / "told.json") == told:
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
                "submissions": len(both),
                "rank_correlation": rank_correlation(*_cv_and_public(both)),
                "said": "\n".join(said),
            }
        )
    artifacts.write_json(folder / "told.json", told)


# --- CV against leaderboard ----------------------------------------------------------------------------------------------


def agreement(both: Sequence[Entry]) -> list[str]:
    """Oldest first: does a better CV mean a better place?"""
    cv, lb = _cv_and_public(both)
    said = [
        f"rank correlation of CV and public score over {len(both)} submissions: {rank_correlation(cv, lb):.2f}"
    ]
    moves = [(a, b) for a, b in zip(np.sign(np.diff(cv)), np.sign(np.diff(lb)), strict=True) if a and b]
    if moves:
        same = sum(a == b for a, b in moves)
        said.append(f"consecutive changes of the same sign: {same} of {len(moves)}")
    return said


def _cv_and_public(both: Sequence[Entry]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        np.array([submit.worth(each) for each in both], np.float64),
        np.array([each["public"] for each in both], np.float64),
    )


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's; NaN where one of them never changes."""
    ranks = [_ranks(values) for values in (a, b)]
    spread = [rank.std() for rank in ranks]
    return (
        float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1]))
        if all(spread)
        else float("nan")
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((count.cumsum() - (count - 1) / 2)[place], np.float64)


def plot(cfg: Config, both: Sequence[Entry]) -> Path:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    points = [(float(submit.worth(each) or 0), float(each["public"]), each["name"]) for each in both]
    axes.scatter([x for x, *_ in points], [y for _, y, _ in points], s=24)
    for x, y, name in points:
        axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(
        xlabel=f"CV, {both[-1]['cv']['metric']} (honest where there is one)",
        ylabel="public score",
        title=cfg.competition.slug,
    )
    file = paths.path("submissions", "scores.png")
    with artifacts.atomic(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return file


# --- luck ----------------------------------------------------------------------------------------------------------------


def shake_up(cfg: Config, both: Sequence[Entry], rows: Samples, split: Folds) -> list[str]:
    """Public and private leaderboards drawn again and again from OOF rows, in the sizes that they have."""
    share = cfg.competition.submission.public
    told = "" if share else " (assumed: competition.submission.public says it)"
    share = share or ASSUMED
    kept = _distinct(both)[-LATEST:]
    scorers = []
    for entry in kept:
        try:
            scorers.append(_scorer(cfg, entry["name"], rows, split))
        except (UserError, MetricUndefined):
            continue  # its predictions are gone, or belong to other folds
    if not scorers:
        return []
    draw, tests = np.random.default_rng(0), len(set(rows.frame["row"].to_numpy()[rows.positions("test")]))
    sign = score.metric_of(cfg).sign
    oof, groups = _scored(rows, split)
    codes = nested_cv.group_codes(np.arange(len(oof)) if groups is None else groups)
    units = int(codes.max()) + 1
    boards = np.full((2, DRAWS, len(scorers)), np.nan)
    for half, size in enumerate((share, 1 - share)):
        count = max(2, round(units * tests * size / len(oof)))
        for i in range(DRAWS):
            times = np.bincount(draw.integers(0, units, count), minlength=units)[codes]
            for j, one in enumerate(scorers):
                try:
                    boards[half, i, j] = sign * one(times)
                except MetricUndefined:
                    continue
    fine = np.isfinite(boards).all(axis=(0, 2))
    if fine.sum() < DRAWS / 2:
        return ["shake-up: too few rows of a kind to draw leaderboards from"]
    public, private = boards[:, fine]
    said = [
        f"shake-up: at a public share of {share:.0%}{told} a public score moves by ± {public.std(axis=0, ddof=1).max():.4f} by luck alone"
    ]
    if len(scorers) > 1:
        places = [board.argsort(axis=1)[:, ::-1].argsort(axis=1) for board in (public, private)]
        kept_first = np.mean(public.argmax(axis=1) == private.argmax(axis=1))
        moved = np.abs(places[0] - places[1]).mean()
        said.append(
            f"  of {len(scorers)} submissions the public best is the private best in {kept_first:.0%} of draws; a place moves by {moved:.1f} on average"
        )
    return said


def _scorer(cfg: Config, name: str, rows: Samples, split: Folds) -> report.Scorer:
    """times -> score of the scored rows drawn so often: the mean over targets, each by its own metric, as comp runs has it."""
    said = bank.load(run_members.cv_address(name), "oof", rows, split)
    assert said.fold is not None
    if not said.predicted.all():
        raise MetricUndefined("not every row is predicted")
    here = score.scored_rows(rows, said.row.astype(np.int64), said.fold.astype(np.int64))
    return report.mean_scorer(cfg, rows, split, said, said.predicted, here)


def _scored(rows: Samples, split: Folds) -> tuple[NDArray[np.int64], Any]:
    """What is drawn: rows that the host scores, of several samples of one the first; and their groups."""
    oof = split.oof_rows
    here = score.scored_rows(rows, oof, split.assignment[0][oof]).rows
    return here, score.groups_of(rows, here)


# --- the final two -------------------------------------------------------------------------------------------------------


def advice(cfg: Config, both: Sequence[Entry], rows: Samples, split: Folds) -> list[str]:
    """The best at home, and of those that are as good as it within the noise the one that is least like it."""
    sign = score.metric_of(cfg).sign
    ranked = sorted(_distinct(both), key=lambda each: -sign * float(submit.worth(each) or 0))
    best = ranked[0]
    said = [f"final two: {best['number']} ({best['name']}), the best honest CV"]
    try:
        mine = _test(best["name"], rows, split)
        noise = _noise(cfg, best["name"], rows, split)
    except (UserError, MetricUndefined):
        return said
    rivals = []
    for each in ranked[1:]:
        try:
            likeness = float(np.corrcoef(mine, _test(each["name"], rows, split))[0, 1])
        except UserError:
            continue
        near = abs(float(submit.worth(each) or 0) - float(submit.worth(best) or 0)) <= 2 * noise
        rivals.append((not near, likeness, each))
    if not rivals:
        return [*said, "  a second one to choose is missing: send one that is made differently"]
    far, likeness, second = min(rivals, key=lambda rival: rival[:2])
    why = "the least like it" if not far else "the least like it, though clearly worse at home"
    return [*said, f"  and {second['number']} ({second['name']}), {why} (correlation {likeness:.3f})"]


def _noise(cfg: Config, name: str, rows: Samples, split: Folds) -> float:
    one = _scorer(cfg, name, rows, split)
    oof, groups = _scored(rows, split)
    return float(
        np.std([one(times) for times in nested_cv.bootstrap_counts(len(oof), groups, 200, 0)], ddof=1)
    )


def _test(name: str, rows: Samples, split: Folds) -> NDArray[np.float64]:
    said = bank.load(name, "test", rows, split)
    return np.concatenate([said.probability(head).reshape(-1) for head in rows.heads])


def _distinct(both: Sequence[Entry]) -> list[Entry]:
    """One a name, its latest, while its predictions are still those that were sent."""
    latest = {each["name"]: each for each in both}
    return [each for each in latest.values() if _current(each)]


def _current(entry: Entry) -> bool:
    file = bank.folder(entry["name"]) / "test.arrow"
    return file.exists() and artifacts.sha256(file) == entry["predictions"]
