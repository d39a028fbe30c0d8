"""The practice competition: the 1,797 real handwritten digits that scikit-learn ships, laid out as a Kaggle
download.

Consecutive digits of the set are by one writer, so blocks of them are the group column, and the test set is
whole blocks: folds that split writers overestimate the hidden score. Only `score` reads the hidden labels.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from comp.engine.config.resolve import nearest
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

WRITERS = 20
HIDDEN_WRITERS = (
    2,
    7,
    12,
    17,
)  # the test set, spread over the blocks so that it is about as hard as the rest
PIXELS = 32
PENS = (
    "fine",
    "medium",
    "bold",
)  # thirds of the amount of ink: a metadata column that can be seen in the image


def make(raw: Path | None = None) -> Path:
    """Write train.csv, test.csv, sample_submission.csv, train/ and test/ under `raw` (default: data/raw). The
    same bytes every time."""
    from tqdm import tqdm

    raw = raw or paths.path("data", "raw")
    answers = _answers()
    if raw.is_dir() and any(raw.iterdir()) and not answers.is_file():
        raise UserError(
            "folder-not-empty",
            where=paths.relative(raw),
            what="has files of another competition",
            remedy="move them away, then comp practice",
        )
    pixels, digits = _digits()
    writers = np.arange(len(digits)) * WRITERS // len(digits)
    ink = pixels.sum(axis=(1, 2))
    pens = np.searchsorted(np.quantile(ink, [1 / 3, 2 / 3]), ink)

    ids = _shuffled_ids(len(digits))
    rows = sorted(zip(ids, digits, writers, pens, range(len(digits)), strict=True))
    hidden = [row for row in rows if row[2] in HIDDEN_WRITERS]
    known = [row for row in rows if row[2] not in HIDDEN_WRITERS]

    # First: after a kill, this file shows that the raw folder was filled by us.
    _write_csv(answers, ["id", "label"], ((i, d) for i, d, *_ in hidden))
    table = ((i, d, f"w{w:02d}", PENS[p]) for i, d, w, p, _ in known)
    _write_csv(raw / "train.csv", ["id", "label", "writer", "pen"], table)
    _write_csv(raw / "test.csv", ["id", "pen"], ((i, PENS[p]) for i, _, _, p, _ in hidden))
    _write_csv(raw / "sample_submission.csv", ["id", "label"], ((i, 0) for i, *_ in hidden))
    named = [("train", known), ("test", hidden)]
    with tqdm(total=len(rows), desc="images", disable=None) as progress:
        for folder, part in named:
            (raw / folder).mkdir(parents=True, exist_ok=True)
            for id_, *_, position in part:
                # Not through artifacts.atomic: 1,797 flushes to disk cost seconds, and a second call rewrites
                # a torn file.
                (raw / folder / f"{id_}.png").write_bytes(_png(pixels[position]))
                progress.update()
    print(
        f"{paths.relative(raw)}: {len(known)} training and {len(hidden)} test images; the test set is "
        f"{len(HIDDEN_WRITERS)} whole writers"
    )
    print("next: comp prepare")
    return raw


def score(name: str) -> float:
    """Accuracy of submissions/<name>.csv on the hidden labels, as Kaggle would report it."""
    file = paths.submission_file(name)
    if not file.is_file():
        known = sorted(f.stem for f in file.parent.glob("*.csv"))
        raise UserError(
            "submission-missing",
            where=paths.relative(file),
            what=f"no such submission; there are {', '.join(known) or 'none'}",
            remedy="comp submit NAME --dry-run",
        )
    if not _answers().is_file():
        raise UserError(
            "file-missing",
            where=paths.relative(_answers()),
            what="no such file; only the practice competition can be scored here",
            remedy="comp practice",
        )
    truth = dict(_read_csv(_answers()))
    lines = _read_csv(file)
    predicted = dict(lines)
    if len(predicted) != len(lines) or predicted.keys() != truth.keys():
        wrong = sorted(predicted.keys() - truth.keys())
        raise UserError(
            "submission-ids",
            where=paths.relative(file),
            what=f"{len(lines)} rows; it needs each of the {len(truth)} test ids once",
            remedy=f"{wrong[0]!r} is no test id, did you mean {nearest(wrong[0], truth)[0]!r}?"
            if wrong
            else "",
        )
    correct = sum(predicted[id_] == label for id_, label in truth.items())
    print(f"{paths.relative(file)}: accuracy {correct / len(truth):.4f} on {len(truth)} hidden labels")
    return correct / len(truth)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) ink, 0 to 16, and the labels. Read as a file, since importing scikit-learn takes
    seconds."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def _answers() -> Path:
    return paths.path("data", "answers", "solution.csv")


def _shuffled_ids(count: int) -> list[str]:
    """Ids with leading zeros, in an order that is independent of writer and label."""
    order = sorted(range(count), key=lambda i: hashlib.blake2b(b"practice %d" % i).digest())
    ids = [""] * count
    for place, position in enumerate(order):
        ids[position] = f"{place:05d}"
    return ids


def _png(small: np.ndarray) -> bytes:
    """(8, 8) ink, 0 to 16 -> a gray PNG of 32 x 32 px."""
    import cv2

    grey = np.rint(small * (255 / 16)).astype(np.uint8)
    large = cv2.resize(grey, (PIXELS, PIXELS), interpolation=cv2.INTER_CUBIC)
    done, data = cv2.imencode(".png", large)
    assert done
    return bytes(data.tobytes())


def _write_csv(file: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    artifacts.write_text(file, text.getvalue())


def _read_csv(file: Path) -> list[tuple[str, str]]:
    """(id, label) of every row, as text."""
    with file.open(newline="", encoding="utf-8") as opened:
        header, *rows = list(csv.reader(opened)) or [[]]
    if header != ["id", "label"]:
        raise UserError(
            "submission-columns",
            where=f"{paths.relative(file)}:1",
            what=f"the columns must be id,label, not {','.join(header)}",
        )
    for number, row in enumerate(rows, 2):
        if len(row) != 2:
            raise UserError(
                "submission-line",
                where=f"{paths.relative(file)}:{number}",
                what=f"{len(row)} fields; the columns are id,label",
            )
    return [(id_, label) for id_, label in rows]
