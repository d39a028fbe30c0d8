"""Weights found by search: greedy selection, hill climbing, SLSQP, Optuna. Of equals the member that is listed first wins.

All work on what a scorer of fast.py took from the members, so memory stays under twice the size of the predictions.
A ceiling on inference time acts inside: a member that would not fit is no candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.ensemble.fast_metrics import EXACT_CANDIDATES
from comp.engine.ensemble.spaces import FastScorer
from comp.engine.errors import Refused
from comp.engine.tasks.kinds import Array

TOLERANCE = 1e-12  # scores closer than this are equal: the order of additions moves the last digits
Taken = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Budget:
    """Seconds of inference that each member costs; 0 where there is no ceiling."""

    seconds: Sequence[float]
    ceiling: float = float("inf")

    def affordable(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Members that may be in beside the chosen ones. A member that is in already costs nothing more."""
        cost = np.asarray(self.seconds)
        spent = float(cost[chosen].sum())
        return chosen | (spent + cost <= self.ceiling + 1e-9)

    def remaining(self, chosen: NDArray[np.bool_]) -> Budget:
        """What is left for the next class or target: the chosen members are there for all, and cost nothing more."""
        cost = np.asarray(self.seconds, np.float64)
        left = max(0.0, self.ceiling - float(cost[chosen].sum()))
        return Budget(np.where(chosen, 0.0, cost).tolist(), left)


@dataclass(frozen=True)
class Budgets:
    """What the heads before have left of a ceiling on time, for each set of rows that teaches: no fold learns from another's
    choice."""

    whole: Budget
    left: dict[bytes, Budget]

    def for_rows(self, rows: NDArray[np.int64]) -> Budget:
        return self.left.get(rows_key(rows), self.whole)


def rows_key(rows: NDArray[np.int64]) -> bytes:
    """A set of rows by a few bytes."""
    return hashlib.blake2b(rows.tobytes(), digest_size=16).digest()


def unlimited(members: int) -> Budget:
    return Budget([0.0] * members)


def greedy(scorer: FastScorer, taken: Taken, rounds: int, budget: Budget) -> Array:
    """Caruana: in every round the member whose addition, with replacement, scores best; the best prefix stays."""
    best, weights = -np.inf, np.zeros(len(taken))
    total = np.zeros(taken[0].shape)
    count = np.zeros(len(taken))
    for size in range(1, rounds + 1):
        open_ = [int(i) for i in np.flatnonzero(budget.affordable(count > 0))]
        if not open_:
            raise Refused("max_seconds: not even one member fits under this ceiling")
        base, share = (total / size).astype(np.float32), np.float32(1 / size)
        buffer = np.empty_like(base)

        def rough(i: int, base: Any = base, share: Any = share, buffer: Any = buffer) -> float:
            np.multiply(taken[i], share, out=buffer)
            np.add(buffer, base, out=buffer)
            return scorer.approximate(buffer)

        def exact(place: int, size: int = size, total: Array = total, open_: list[int] = open_) -> float:
            return scorer.exact((total + taken[open_[place]]) / size)

        place, reached = _best([rough(i) for i in open_], exact, scorer.is_approximate)
        pick = open_[place]
        total += taken[pick]
        count[pick] += 1
        if reached > best + TOLERANCE:
            best, weights = reached, count / size
    return weights


def _best(rough: Sequence[float], exact: Callable[[int], float], differ: bool) -> tuple[int, float]:
    """Place and score of the best candidate, the first of equals."""
    scores = np.asarray(rough)
    if not differ:
        place = int(np.flatnonzero(scores >= scores.max() - TOLERANCE)[0]) if np.isfinite(scores.max()) else 0
        return place, float(scores[place])
    # The lowest rough score that is still among the best five, and all that equal it.
    fifth = np.partition(scores, -min(EXACT_CANDIDATES, len(scores)))[-min(EXACT_CANDIDATES, len(scores))]
    near = np.argsort(-scores, kind="stable")[: int((scores >= fifth).sum())][: 4 * EXACT_CANDIDATES]
    near.sort()
    found = np.array([exact(int(i)) for i in near])
    first = int(np.flatnonzero(found >= found.max() - TOLERANCE)[0])
    return int(near[first]), float(found[first])


