"""From stored predictions to submissions/<name>.csv, in the form that competition.yaml declares.

scored_rows    one prediction for each row of the host's sample submission, several test rows of one id merged
postprocess    your function in competition.py, if it is there: predictions in, predictions out
make_lines     the cells, by engine/deliver/submission_format.py or by your write_submission
save           engine/deliver/validate.py reads the file back; an older one is replaced only if it is valid
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.engine import pages
from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.sample_submission import SampleSubmission, load_sample, scored_ids, validate_current
from comp.engine.data.samples import Samples, aggregate_rows
from comp.engine.deliver import validate
from comp.engine.deliver.submission_format import (
    CellRules,
    Cuts,
    Lines,
    Predictions,
    cell_rules,
    format_lines,
    shortened,
    validate_form,
)
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

PAGE = "comp/competition.py"


def write(cfg: Config, samples: Samples, name: str, prediction: PredictionSet) -> Path:
    """submissions/<name>.csv of these test predictions."""
    file = paths.submission_file(name.replace(":", "-"))
    validate_form(cfg.competition.submission, samples.heads)
    sample = load_sample(cfg.competition)
    validate_current(sample, samples, scored_ids(cfg.competition, sample, samples.heads))
    made, rules = make_lines(cfg, samples, name, prediction, sample, fitted_cuts)
    save(file, made, rules, sample)
    hashes = {"sample": artifacts.sha256(sample.file), "samples": samples.hash}
    artifacts.add_to_manifest(file, of=name, form=rules.form, rows=len(sample.rows), **hashes)
    for note in made.notes:
        print(note)
    size = f"{len(sample.rows)} rows, {len(sample.columns)} columns ({shortened(sample.columns)})"
    print(
        f"{paths.relative(file)}: {size}, form {rules.form}; validated, sha256 {artifacts.sha256(file)[:12]}"
    )
    print(f'next: comp submit {name} -m "…"')
    return file


def make_lines(
    cfg: Config,
    samples: Samples,
    name: str,
    prediction: PredictionSet,
    sample: SampleSubmission,
    cuts: Callable[[str], Cuts],
) -> tuple[Lines, CellRules]:
    """The lines of the file, and the rules that its cells are validated by."""
    rules, ids = cfg.competition.submission, scored_ids(cfg.competition, sample, samples.heads)
    rows, predictions = scored_rows(samples, name, prediction, ids, cfg.competition.merge)
    predictions = postprocess(rows, predictions)
    if pages.get("write_submission"):
        if rules.rows is None:  # one row for each line of the sample, also where it repeats an id
            place = {row: i for i, row in enumerate(ids)}
            at = np.array([place[key] for key in sample.row_keys])
            rows = rows.iloc[at].reset_index(drop=True)
            predictions = {head: value[at] for head, value in predictions.items()}
        made = call_write_submission(rows, predictions, sample)
    else:
        forms = set(rules.form.values()) if isinstance(rules.form, dict) else {rules.form}
        fitted = cuts(name) if forms & {"label", "labels", "ranking"} else {}
        made = format_lines(rules, samples.heads, predictions, sample, fitted, ids)
    return made, cell_rules(rules, samples.heads, sample)


def save(file: Path, made: Lines, rules: CellRules, sample: SampleSubmission) -> None:
    """Replaces the file only after the very bytes that are written have been validated."""
    with artifacts.atomic(file) as temporary:
        temporary.write_text(csv_text(made, sample), encoding="utf-8", newline="\n")
        validate.validate_bytes(temporary.read_bytes(), paths.relative(file), sample, rules)


def csv_text(made: Lines, sample: SampleSubmission) -> str:
    return "".join(validate.csv_line(line, sample.delimiter) for line in made.lines)


# --- rows ---------------------------------------------------------------------------------------------------


def scored_rows(
    samples: Samples, name: str, prediction: PredictionSet, ids: list[str], merge: str = "mean"
) -> tuple[pd.DataFrame, Predictions]:
    """Rows of the samples table and predictions (rows, outputs), one for each of `ids` and in their order."""
    keys = samples.frame["row"].to_numpy()[prediction.row]
    validate_rows(name, ids, keys)
    predictions = {}
    for head in samples.heads:
        missing = np.flatnonzero(~np.isfinite(prediction.heads[head.name]).all(axis=1))
        if len(missing):
            raise UserError(
                "prediction-missing",
                where=name,
                key=f"row {keys[missing[0]]!r}, target {head.name!r}",
                what=f"no prediction (NaN), as for {len(missing)} of {len(keys)} rows",
            )
        predictions[head.name] = aggregate_rows(keys, prediction.probability(head), ids, merge)
    first = dict(zip(keys[::-1], prediction.row[::-1], strict=True))
    return samples.frame.iloc[[first[row] for row in ids]].reset_index(drop=True), predictions


def validate_rows(name: str, ids: list[str], keys: Any) -> None:
    """Predictions must be of exactly the rows of the sample submission."""
    predicted = set(keys)
    unknown = predicted - set(ids)
    if unknown:
        raise UserError(
            "rows-differ",
            where=name,
            key=f"row {min(unknown)!r}",
            what="not in the sample submission, so these are not predictions of the test rows",
        )
    missing = [row for row in ids if row not in predicted]
    if missing:
        raise UserError(
            "rows-differ",
            where=name,
            key=f"row {missing[0]!r}",
            what=f"no prediction, nor for {len(missing) - 1} other rows",
            remedy="train without --debug and train.max_samples, which predict only a part",
        )


def fitted_cuts(name: str) -> Cuts:
    """head -> thresholds fitted on the OOF rows. A refit on all rows takes those of the same member of the CV
    run; without a CV run none were fitted."""
    file = bank.folder(run_members.cv_address(name)) / "score.json"
    if run_members.cv_address(name) != name and not file.exists():
        return {}
    return dict(artifacts.read_json(artifacts.verified(file))["cuts"])


# --- your functions in competition.py -----------------------------------------------------------------------


def postprocess(rows: pd.DataFrame, predictions: Predictions) -> Predictions:
    """Your postprocess(rows, predictions) gets and returns one array, or a dict of arrays if there are
    several targets."""
    function = pages.get("postprocess")
    if function is None:
        return predictions
    single = next(iter(predictions)) if len(predictions) == 1 else None
    copies = {head: value.copy() for head, value in predictions.items()}
    try:
        result = function(rows, copies[single] if single is not None else copies)
    except UserError:
        raise
    except Exception as error:
        raise pages.failed("postprocess", error) from error
    changed = {single: result} if single is not None else result
    if not isinstance(changed, Mapping) or changed.keys() != predictions.keys():
        raise UserError(
            "hook-result",
            where=PAGE,
            key="postprocess",
            what=f"must return a dict with {', '.join(predictions)}",
        )
    for head, value in predictions.items():
        shape = np.shape(changed[head])
        if shape != value.shape:
            raise UserError(
                "hook-result",
                where=PAGE,
                key="postprocess",
                what=f"returned shape {shape} for predictions of shape {value.shape}",
            )
    return {head: np.asarray(changed[head], np.float64) for head in predictions}


def call_write_submission(rows: pd.DataFrame, predictions: Predictions, sample: SampleSubmission) -> Lines:
    """The DataFrame that your write_submission(rows, predictions, sample) returns, without its index;
    validated like any other."""
    import pandas as pd

    function = pages.get("write_submission")
    assert function is not None
    prediction = next(iter(predictions.values())) if len(predictions) == 1 else predictions
    try:
        frame = function(rows, prediction, pd.DataFrame(sample.rows, columns=list(sample.columns)))
    except UserError:
        raise
    except Exception as error:
        raise pages.failed("write_submission", error) from error
    if not isinstance(frame, pd.DataFrame):
        raise UserError(
            "hook-result",
            where=PAGE,
            key="write_submission",
            what=f"must return a DataFrame, not {type(frame).__name__}",
        )
    columns = [[_text(cell) for cell in frame.iloc[:, i].tolist()] for i in range(frame.shape[1])]
    return Lines([list(map(str, frame.columns)), *map(list, zip(*columns, strict=True))], [])


def _text(cell: Any) -> str:
    return repr(float(cell)) if isinstance(cell, float) else str(cell)
