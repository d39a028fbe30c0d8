"""From stored predictions to submissions/<name>.csv, in the form that competition.yaml declares. See deliver/validate.py
for what a file must be; nothing is put in its place before its very bytes have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine import pages
from comp.engine.bank import bank, merge
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.sample_submission import SampleSubmission, load_sample, scored_ids, validate_current
from comp.engine.data.samples import Samples, aggregate_rows
from comp.engine.deliver import validate
from comp.engine.deliver.cell_format import Form, rules_of_cells, some
from comp.engine.deliver.submission_format import Answers, Cuts, Written, from_form, refuse_misfit
from comp.engine.ensemble import blend
from comp.engine.errors import Refused, UserError
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd


def dry_run(name: str) -> Path:
    # Not the run's own config: how a file is written may be corrected after training, and an ensemble has no config.
    cfg = resolve.load(paths.root(), "base").config
    table = samples.load()
    made = paths.ensemble_folder(name) / "score.json"
    if made.exists() and blend.stale(name, artifacts.read_json(made)):
        raise Refused(
            f"{name}: its file or a member changed since it was made; make it anew: comp ensemble {name}"
        )
    prediction = bank.load(name, "test", table, folds.load(table))
    if run_members.cv_address(name) != name:
        print(f"{name}: {merge.describe_cv(name)}")
    return write(cfg, table, name, prediction)


def write(cfg: Config, samples: Samples, name: str, prediction: PredictionSet) -> Path:
    rules, file = cfg.competition.submission, paths.submission_file(name.replace(":", "-"))
    refuse_misfit(rules, samples.heads)
    sample = load_sample(cfg.competition)
    validate_current(sample, samples, scored_ids(cfg.competition, sample, samples.heads))
    made, form = filled(cfg, samples, name, prediction, sample, fitted_cuts)
    put(file, made, form, sample)
    facts = {"sample": artifacts.sha256(sample.file), "samples": samples.hash}
    artifacts.add_to_manifest(file, of=name, form=form.name, rows=len(sample.rows), **facts)
    for note in made.notes:
        print(note)
    size = f"{len(sample.rows)} rows, {len(sample.columns)} columns ({some(sample.columns)})"
    print(
        f"{paths.relative(file)}: {size}, form {form.name}; validated, sha256 {artifacts.sha256(file)[:12]}"
    )
    print(f'next: comp submit {name} -m "…"')
    return file


def filled(
    cfg: Config,
    samples: Samples,
    name: str,
    prediction: PredictionSet,
    sample: SampleSubmission,
    cuts: Callable[[str], Cuts],
) -> tuple[Written, Form]:
    """The lines of the file, and what each of their cells may be."""
    rules, ids = cfg.competition.submission, scored_ids(cfg.competition, sample, samples.heads)
    rows, answers = scored_rows(samples, name, prediction, ids, cfg.competition.merge)
    answers = postprocessed(rows, answers)
    if pages.get("write_submission"):
        if rules.rows is None:  # a line each, also where an id has several
            place = {each: i for i, each in enumerate(ids)}
            at = np.array([place[key] for key in sample.row_keys])
            rows = rows.iloc[at].reset_index(drop=True)
            answers = {head: value[at] for head, value in answers.items()}
        made = from_own(rows, answers, sample)
    else:
        forms = set(rules.form.values()) if isinstance(rules.form, dict) else {rules.form}
        fitted = cuts(name) if forms & {"label", "labels", "ranking"} else {}
        made = from_form(rules, samples.heads, answers, sample, fitted, ids)
    return made, rules_of_cells(rules, samples.heads, sample)


def put(file: Path, made: Written, form: Form, sample: SampleSubmission) -> None:
    """The very bytes that have passed, or what stood there before."""
    with artifacts.atomic(file) as temporary:
        temporary.write_text(text_of(made, sample), encoding="utf-8", newline="\n")
        validate.check(temporary.read_bytes(), paths.relative(file), sample, form)


def text_of(made: Written, sample: SampleSubmission) -> str:
    return "".join(validate.written(line, sample.delimiter) for line in made.lines)


# --- rows ----------------------------------------------------------------------------------------------------------------


def scored_rows(
    samples: Samples, name: str, prediction: PredictionSet, ids: list[str], how: str = "mean"
) -> tuple[pd.DataFrame, Answers]:
    """One line a row of the sample, in its order."""
    keys = samples.frame["row"].to_numpy()[prediction.row]
    refuse_gaps(name, ids, keys)
    answers = {}
    for head in samples.heads:
        gaps = np.flatnonzero(~np.isfinite(prediction.heads[head.name]).all(axis=1))
        if len(gaps):
            where = f"{name}: row {keys[gaps[0]]!r}, output {head.name!r}"
            raise Refused(f"{where}: no prediction; {len(gaps)} of {len(keys)} rows have none")
        answers[head.name] = aggregate_rows(keys, prediction.probability(head), ids, how)
    first = dict(zip(keys[::-1], prediction.row[::-1], strict=True))
    return samples.frame.iloc[[first[each] for each in ids]].reset_index(drop=True), answers


def refuse_gaps(name: str, ids: list[str], keys: Any) -> None:
    predicted = set(keys)
    strange = predicted - set(ids)
    if strange:
        raise Refused(
            f"{name}: row {min(strange)!r} is no row of the sample; these are not predictions of the test rows"
        )
    left = [each for each in ids if each not in predicted]
    if left:
        raise Refused(
            f"{name}: row {left[0]!r} was never predicted, nor were {len(left) - 1} others (train.max_samples cuts a --debug run short)"
        )


def fitted_cuts(name: str) -> Cuts:
    """head -> where its values become labels, as the CV fitted them. A refit on all rows takes those of the same member of the
    CV; where it was trained alone nothing was fitted."""
    file = bank.folder(run_members.cv_address(name)) / "score.json"
    if run_members.cv_address(name) != name and not file.exists():
        return {}
    return dict(artifacts.read_json(artifacts.verified(file))["cuts"])


# --- competition.py ------------------------------------------------------------------------------------------------------


def postprocessed(rows: pd.DataFrame, answers: Answers) -> Answers:
    """Your own hook takes and gives one array, or with several targets a dict of them."""
    hook = pages.get("postprocess")
    if hook is None:
        return answers
    alone = next(iter(answers)) if len(answers) == 1 else None
    given = {head: value.copy() for head, value in answers.items()}
    try:
        result = hook(rows, given[alone] if alone is not None else given)
    except UserError:
        raise
    except Exception as error:
        raise pages.failed("postprocess", error) from error
    changed = {alone: result} if alone is not None else result
    where = "comp/competition.py: postprocess"
    if not isinstance(changed, Mapping) or changed.keys() != answers.keys():
        raise Refused(f"{where} must return a dict with {', '.join(answers)}")
    for head, value in answers.items():
        shape = np.shape(changed[head])
        if shape != value.shape:
            raise Refused(f"{where} returned shape {shape} for a prediction of shape {value.shape}")
    return {head: np.asarray(changed[head], np.float64) for head in answers}


def from_own(rows: pd.DataFrame, answers: Answers, sample: SampleSubmission) -> Written:
    """Whatever your own hook makes of it is written as it is, without the index, and validated like everything else."""
    import pandas as pd

    hook = pages.get("write_submission")
    assert hook is not None
    prediction = next(iter(answers.values())) if len(answers) == 1 else answers
    try:
        frame = hook(rows, prediction, pd.DataFrame(sample.rows, columns=list(sample.columns)))
    except UserError:
        raise
    except Exception as error:
        raise pages.failed("write_submission", error) from error
    if not isinstance(frame, pd.DataFrame):
        raise Refused(
            f"comp/competition.py: write_submission must return a DataFrame, not {type(frame).__name__}"
        )
    columns = [[_text(cell) for cell in frame.iloc[:, i].tolist()] for i in range(frame.shape[1])]
    return Written([list(map(str, frame.columns)), *map(list, zip(*columns, strict=True))], [])


def _text(cell: Any) -> str:
    return repr(float(cell)) if isinstance(cell, float) else str(cell)