def hill(scorer: FastScorer, taken: Taken, precision: float, negative: bool, budget: Budget) -> Array:
    """From the best member on: the one step (1 - w) x ensemble + w x member, over all members and all w on a grid, that gains
    most. Each member is taken once."""
    solo = np.array([scorer.exact(each.astype(np.float64)) for each in taken])
    solo[~budget.affordable(np.zeros(len(taken), bool))] = -np.inf
    order = [int(i) for i in np.argsort(-solo, kind="stable") if np.isfinite(solo[i])]
    if not order:
        raise Refused("max_seconds: not even one member fits under this ceiling")
    steps = np.arange(-0.5 if negative else precision, 0.51, precision)
    weights = np.zeros(len(taken))
    weights[order[0]] = 1.0
    total, reached = taken[order[0]].astype(np.float64), solo[order[0]]
    left = order[1:]
    while left:
        fits = budget.affordable(weights != 0)
        tried = [i for i in left if fits[i]]
        if not tried:
            break
        near, scores = total.astype(np.float32), []
        way, buffer = np.empty_like(near), np.empty_like(near)
        for i in tried:
            np.subtract(taken[i], near, out=way)
            for step in steps.astype(np.float32):
                np.multiply(way, step, out=buffer)
                np.add(buffer, near, out=buffer)
                scores.append(scorer.approximate(buffer))

        def exact(k: int, tried: list[int] = tried, total: Array = total) -> float:
            i, step = tried[k // len(steps)], steps[k % len(steps)]
            return scorer.exact((1 - step) * total + step * taken[i])

        place, best = _best(scores, exact, scorer.is_approximate)
        if not best > reached + TOLERANCE:
            break
        pick, step = tried[place // len(steps)], steps[place % len(steps)]
        total, reached = (1 - step) * total + step * taken[pick], best
        weights *= 1 - step
        weights[pick] += step
        left.remove(pick)
    return np.where(np.abs(weights) < TOLERANCE, 0.0, weights)


def bagged(
    search: Callable[[NDArray[np.int64], NDArray[np.int64]], Array],
    members: int,
    fold: NDArray[np.int64],
    bags: int,
    of: str,
) -> Array:
    """Mean weights over bags. Each sees half of the members, a bootstrap sample of the rows, or all folds but one.
    search(members, rows)."""
    total, rows = np.zeros(members), len(fold)
    numbers = np.unique(fold)
    if of == "folds" and len(numbers) > 1:
        for number in numbers:
            total += search(np.arange(members), np.flatnonzero(fold != number))
        return total / len(numbers)
    for bag in range(bags):
        random = np.random.default_rng([bag, members])
        here, drawn = np.arange(members), np.arange(rows)
        if bags > 1 and of == "members":
            here = np.sort(random.choice(members, max(1, (members + 1) // 2), replace=False))
        if bags > 1 and of == "rows":
            drawn = np.sort(random.integers(0, rows, rows))
        total[here] += search(here, drawn)
    return total / bags


def slsqp(loss: Callable[[Array], tuple[float, Array]], members: int, negative: bool) -> Array:
    """Continuous weights that add up to 1, by a loss with a gradient (see smooth.py): a metric of steps has none."""
    from scipy.optimize import minimize

    low = -1.0 if negative else 0.0
    found = minimize(
        loss,
        np.full(members, 1 / members),
        jac=True,
        method="SLSQP",
        bounds=[(low, 1.0)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    weights = np.where(np.abs(found.x) < 1e-9, 0.0, found.x)
    return np.asarray(weights / weights.sum())


def optuna(scorer: FastScorer, taken: Taken, trials: int, negative: bool, budget: Budget) -> Array:
    """Continuous weights by the metric itself; it starts from the plain mean and from the best member."""
    import optuna as package

    package.logging.set_verbosity(package.logging.WARNING)
    fits = [int(i) for i in np.flatnonzero(budget.affordable(np.zeros(len(taken), bool)))]
    if not fits:
        raise Refused("max_seconds: not even one member fits under this ceiling")
    names = [f"w{i}" for i in fits]

    def weights_of(said: dict[str, float]) -> Array:
        raw = np.zeros(len(taken))
        raw[fits] = [said[name] for name in names]
        raw[np.abs(raw) < 0.02] = 0.0  # as good as out, and then it costs no time
        return raw / raw.sum() if raw.sum() > 0.05 else np.zeros(len(taken))

    def objective(trial: Any) -> float:
        low = -0.5 if negative else 0.0
        weights = weights_of({name: trial.suggest_float(name, low, 1.0) for name in names})
        chosen = weights != 0
        if not chosen.any() or np.asarray(budget.seconds)[chosen].sum() > budget.ceiling:
            return -1e9
        return max(scorer.exact(weighted_sum(taken, weights)), -1e9)

    study = package.create_study(
        direction="maximize", sampler=package.samplers.TPESampler(seed=0, n_startup_trials=20)
    )
    solo = [scorer.exact(taken[i].astype(np.float64)) for i in fits]
    study.enqueue_trial(dict.fromkeys(names, 1.0))
    study.enqueue_trial({name: float(i == int(np.argmax(solo))) for i, name in enumerate(names)})
    study.optimize(objective, n_trials=trials)
    return weights_of(study.best_trial.params)


def weighted_sum(taken: Taken, weights: Array) -> Array:
    total = np.zeros(taken[0].shape)
    for each, weight in zip(taken, weights, strict=True):
        if weight:
            total += weight * each
    return total
