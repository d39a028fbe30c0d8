"""Weights by search: greedy selection, hill climbing, SLSQP, Optuna. Of equal members the first is used.

All but SLSQP work on what a FastScorer extracts from the members, so memory stays below twice the size of the
predictions. A limit on inference time restricts the candidates: members that would exceed it are never tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine.ensemble.fast_metrics import EXACT_CANDIDATES, FastScorer
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import Array

TOLERANCE = 1e-12  # closer scores count as equal: the order of additions changes the last digits
Extracted = Sequence[NDArray[np.float32]]  # of each member, by FastScorer.extract


@dataclass(frozen=True)
class Budget:
    """Seconds of inference that each member costs (0 if there is no limit), and their limit."""

    seconds: Sequence[float]
    ceiling: float = float("inf")

    def affordable(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(members,): the chosen ones and those that can be added to them."""
        cost = np.asarray(self.seconds)
        spent = float(cost[chosen].sum())
        return chosen | (spent + cost <= self.ceiling + 1e-9)

    def remaining(self, chosen: NDArray[np.bool_]) -> Budget:
        """The budget of the next class or target: the chosen members predict all of them, so they cost
        nothing more."""
        cost = np.asarray(self.seconds, np.float64)
        left = max(0.0, self.ceiling - float(cost[chosen].sum()))
        return Budget(np.where(chosen, 0.0, cost).tolist(), left)


@dataclass(frozen=True)
class Budgets:
    """The budget that the previous heads left, separately for each set of training rows: the choice for one
    fold must not depend on that for another."""

    whole: Budget
    left: dict[bytes, Budget]

    def for_rows(self, rows: NDArray[np.int64]) -> Budget:
        return self.left.get(rows_key(rows), self.whole)


def rows_key(rows: NDArray[np.int64]) -> bytes:
    """A hash of a set of rows."""
    return hashlib.blake2b(rows.tobytes(), digest_size=16).digest()


def unlimited(members: int) -> Budget:
    return Budget([0.0] * members)


def over_budget() -> UserError:
    return UserError("budget", key="max_seconds", what="no member is fast enough", remedy="raise max_seconds")


def greedy(scorer: FastScorer, extracted: Extracted, rounds: int, budget: Budget) -> Array:
    """Ensemble selection with replacement (Caruana et al. 2004): each round adds the member that improves the
    score most; the weights are those of the best round."""
    best, weights = -np.inf, np.zeros(len(extracted))
    total = np.zeros(extracted[0].shape)
    count = np.zeros(len(extracted))
    for size in range(1, rounds + 1):
        candidates = [int(i) for i in np.flatnonzero(budget.affordable(count > 0))]
        if not candidates:
            raise over_budget()
        base, share = (total / size).astype(np.float32), np.float32(1 / size)
        buffer = np.empty_like(base)

        def approximate(i: int, base: Any = base, share: Any = share, buffer: Any = buffer) -> float:
            np.multiply(extracted[i], share, out=buffer)
            np.add(buffer, base, out=buffer)
            return scorer.approximate(buffer)

        def exact(
            place: int, size: int = size, total: Array = total, candidates: list[int] = candidates
        ) -> float:
            return scorer.exact((total + extracted[candidates[place]]) / size)

        place, reached = _best([approximate(i) for i in candidates], exact, scorer.is_approximate)
        pick = candidates[place]
        total += extracted[pick]
        count[pick] += 1
        if reached > best + TOLERANCE:
            best, weights = reached, count / size
    return weights


def _best(
    approximate: Sequence[float], exact: Callable[[int], float], is_approximate: bool
) -> tuple[int, float]:
    """(place, score) of the best candidate, the first of equals."""
    scores = np.asarray(approximate)
    if not is_approximate:
        place = int(np.flatnonzero(scores >= scores.max() - TOLERANCE)[0]) if np.isfinite(scores.max()) else 0
        return place, float(scores[place])
    # All candidates that score at least as well as the fifth best are scored exactly, 20 at most.
    fifth = np.partition(scores, -min(EXACT_CANDIDATES, len(scores)))[-min(EXACT_CANDIDATES, len(scores))]
    near = np.argsort(-scores, kind="stable")[: int((scores >= fifth).sum())][: 4 * EXACT_CANDIDATES]
    near.sort()
    found = np.array([exact(int(i)) for i in near])
    first = int(np.flatnonzero(found >= found.max() - TOLERANCE)[0])
    return int(near[first]), float(found[first])


