"""The schemes of folds.scheme. Each assigns rows or groups to folds with similar class distributions.

They use integers and a hash of id and seed, and neither a random stream nor sums of floats. So folds do not
depend on library versions, the machine or the order of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import mul

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import competition_schema
from comp.engine.data.folds import TRAIN_ONLY

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

SHARE_BITS = 30  # of a share as an integer
SEARCH_LIMIT = 30_000_000  # groups² x labels, up to which local search takes less than a second
HOLDOUT_DRAWS = 64  # draws of a hold-out of whole groups, of which the most representative one is used


@dataclass(frozen=True)
class TrainRows:
    """The training rows as arrays, one entry per row."""

    hashed: Keys  # of their ids
    labels: Ints  # one class per row, or (rows, labels) of 0 and 1
    value: NDArray  # rank among the targets, for quantiles
    group: Ints | None  # index into group_hashed
    group_hashed: Keys
    time: NDArray | None

    def __len__(self) -> int:
        return len(self.hashed)

    def select(self, mask: NDArray) -> TrainRows:
        return replace(
            self,
            hashed=self.hashed[mask],
            labels=self.labels[mask],
            value=self.value[mask],
            group=None if self.group is None else self.group[mask],
            time=None if self.time is None else self.time[mask],
        )


def hash_ids(ids: Iterable[str]) -> Keys:
    digests = b"".join(hashlib.blake2b(each.encode(), digest_size=8).digest() for each in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def sort_keys(hashed: Keys, seed: int) -> Keys:
    """splitmix64 of hash and seed. Sorting by these keys shuffles."""
    return _splitmix64(hashed ^ _splitmix64(np.array([seed % 2**64], np.uint64)))


def _splitmix64(x: Keys) -> Keys:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def deal_by_class(classes: Ints, k: int, key: Keys) -> Ints:
    """Round robin over the rows sorted by class and shuffled within it; with one class, KFold."""
    fold = np.empty(len(key), np.int64)
    fold[np.lexsort((key, classes))] = np.arange(len(key)) % k
    return fold


def deal_by_value(values: NDArray, k: int, key: Keys) -> Ints:
    """Sorts rows by value; of each k consecutive rows every fold gets one."""
    block = np.empty(len(key), np.int64)
    block[np.lexsort((key, values))] = np.arange(len(key)) // k
    return deal_by_class(block, k, _splitmix64(key))


@dataclass(frozen=True)
class LabelCounts:
    """The number of rows per group and label: a sparse table, ordered by group."""

    group: Ints
    label: Ints
    count: Ints
    size: Ints  # rows of every group, with or without labels
    labels: int  # number of labels


def count_labels(group: Ints, labels: Ints) -> LabelCounts:
    """`labels`: one class per row, or (rows, labels) of 0 and 1. In the latter case one more label is 1 for
    every row, so that rows without labels and rows with many are balanced too."""
    size = np.bincount(group)
    if labels.ndim == 1:
        row, label, width = np.arange(len(labels)), labels, int(labels.max()) + 1
    else:
        labels = np.column_stack([labels, np.ones(len(labels), np.int64)])
        (row, label), width = np.nonzero(labels), labels.shape[1]
    pair, count = np.unique(group[row] * width + label, return_counts=True)
    return LabelCounts(pair // width, pair % width, count, size, width)


def balance_groups(counts: LabelCounts, k: int, key: Keys) -> Ints:
    """The fold of every group, by the greedy rule of scikit-learn's StratifiedGroupKFold in integers: groups
    with the most uneven label counts first, each to the fold where the sum of squared label shares grows
    least. Then local search."""
    totals = np.bincount(counts.label, counts.count, counts.labels).astype(np.int64)
    square = np.bincount(counts.group, counts.count**2, len(counts.size)).astype(np.int64)
    whole = np.bincount(counts.group, counts.count, len(counts.size)).astype(np.int64)
    order = np.lexsort((key, -counts.size, whole**2 - counts.labels * square))

    # Plain Python: a group has few labels, so the overhead of numpy's calls would dominate.
    begin = np.searchsorted(counts.group, np.arange(len(counts.size) + 1)).tolist()
    label = counts.label.tolist()
    share = ((counts.count << SHARE_BITS) // totals[counts.label]).tolist()
    size = counts.size.tolist()
    load, rows = [[0] * counts.labels for _ in range(k)], [0] * k
    fold = np.empty(len(size), np.int64)
    for group in order.tolist():
        entries = slice(begin[group], begin[group + 1])
        labels, shares = label[entries], share[entries]
        # (load + share)² - load² without share², which is the same in every fold, and without the factor 2.
        growth = [sum(map(mul, map(one.__getitem__, labels), shares)) for one in load]
        chosen = min(zip(growth, rows, range(k), strict=True))[2]
        for name, part in zip(labels, shares, strict=True):
            load[chosen][name] += part
        rows[chosen] += size[group]
        fold[group] = chosen
    return local_search(counts, k, fold)


def local_search(counts: LabelCounts, k: int, fold: Ints, passes: int = 10) -> Ints:
    """Moves and swaps groups while that improves the balance. With few groups the greedy rule alone is a
    third less balanced. A pass costs groups² x labels."""
    groups = len(counts.size)
    if groups**2 * (counts.labels + 1) > SEARCH_LIMIT:
        return fold
    # The last k lines are empty groups, one in each fold: a swap with one of them is a move.
    table = np.zeros((groups + k, counts.labels + 1), np.int64)
    table[counts.group, counts.label] = counts.count
    totals = np.maximum(table.sum(axis=0), 1)
    table[:groups, -1] = counts.size  # sizes are balanced too, with a quarter of the weight of a label
    totals[-1] = 4 * counts.size.sum()
    shift = 29 - counts.labels.bit_length() // 2  # no sum of products exceeds 2**63
    table = (table << shift) // totals
    where = np.concatenate([fold, np.arange(k)])
    load = np.zeros((k, counts.labels + 1), np.int64)
    np.add.at(load, where, table)
    for _ in range(passes):
        before = where.copy()
        for group in np.argsort(-counts.size, kind="stable").tolist():
            here = where[group]
            change = table - table[group]  # of this fold's load, if `group` is swapped for another
            growth = (change * (load[here] - load[where] + change)).sum(axis=1)
            growth[where == here] = 0
            other = int(growth.argmin())
            if growth[other] < 0:
                load[here] += change[other]
                load[where[other]] -= change[other]
                where[group], where[other] = (
                    (where[other], here) if other < groups else (where[other], where[other])
                )
        if (where == before).all():
            break
    return where[:groups]


# --- schemes: (rows, k, seed) -> fold of each row ----------------------------------------------------------


def _kfold(rows: TrainRows, k: int, seed: int) -> Ints:
    return deal_by_class(np.zeros(len(rows), np.int64), k, sort_keys(rows.hashed, seed))


def _stratified(rows: TrainRows, k: int, seed: int) -> Ints:
    key = sort_keys(rows.hashed, seed)
    if rows.labels.ndim == 1:
        return deal_by_class(rows.labels, k, key)
    return balance_groups(count_labels(np.arange(len(rows)), rows.labels), k, key)


def _quantiles(rows: TrainRows, k: int, seed: int) -> Ints:
    return deal_by_value(rows.value, k, sort_keys(rows.hashed, seed))


def _group(rows: TrainRows, k: int, seed: int) -> Ints:
    return _stratified_group(replace(rows, labels=np.zeros(len(rows), np.int64)), k, seed)


def _stratified_group(rows: TrainRows, k: int, seed: int) -> Ints:
    assert rows.group is not None
    present, group = np.unique(rows.group, return_inverse=True)
    key = sort_keys(rows.group_hashed[present], seed)
    return balance_groups(count_labels(group, rows.labels), k, key)[group]


def _time(rows: TrainRows, k: int, seed: int) -> Ints:
    """k + 1 blocks of time; the first is trained on and never scored. Equal times stay together."""
    assert rows.time is not None
    moment = np.unique(rows.time, return_inverse=True)[1]
    count = np.bincount(moment)
    twice_middle = 2 * np.cumsum(count) - count
    return (twice_middle * (k + 1) // (2 * len(rows)) - 1)[moment]


SCHEMES: dict[competition_schema.Scheme, Callable[[TrainRows, int, int], Ints]] = {
    "kfold": _kfold,
    "stratified": _stratified,
    "quantiles": _quantiles,
    "group": _group,
    "stratified_group": _stratified_group,
    "time": _time,
}
assert TRAIN_ONLY == -1  # the number that `_time` gives its first block


# --- hold-out ----------------------------------------------------------------------------------------------


def holdout_mask(rows: TrainRows, plan: competition_schema.Folds) -> NDArray[np.bool_]:
    """(rows,): whether a row is in the locked hold-out. Depending on the scheme it consists of the latest
    rows, of whole groups, or of a share of every class or range of values."""
    held_out = np.zeros(len(rows), bool)
    if plan.holdout == 0:
        return held_out
    key = sort_keys(rows.hashed, ~plan.seed)
    if plan.scheme == "time":
        assert rows.time is not None
        moment = np.unique(rows.time, return_inverse=True)[1]
        before = np.cumsum(np.bincount(moment)) - np.bincount(moment)
        return np.asarray(before[moment] >= (1 - plan.holdout) * len(rows))
    if "group" in plan.scheme:
        return _holdout_groups(rows, plan)
    if plan.scheme == "kfold":
        order = np.argsort(key, kind="stable")
    elif plan.scheme == "quantiles":
        order = np.lexsort((key, rows.value))
    else:
        classes = rows.labels
        if classes.ndim > 1:
            classes = np.unique(rows.labels, axis=0, return_inverse=True)[1].ravel()
        order = np.lexsort((key, classes))
    # Every 1/share-th row of the order: the share of each class, with the rounding carried to the next class.
    steps = np.floor(np.arange(len(rows) + 1) * plan.holdout)
    held_out[order] = np.diff(steps) > 0
    return held_out


def _holdout_groups(rows: TrainRows, plan: competition_schema.Folds) -> NDArray[np.bool_]:
    """Takes groups in random order until the share is reached; of HOLDOUT_DRAWS orders it uses the one whose
    label distribution is nearest to that of all rows."""
    assert rows.group is not None
    labels = rows.labels if plan.scheme == "stratified_group" else np.zeros(len(rows), np.int64)
    counts = count_labels(rows.group, labels)
    totals = np.bincount(counts.label, counts.count, counts.labels)
    best, least = np.zeros(0, np.int64), np.inf
    for draw in range(HOLDOUT_DRAWS):
        order = np.argsort(sort_keys(rows.group_hashed, ~plan.seed - draw), kind="stable")
        filled = np.cumsum(counts.size[order])
        # The group that exceeds the share is included if the result is closer to it.
        chosen = order[: max(1, int((filled - counts.size[order] / 2 <= plan.holdout * len(rows)).sum()))]
        inside = np.isin(counts.group, chosen)
        share = np.bincount(counts.label[inside], counts.count[inside], counts.labels) / np.maximum(totals, 1)
        off = float(((share - plan.holdout) ** 2)[totals > 0].sum())
        if off < least:
            best, least = chosen, off
    return np.isin(rows.group, best)
