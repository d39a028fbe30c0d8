"""Dealing rows and groups into folds so that every fold looks like the whole. Integers only.

Nothing here draws from a random stream or adds up floats: where a row goes follows from a hash of its id and the seed, so
folds are the same under any library version, on any machine, and in whatever order the rows stand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import mul

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

SHARE = 30  # bits of a share, as an integer


def hashes(names: Iterable[str]) -> Keys:
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def keys(hashed: Keys, seed: int) -> Keys:
    """What rows are ordered by under a seed: splitmix64 of hash and seed."""
    return _mixed(hashed ^ _mixed(np.array([seed % 2**64], np.uint64)))


def _mixed(x: Keys) -> Keys:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rows_by_class(classes: Ints, k: int, key: Keys) -> Ints:
    """Round robin through the classes, each in the order of its keys. One class for all is plain k-fold."""
    fold = np.empty(len(key), np.int64)
    fold[np.lexsort((key, classes))] = np.arange(len(key)) % k
    return fold


def rows_by_value(values: NDArray, k: int, key: Keys) -> Ints:
    """Of every k neighbours in value each fold gets one."""
    neighbours = np.empty(len(key), np.int64)
    neighbours[np.lexsort((key, values))] = np.arange(len(key)) // k
    return rows_by_class(neighbours, k, _mixed(key))


@dataclass(frozen=True)
class Counts:
    """How many rows of each label every unit (a row or a group) has; only what is not zero, ordered by unit."""

    unit: Ints
    label: Ints
    count: Ints
    size: Ints  # rows of every unit, with or without labels
    labels: int


def counted(units: Ints, labels: Ints) -> Counts:
    """`labels`: one class a row, or (rows, labels) of 0 and 1. With the latter being a row counts as a label too, so that
    rows with none or many are spread as well."""
    size = np.bincount(units)
    if labels.ndim == 1:
        row, label, width = np.arange(len(labels)), labels, int(labels.max()) + 1
    else:
        labels = np.column_stack([labels, np.ones(len(labels), np.int64)])
        (row, label), width = np.nonzero(labels), labels.shape[1]
    pair, count = np.unique(units[row] * width + label, return_counts=True)
    return Counts(pair // width, pair % width, count, size, width)


def groups(counts: Counts, k: int, key: Keys) -> Ints:
    """The fold of every unit, by scikit-learn's greedy rule for stratified groups, told in integers: the most lopsided
    units first, each to the fold where the squares of the label shares grow least. Then moves and swaps while they help.
    """
    totals = np.bincount(counts.label, counts.count, counts.labels).astype(np.int64)
    square = np.bincount(counts.unit, counts.count**2, len(counts.size)).astype(np.int64)
    whole = np.bincount(counts.unit, counts.count, len(counts.size)).astype(np.int64)
    order = np.lexsort((key, -counts.size, whole**2 - counts.labels * square))

    # Plain Python from here: a unit has few labels, and numpy would spend its time on the calls.
    begin = np.searchsorted(counts.unit, np.arange(len(counts.size) + 1)).tolist()
    label, share = counts.label.tolist(), ((counts.count << SHARE) // totals[counts.label]).tolist()
    size = counts.size.tolist()
    load, rows = [[0] * counts.labels for _ in range(k)], [0] * k
    fold = np.empty(len(size), np.int64)
    for unit in order.tolist():
        mine = slice(begin[unit], begin[unit + 1])
        labels, shares = label[mine], share[mine]
        # What is left of (load + share)² - load² once the folds are compared.
        growth = [sum(map(mul, map(one.__getitem__, labels), shares)) for one in load]
        chosen = min(zip(growth, rows, range(k), strict=True))[2]
        for name, part in zip(labels, shares, strict=True):
            load[chosen][name] += part
        rows[chosen] += size[unit]
        fold[unit] = chosen
    return _improved(counts, k, fold)


def _improved(counts: Counts, k: int, fold: Ints, passes: int = 10) -> Ints:
    """With few groups greedy leaves a third on the table. Costs units² x labels, so only where that is under a second."""
    units = len(counts.size)
    if units**2 * (counts.labels + 1) > 30_000_000:
        return fold
    table = np.zeros(
        (units + k, counts.labels + 1), np.int64
    )  # the last k are nobody: a swap with nobody is a move
    table[counts.unit, counts.label] = counts.count
    totals = np.maximum(table.sum(axis=0), 1)
    table[:units, -1], totals[-1] = (
        counts.size,
        4 * counts.size.sum(),
    )  # sizes matter too, less than any label
    shift = 29 - counts.labels.bit_length() // 2  # no sum of products may pass 2**63
    table = (table << shift) // totals
    where = np.concatenate([fold, np.arange(k)])
    load = np.zeros((k, counts.labels + 1), np.int64)
    np.add.at(load, where, table)
    for _ in range(passes):
        before = where.copy()
        for unit in np.argsort(-counts.size, kind="stable").tolist():
            here = where[unit]
            change = table - table[unit]  # what this fold gains when the unit goes and another comes
            growth = (change * (load[here] - load[where] + change)).sum(axis=1)
            growth[where == here] = 0
            other = int(growth.argmin())
            if growth[other] < 0:
                load[here] += change[other]
                load[where[other]] -= change[other]
                where[unit], where[other] = (
                    (where[other], here) if other < units else (where[other], where[other])
                )
        if (where == before).all():
            break
    return where[:units]