def hill(scorer: FastScorer, extracted: Extracted, precision: float, negative: bool, budget: Budget) -> Array:
    """Starts at the best member; each round takes the step (1 - w) x ensemble + w x member, over all members
    and a grid of w, that improves the score most. Each member is added at most once."""
    solo = np.array([scorer.exact(values.astype(np.float64)) for values in extracted])
    solo[~budget.affordable(np.zeros(len(extracted), bool))] = -np.inf
    order = [int(i) for i in np.argsort(-solo, kind="stable") if np.isfinite(solo[i])]
    if not order:
        raise over_budget()
    steps = np.arange(-0.5 if negative else precision, 0.51, precision)
    weights = np.zeros(len(extracted))
    weights[order[0]] = 1.0
    total, reached = extracted[order[0]].astype(np.float64), solo[order[0]]
    left = order[1:]
    while left:
        fits = budget.affordable(weights != 0)
        candidates = [i for i in left if fits[i]]
        if not candidates:
            break
        near, scores = total.astype(np.float32), []
        direction, buffer = np.empty_like(near), np.empty_like(near)
        for i in candidates:
            np.subtract(extracted[i], near, out=direction)
            for step in steps.astype(np.float32):
                np.multiply(direction, step, out=buffer)
                np.add(buffer, near, out=buffer)
                scores.append(scorer.approximate(buffer))

        def exact(k: int, candidates: list[int] = candidates, total: Array = total) -> float:
            i, step = candidates[k // len(steps)], steps[k % len(steps)]
            return scorer.exact((1 - step) * total + step * extracted[i])

        place, best = _best(scores, exact, scorer.is_approximate)
        if not best > reached + TOLERANCE:
            break
        pick, step = candidates[place // len(steps)], steps[place % len(steps)]
        total, reached = (1 - step) * total + step * extracted[pick], best
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
    """Mean weights over bags: of = "members" (half of them per bag), "rows" (a bootstrap sample) or "folds"
    (all but one). search(members, rows) -> weights of these members."""
    total, rows = np.zeros(members), len(fold)
    folds = np.unique(fold)
    if of == "folds" and len(folds) > 1:
        for k in folds:
            total += search(np.arange(members), np.flatnonzero(fold != k))
        return total / len(folds)
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
    """Continuous weights that sum to 1, minimising a differentiable loss (gradients.py)."""
    from scipy.optimize import minimize

    low = -1.0 if negative else 0.0
    solution = minimize(
        loss,
        np.full(members, 1 / members),
        jac=True,
        method="SLSQP",
        bounds=[(low, 1.0)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    weights = np.where(np.abs(solution.x) < 1e-9, 0.0, solution.x)
    return np.asarray(weights / weights.sum())


def optuna(scorer: FastScorer, extracted: Extracted, trials: int, negative: bool, budget: Budget) -> Array:
    """Continuous weights by the metric itself; the first trials are the plain mean and the best member."""
    import optuna as package

    package.logging.set_verbosity(package.logging.WARNING)
    fits = [int(i) for i in np.flatnonzero(budget.affordable(np.zeros(len(extracted), bool)))]
    if not fits:
        raise over_budget()
    names = [f"w{i}" for i in fits]

    def weights_of(params: dict[str, float]) -> Array:
        raw = np.zeros(len(extracted))
        raw[fits] = [params[name] for name in names]
        raw[np.abs(raw) < 0.02] = 0.0  # too small to matter, and at 0 the member need not predict
        return raw / raw.sum() if raw.sum() > 0.05 else np.zeros(len(extracted))

    def objective(trial: Any) -> float:
        low = -0.5 if negative else 0.0
        weights = weights_of({name: trial.suggest_float(name, low, 1.0) for name in names})
        chosen = weights != 0
        if not chosen.any() or np.asarray(budget.seconds)[chosen].sum() > budget.ceiling:
            return -1e9
        return max(scorer.exact(weighted_sum(extracted, weights)), -1e9)

    study = package.create_study(
        direction="maximize", sampler=package.samplers.TPESampler(seed=0, n_startup_trials=20)
    )
    solo = [scorer.exact(extracted[i].astype(np.float64)) for i in fits]
    study.enqueue_trial(dict.fromkeys(names, 1.0))
    study.enqueue_trial({name: float(i == int(np.argmax(solo))) for i, name in enumerate(names)})
    study.optimize(objective, n_trials=trials)
    return weights_of(study.best_trial.params)


def weighted_sum(extracted: Extracted, weights: Array) -> Array:
    total = np.zeros(extracted[0].shape)
    for values, weight in zip(extracted, weights, strict=True):
        if weight:
            total += weight * values
    return total
