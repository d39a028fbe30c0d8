"""What is wrong with tables, images and declaration, before it costs a run: one line a fault, with file, row and reason."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from comp import metrics
from comp.engine import hardware, pages
from comp.engine.config.competition_schema import Competition
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data import exact_duplicates, image_key, image_reader, prepare, sample_submission, samples
from comp.engine.data.prepare import Prepared
from comp.engine.data.sample_submission import SampleSubmission, load_sample
from comp.engine.errors import UserError
from comp.engine.readers import decode
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import TASKS, Head

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 50  # lines on the screen; data/check.txt has all
BATCH = 2000  # images between two looks at the progress bar
SMALL = 96  # px; below it the usual stems throw most of the picture away in their first two layers


class Look(NamedTuple):
    """What an image file was found to be, and the size and mtime that make it the same file next time."""

    name: str
    bytes: int
    mtime: int
    side: int  # px of the shorter side, 0 where unknown
    fault: str  # empty: a whole picture; of a JPEG that libjpeg warns about it begins with images.WARNED


Reader = Callable[[Config, Prepared], tuple[list[str], list[str]]]


def check(
    cfg: Config, written: Reader | None = None, exact: bool = False, network: Reader | None = None
) -> list[str]:
    """Prints and returns the faults; none means that prepare, folds, training and submission will not meet one of these.
    `written` makes a submission of made-up predictions, `network` sends a picture through the experiment's network without weights:
    deliver/dummy_submission.py and train/model.py, which stand above this package. `exact` opens images
    at the size and fit of `cfg`; otherwise they are made small, which is faster and finds the same damage."""
    competition = cfg.competition
    notes = [f"comp/competition.py: {', '.join(pages.in_force()) or 'nothing'} in force"]
    faults = _declared(competition)
    try:
        reading = prepare.read_samples(competition)
    except UserError as refused:
        faults += refused.lines
    else:
        faults += reading.faults
        maker = (
            image_reader.from_config(cfg)
            if exact
            else replace(image_reader.from_config(cfg), size=32, resize="stretch")
        )
        notes += reading.notes + _copies(cfg, reading) + _stale(reading)
        assignment, about = _against_sample(cfg, reading)
        faults += assignment
        notes += about
        # A submission for a sample with faults of its own would only say them again, in other words.
        for looked in (None if assignment else written, network, partial(_images, maker=maker)):
            if looked is not None:
                found, about = looked(cfg, reading)
                faults += found
                notes += about
        counts = reading.frame["source"].value_counts(sort=False)
        notes.insert(0, ", ".join(f"{count} {source} rows" for source, count in counts.items()))
    faults = list(dict.fromkeys(faults))
    artifacts.write_text(paths.path("data", "check.txt"), "\n".join([*notes, *faults]) + "\n")
    for lines in (notes, faults):
        print(*lines[:SHOWN], sep="\n", end="\n" if lines else "")
        if len(lines) > SHOWN:
            print(f"and {len(lines) - SHOWN} more: {paths.relative(paths.path('data', 'check.txt'))} has all")
    print(f"{len(faults)} fault{'s' * (len(faults) != 1)}")
    if not faults:
        print(f"next: comp {'folds' if paths.samples_file().is_file() else 'prepare'}")
    return faults


def _declared(competition: Competition) -> list[str]:
    """What the config alone cannot know to be wrong."""
    where, faults = "configs/competition.yaml: metric", []
    for target, task in competition.tasks.items():
        name = competition.metric if isinstance(competition.metric, str) else competition.metric[target]
        if name == "metric":
            if pages.get("metric") is None:
                faults.append(f"{where}: `metric` wants a function of that name in comp/competition.py")
            continue
        try:
            metric = metrics.find(name)
        except UserError as refused:
            faults += [f"configs/competition.yaml: {line}" for line in refused.lines]
            continue
        if metric.tasks and task not in metric.tasks:
            fit = f"it scores {', '.join(metric.tasks)}; the default of {task} is {TASKS[task].metric}"
            faults.append(f"{where}: {metric.name} does not fit task: {task}; {fit}")
    return list(dict.fromkeys(faults))


def _against_sample(cfg: Config, reading: Prepared) -> tuple[list[str], list[str]]:
    """The sample submission decides what is scored: the test rows and the classes must be the same there."""
    competition, rules = cfg.competition, cfg.competition.submission
    try:
        sample = load_sample(competition)
        lines = sample.row_keys
        if rules.rows is not None:
            lines = [cell.row for cell in sample_submission.parse_ids(rules.rows, lines, reading.heads)]
    except UserError as refused:
        return refused.lines, []
    name = paths.relative(sample.file)
    first: dict[str, int] = {}
    for position in np.flatnonzero(reading.frame["source"] == "test").tolist():
        first.setdefault(reading.frame["row"].iloc[position], position)
    faults = [
        f"{name}:{number}: the id {row!r} is not among the test rows"
        for number, row in enumerate(lines, 2)
        if row not in first
    ]
    asked = set(lines)
    faults += [
        f"{reading.where(p)}: the test row {row!r} is not in {name}"
        for row, p in first.items()
        if row not in asked
    ]
    return faults + _columns(competition, reading, sample), _repeated(sample)


def _repeated(sample: SampleSubmission) -> list[str]:
    if not sample.repeated_ids:
        return []
    id_, numbers = next(iter(sample.repeated_ids.items()))
    return [
        f"note: {paths.relative(sample.file)} asks for {len(sample.repeated_ids)} ids in several lines, like {id_!r} in "
        f"{', '.join(map(str, numbers[:4]))}; each line gets the same prediction"
    ]


def _columns(competition: Competition, reading: Prepared, sample: SampleSubmission) -> list[str]:
    """Columns of the sample that nothing is predicted for, and classes that have none."""
    rules, name, answers = competition.submission, paths.relative(sample.file), sample.prediction_columns
    faults = []
    if pages.get("write_submission") is not None or rules.rows is not None:
        return []
    wanted = [
        name
        for head in reading.heads
        for name in (_asked(head, answers) if rules.form == "probabilities" else [head.name])
    ]
    if rules.form == "probabilities" or len(answers) > 1:
        for column in answers:
            if column not in wanted:
                faults.append(
                    f"{name}:1: the column {column!r} is nothing that is predicted, the nearest is {nearest(column, wanted)[0]!r}"
                )
    if rules.form == "probabilities":
        faults += [
            f"{name}:1: no column for the class {output!r}"
            for head in reading.heads
            for output in head.graded or _asked(head, answers)
            if output not in answers
        ]
    return faults


def _asked(head: Head, answers: Sequence[str]) -> tuple[str, ...]:
    """What a column each stands for: the outputs, or of two classes both."""
    both = head.task == "binary" and set(answers) == set(head.classes)
    return head.classes if both else head.outputs


def _images(cfg: Config, reading: Prepared, maker: image_reader.ImageReader) -> tuple[list[str], list[str]]:
    """Every listed image exists and decodes; faults, and what is only worth knowing."""
    raw = paths.path(cfg.competition.raw)
    rows = {
        name: position
        for position in range(len(reading.frame) - 1, -1, -1)
        for name in reading.frame["images"].iloc[position]
    }
    listed = {file for name in rows for file in image_key.files(name)}
    files = set(_files(raw, listed))
    folders = {folder: (raw / folder).is_dir() for folder in {os.path.dirname(file) for file in listed}}
    files |= {  # in an archive
        file for file in listed if not folders[os.path.dirname(file)] and maker.stamp(file)[0] >= 0
    }
    on_disk = {name for name in rows if files.issuperset(image_key.files(name))}
    faults = []
    for source in reading.frame["source"].unique():
        mine = [n for names in reading.frame["images"][reading.frame["source"] == source] for n in names]
        absent = [name for name in mine if name not in on_disk]
        if absent and len(absent) == len(mine):
            there = sorted(files) or sorted(str(p.relative_to(raw)) for p in raw.iterdir())
            lacking = next(file for file in image_key.files(absent[0]) if file not in files)
            hint = f"the nearest there is {nearest(lacking, there[:2000])[0]}"
            faults.append(
                f"configs/competition.yaml: {source}.image: none of {len(mine)} files exists, like {lacking}; {hint}"
            )
        else:
            faults += [
                f"{reading.where(rows[name])}: image {image_key.shown(name)}: no such file"
                for name in dict.fromkeys(absent)
            ]
    looks = _looked(maker, [name for name in rows if name in on_disk])
    warned = [look for look in looks if look.fault.startswith(decode.WARNED)]
    taken = warned if maker.pixel_format.lenient else []
    damaged = [look for look in looks if look.fault and look not in taken]
    faults += [
        f"{reading.where(rows[look.name])}: image {image_key.shown(look.name)}: {look.fault}"
        for look in damaged
    ]
    notes = [f"{len(rows)} images listed, {len(looks)} found, {len(damaged)} damaged"]
    notes += _unlisted(reading, sorted(files - listed))
    sides = [look.side for look in looks if look.side]
    if sides and np.median(sides) < SMALL and cfg.model.stem != "small":
        notes.append(
            f"hint: half of the images are {int(np.median(sides))} px or smaller; ImageNet stems shrink them by 4 before they "
            f"look: model.stem=small with data.size={int(np.median(sides))}, or a larger data.size than the pictures have"
        )
    notes += _warned(warned, reading, rows, maker.pixel_format.lenient)
    return faults, notes


def _warned(looks: Sequence[Look], reading: Prepared, rows: dict[str, int], lenient: bool) -> list[str]:
    """JPEGs that a lenient decoder makes a picture of. Whether it is the whole one, only a look at them can say."""
    if not looks:
        return []
    if not lenient:
        return [
            f"hint: {len(looks)} of them are JPEGs that libjpeg warns about, like {image_key.shown(looks[0].name)}; look at them: where they are whole, "
            "pixels: {lenient: true} in configs/competition.yaml takes all of them"
        ]
    return [
        f"note: {len(looks)} JPEGs that libjpeg warns about are taken as far as they decode (pixels.lenient of configs/competition.yaml)",
        *(
            f"note: {reading.where(rows[look.name])}: image {image_key.shown(look.name)}: {look.fault}"
            for look in looks
        ),
    ]


def _unlisted(reading: Prepared, names: Sequence[str]) -> list[str]:
    """Pictures that no row asks for, one line a folder. Hosts leave some behind, so it is no fault; but rows that were lost
    look the same, and of a test folder they would be missing from the submission."""
    kinds: dict[str, set[str]] = {}
    for source, listed in zip(reading.frame["source"], reading.frame["images"], strict=True):
        for name in (file for key in listed for file in image_key.files(key)):
            kinds.setdefault(os.path.dirname(name), set()).add(source)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(os.path.dirname(name), []).append(name)
    return [
        f"note: {len(there)} more files in {folder or 'data/raw'} are listed by no {' or '.join(sorted(kinds[folder]))} row, "
        f"like {there[0]}; they are left out"
        for folder, there in found.items()
    ]


def _copies(cfg: Config, reading: Prepared) -> list[str]:
    """Rows that share an image. Within a fold that is no fault, and where the folds will be is not known yet."""
    import pandas as pd

    frame = reading.frame
    images = exact_duplicates.find_by_bytes(cfg, samples.Samples(frame, reading.heads, ""))
    by_path, by_bytes = (
        exact_duplicates.duplicate_pairs(images, code) for code in (images.by_path, images.by_bytes)
    )
    known, all_ = (pairs @ np.array([len(frame), 1]) for pairs in (by_path, by_bytes))
    keep = "so with folds.duplicates: group; without it comp folds refuses them on both sides of a fold"
    if cfg.competition.folds.scheme == "time":
        keep = "comp folds refuses them on both sides of a split by time"
    ids, source = (frame[name].to_numpy(object) for name in ("id", "source"))
    notes = []
    for pairs, what, then in (
        (by_path, "share an image file", "none of them trains a fold that scores another"),
        (by_bytes[~np.isin(all_, known)], "have files of the same bytes", keep),
    ):
        pairs = pairs[(source[pairs] != "test").any(axis=1)]
        if len(pairs):
            each = pd.Series(source[np.unique(pairs)]).value_counts(sort=False)
            counts = ", ".join(f"{count} {kind}" for kind, count in each.items())
            like = " and ".join(repr(ids[at]) for at in pairs[0])
            notes.append(f"note: {counts} rows {what}, like {like}; {then}")
    return notes


def _files(raw: Path, listed: Collection[str]) -> Iterator[str]:
    """Files in the folders of the listed images, with one of their suffixes."""
    suffixes = {os.path.splitext(name)[1] for name in listed}
    for folder in sorted({os.path.dirname(name) for name in listed}):
        if (raw / folder).is_dir():
            with os.scandir(raw / folder) as entries:
                for entry in entries:
                    if os.path.splitext(entry.name)[1] in suffixes and _is_file(entry):
                        yield os.path.join(folder, entry.name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself: whoever opens it says so
        return True


def _looked(maker: image_reader.ImageReader, names: Sequence[str]) -> list[Look]:
    """Decoded in parallel. What is as it was last time (size, mtime, decoder) is not opened again."""
    from tqdm import tqdm

    file = paths.path("data", "checked", f"{maker.key}.parquet")
    known = {look.name: look for look in _remembered(file)}
    done: dict[str, Look] = {}
    waiting = []
    for name in names:
        old = known.get(name)
        if old and (old.bytes, old.mtime) == maker.stamp(name):
            done[name] = old
        else:
            waiting.append(name)
    if waiting:
        print(f"opening {len(waiting)} images" + (f", {len(done)} are as they were" if done else ""))
        try:
            with (
                ThreadPoolExecutor(hardware.cores()) as pool,
                tqdm(total=len(waiting), desc="check", disable=None) as progress,
            ):
                for start in range(0, len(waiting), BATCH):
                    for look in pool.map(lambda name: _look(maker, name), waiting[start : start + BATCH]):
                        done[look.name] = look
                        progress.update()
        finally:
            _remember(
                file, list(done.values())
            )  # also when stopped by Ctrl+C: the next check goes on from here
    return [done[name] for name in names]


def _look(maker: image_reader.ImageReader, name: str) -> Look:
    size, mtime = maker.stamp(name)
    side, fault = 0, ""
    strict = replace(maker, pixel_format=maker.pixel_format._replace(lenient=False))
    try:
        data = maker.read(name)
        strict.image(name, data)
        side = _shorter_side(data)
    except decode.DamagedImage as damaged:
        fault = damaged.reason
    return Look(name, size, mtime, side, fault)


def _shorter_side(data: bytes) -> int:
    """From the header; 0 for what only load_image of competition.py understands."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size)
    except Image.UnidentifiedImageError:
        return 0


def _remembered(file: Path) -> list[Look]:
    """A torn or damaged memory costs nothing but opening the images again."""
    import pyarrow.parquet as pq

    entry = artifacts.manifest_entry(file)
    if entry is None or entry["sha256"] != artifacts.sha256(file):
        return []
    table: pa.Table = pq.read_table(file)
    return [Look(*row) for row in zip(*(table[name].to_pylist() for name in Look._fields), strict=True)]


def _remember(file: Path, looks: Sequence[Look]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with artifacts.atomic(file) as temporary:
        pq.write_table(
            pa.table({name: [getattr(look, name) for look in looks] for name in Look._fields}), temporary
        )
    artifacts.add_to_manifest(file)


def _stale(reading: Prepared) -> list[str]:
    """data/samples.parquet is a copy of what the tables say; they may have moved on."""
    if reading.faults or not artifacts.manifest_entry(paths.samples_file()):
        return []
    same = samples.load().hash == samples.content_hash(reading.frame, reading.heads)
    return (
        []
        if same
        else [f"note: {paths.relative(paths.samples_file())} is not what the tables say now: comp prepare"]
    )
