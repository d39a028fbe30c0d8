"""Before a file goes out: do the stored checkpoints still say what was stored? Finds the wrong weights, changed images,
another preprocessing or library version, on eight rows and in seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from comp.engine.errors import Refused

T = TypeVar("T")
ROWS, CHECKPOINTS = 8, 10


class Checkpoint(NamedTuple):
    run: str
    seed: int
    fold: int | str


Rows = NDArray[np.integer]
Stored = Mapping[
    Checkpoint, tuple[Rows, NDArray[np.floating]]
]  # (positions in the samples table, their predictions)


def recheck(
    name: str,
    stored: Stored,
    repredict: Callable[[Checkpoint, Rows], NDArray[np.floating]],
    tolerance: Callable[[Checkpoint], float],
    ids: Sequence[str],
) -> str:
    """Predict a few rows again and compare. Which rows and checkpoints is a matter of chance, but the same for one name.

    Predictions are probabilities or values, (rows, outputs): of logits two may differ much and mean the same. Values above
    1 are compared relative to their size. Answers with the line to print.
    """
    if not stored:
        raise Refused(
            f"{name}: no stored checkpoint to predict again with; train it, or take its weights back from where they are kept"
        )
    worst, compared = 0.0, 0
    checkpoints = drawn(name, list(stored), CHECKPOINTS)
    for checkpoint in checkpoints:
        rows, values = stored[checkpoint]
        allowed = tolerance(checkpoint)
        place = drawn(name, list(range(len(rows))), ROWS, [ids[row] for row in rows])
        before = np.asarray(values, np.float64)[place]
        again = np.asarray(repredict(checkpoint, rows[place]), np.float64)
        assert again.shape == before.shape, (again.shape, before.shape)
        off = np.abs(again - before) / np.maximum(1.0, np.abs(before))
        off = np.where(np.isnan(off), np.inf, off)
        if (off > allowed).any():
            row, output = np.unravel_index(off.argmax(), off.shape)
            raise Refused(
                f"{checkpoint.run}, seed {checkpoint.seed}, fold {checkpoint.fold}, row {ids[rows[place[row]]]!r}: {before[row, output]:.9g} is "
                f"stored, the checkpoint says {again[row, output]:.9g} now (more than {allowed:g} apart)"
            )
        compared = max(compared, len(place))
        worst = max(worst, float(off.max(initial=0.0)))
    return f"predicted {compared} rows again through {len(checkpoints)} of {len(stored)} checkpoints: at most {worst:.1e} apart"


def drawn(name: str, things: list[T], count: int, keys: Sequence[object] | None = None) -> list[T]:
    """`count` of them by chance, which the name alone decides."""
    order = sorted(
        range(len(things)), key=lambda i: hashlib.sha256(f"{name}\0{(keys or things)[i]}".encode()).digest()
    )
    return [things[i] for i in sorted(order[:count])]
