"""What a teacher says of the rows that a fold learns from, asked once, before the fold begins: by the teacher's models of the same fold,
with the size, the views and the means of the teacher's own config. runs/<run>/seed<s>/fold<k>/lessons.safetensors
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from comp import predict
from comp.engine.bank import bank, predictions
from comp.engine.config.schema import Config
from comp.engine.errors import Refused
from comp.engine.hardware import Stop
from comp.engine.run import distillation, teachers
from comp.engine.run.context import Context
from comp.engine.run.teachers import Teacher
from comp.engine.store import artifacts, paths


def prepare(
    context: Context, gather: Callable[[Config], Context], number: int | str, folder: Path, stop: Stop
) -> None:
    """`context`: that of the fold. `gather` loads the context of the teacher's config."""
    name = context.cfg.distill.teacher
    if name is None:
        return
    who = teachers.load(name, context.folds, "distill.teacher")
    file = folder / distillation.FILE
    places = [_with_weights(voice, number, context) for voice in who.voices]
    now = bank.weights_of(*(place for each in places for place in each))
    if entry := artifacts.manifest_entry(file):
        if changed := distillation.changed_weights(now, entry["weights"]):
            raise Refused(
                f"{paths.relative(file)}: runs/{changed[0]} was trained anew since it taught; begin this run again with --fresh"
            )
        return
    rows, said, shares = distillation.train_rows(context, number), [], list[float]()
    for voice, there in zip(who.voices, places, strict=True):
        own = _as(voice, context, gather)
        for place in there:
            heads, damaged = predict.predict(
                own, place / bank.WEIGHTS, rows, f"{paths.relative(place)} teaches fold {number}", stop=stop
            )
            if damaged:
                ids = context.samples.frame["id"]
                raise Refused(
                    *(
                        f"sample {ids.iloc[i]}: {why}; comp check lists every such file"
                        for i, why in damaged.items()
                    )
                )
            said.append(heads)
            shares.append(voice.share / len(there))
    means = {
        head.name: predictions.average([each[head.name] for each in said], head, who.space, shares)
        for head in context.samples.heads
    }
    _write(file, rows, means, now)


def _with_weights(voice: Teacher, number: int | str, context: Context) -> list[Path]:
    there = [
        place
        for place in voice.places(number, context.folds)
        if artifacts.manifest_entry(place / bank.WEIGHTS)
    ]
    wanted = context.folds.count if number == "full" else 1
    if len({place.relative_to(paths.run_folder(voice.run)).parts[1] for place in there}) < wanted:
        which = "of every fold" if number == "full" else f"of fold {number}"
        raise Refused(
            f"distill.teacher: {voice.address} has no weights {which}, and those of another fold have seen the rows that this one is scored on; "
            f"train it first: comp train {voice.run}{'' if number == 'full' else f' --fold {number}'}"
        )
    return there


def _as(voice: Teacher, context: Context, gather: Callable[[Config], Context]) -> Context:
    """Its pictures in its own size, on this run's machine."""
    theirs = voice.cfg.model_copy(update={"machine": context.cfg.machine, "track": context.cfg.track})
    return gather(theirs)


def _write(file: Path, rows: np.ndarray, means: dict[str, np.ndarray], weights: dict[str, str]) -> None:
    from safetensors.numpy import save

    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(
            save(
                {
                    "rows": rows,
                    **{name: np.ascontiguousarray(each, np.float32) for name, each in means.items()},
                }
            )
        )
    artifacts.add_to_manifest(file, weights=weights)
