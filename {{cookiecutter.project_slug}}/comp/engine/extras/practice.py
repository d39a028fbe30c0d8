"""The practice competition: the 1,797 real handwritten digits that scikit-learn ships, laid out as a Kaggle download.

Consecutive digits of the set come from one hand, so blocks of them are the group column, and the test set is whole blocks:
a fold that mixes writers looks better than the hidden score. The answers lie where only `score` reads them.
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
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths

WRITERS = 20
HIDDEN_WRITERS = (2, 7, 12, 17)  # spread over the set: as hard, on average, as the blocks that are left
PIXELS = 32
PENS = ("fine", "medium", "bold")  # thirds of the ink on the page: a column that the picture explains


def make(raw: Path | None = None) -> Path:
    """Write train.csv, test.csv, sample_submission.csv, train/ and test/ under `raw` (default: data/raw). The same bytes every time."""
    from tqdm import tqdm

    raw = raw or paths.path("data", "raw")
    answers = _answers()
    if raw.is_dir() and any(raw.iterdir()) and not answers.is_file():
        raise Refused(
            f"{paths.relative(raw)}: holds another competition; move it away before comp practice fills the folder"
        )
    pixels, digits = _digits()
    writers = np.arange(len(digits)) * WRITERS // len(digits)
    ink = pixels.sum(axis=(1, 2))
    pens = np.searchsorted(np.quantile(ink, [1 / 3, 2 / 3]), ink)

    ids = _shuffled_ids(len(digits))
    rows = sorted(zip(ids, digits, writers, pens, range(len(digits)), strict=True))
    hidden = [row for row in rows if row[2] in HIDDEN_WRITERS]
    known = [row for row in rows if row[2] not in HIDDEN_WRITERS]

    # First, because its presence is what marks the raw folder as ours after a kill half-way.
    _write_csv(answers, ["id", "label"], ((i, d) for i, d, *_ in hidden))
    table = ((i, d, f"w{w:02d}", PENS[p]) for i, d, w, p, _ in known)
    _write_csv(raw / "train.csv", ["id", "label", "writer", "pen"], table)
    _write_csv(raw / "test.csv", ["id", "pen"], ((i, PENS[p]) for i, _, _, p, _ in hidden))
    _write_csv(raw / "sample_submission.csv", ["id", "label"], ((i, 0) for i, *_ in hidden))
    named = [("train", known), ("test", hidden)]
    with tqdm(total=len(rows), desc="pictures", disable=None) as progress:
        for folder, part in named:
            (raw / folder).mkdir(parents=True, exist_ok=True)
            for id_, *_, position in part:
                # Not through artifacts.atomic: 1,797 flushes to disk cost seconds, and a torn file is written again next time.
                (raw / folder / f"{id_}.png").write_bytes(_picture(pixels[position]))
                progress.update()
    print(
        f"{paths.relative(raw)}: {len(known)} training and {len(hidden)} test pictures; the test set is {len(HIDDEN_WRITERS)} whole writers"
    )
    print("next: comp prepare")
    return raw


def score(name: str) -> float:
    """What the host would answer to submissions/<name>.csv: the accuracy on the hidden answers."""
    file = paths.submission_file(name)
    if not file.is_file():
        known = sorted(f.stem for f in file.parent.glob("*.csv"))
        raise Refused(
            f"{paths.relative(file)}: no such submission; there are {', '.join(known) or 'none: comp submit NAME --dry-run'}"
        )
    if not _answers().is_file():
        raise Refused(
            f"{paths.relative(_answers())}: no such file; only the practice competition can be scored here: comp practice"
        )
    truth = dict(_read_csv(_answers()))
    given = _read_csv(file)
    predicted = dict(given)
    if len(predicted) != len(given) or predicted.keys() != truth.keys():
        wrong = sorted(predicted.keys() - truth.keys())
        hint = f"; {wrong[0]!r} is none, the nearest is {nearest(wrong[0], truth)[0]!r}" if wrong else ""
        raise Refused(
            f"{paths.relative(file)}: {len(given)} rows, where every one of {len(truth)} test ids must stand once{hint}"
        )
    right = sum(predicted[id_] == label for id_, label in truth.items())
    print(f"{paths.relative(file)}: accuracy {right / len(truth):.4f} on {len(truth)} hidden answers")
    return right / len(truth)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) ink of 0 to 16, and the labels. Read as a file: importing scikit-learn for it takes seconds."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def _answers() -> Path:
    return paths.path("data", "answers", "solution.csv")


def _shuffled_ids(count: int) -> list[str]:
    """Ids with leading zeros whose order says nothing about writer or label."""
    order = sorted(range(count), key=lambda i: hashlib.blake2b(b"practice %d" % i).digest())
    ids = [""] * count
    for place, position in enumerate(order):
        ids[position] = f"{place:05d}"
    return ids


def _picture(small: np.ndarray) -> bytes:
    """8x8 ink of 0 to 16 -> a smooth grey PNG of 32x32."""
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
        raise Refused(f"{paths.relative(file)}:1: the columns must be id,label, not {','.join(header)}")
    for number, row in enumerate(rows, 2):
        if len(row) != 2:
            raise Refused(f"{paths.relative(file)}:{number}: {len(row)} fields, where id,label are wanted")
    return [(id_, label) for id_, label in rows]
