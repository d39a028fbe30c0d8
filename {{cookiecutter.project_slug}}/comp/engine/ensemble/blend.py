"""comp ensemble NAME: from configs/ensembles/NAME.yaml to ensembles/NAME/{oof,test}.arrow, apply.json and
score.json.

Everything is a function of the members' files, so a killed command that runs again writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware
from comp.engine.bank import bank
from comp.engine.bank.predictions import PredictionSet, build_meta
from comp.engine.ensemble import average, blend_config, fit, members, report
from comp.engine.ensemble.blend_config import BlendConfig
from comp.engine.ensemble.context import Setup, load_setup
from comp.engine.store import artifacts, locks, paths

FILES = ("oof.arrow", "test.arrow", "apply.json", "score.json")


def blend(name: str) -> dict[str, Any]:
    """Fits the ensemble, writes its files and prints its scores; returns the content of score.json."""
    config = blend_config.read(name)
    for warning in blend_config.warnings(config):
        print(warning)
    setup = load_setup()
    folder = paths.ensemble_folder(name)
    oof, test = (members.predictions(config, kind, setup) for kind in bank.KINDS)
    size = sum(bank.nbytes(setup.samples, len(sets[0].row)) for sets in (oof, test))
    artifacts.require_space(size, f"ensembles/{name}")
    hardware.set_threads(setup.cfg.train.threads)
    fitted = fit.fit_ensemble(
        setup, config.blend, oof, test, members.recipes(config), members.refits(config, setup)
    )
    with locks.lock(folder, f"blending {name}"):
        for file in FILES:  # killed from here on, a mixture of old and new files counts as unfinished
            artifacts.remove_from_manifest(folder / file)
        artifacts.write_json(folder / "apply.json", fitted.recipe)
        frame = setup.samples.frame.iloc[test[0].row.astype(np.int64)]
        values = {address: part.heads for address, part in zip(config.blend.members, test, strict=True)}
        heads = {"oof": fitted.nested, "test": average.apply(fitted.recipe, values, frame)}
        for kind, sets in (("oof", oof), ("test", test)):
            bank.write(folder / f"{kind}.arrow", _prediction_set(config, heads[kind], kind, sets, setup))
        record = report.write_score(setup, config, oof, fitted)
        artifacts.add_to_manifest(folder / "apply.json")
    report.print_result(name, record)
    return record


def _prediction_set(
    config: BlendConfig,
    heads: Mapping[str, NDArray[np.float32]],
    kind: str,
    sets: list[PredictionSet],
    setup: Setup,
) -> PredictionSet:
    facts = {
        "run": config.name,
        "member": "",
        "config": config.hash,
        "space": config.blend.merge_space,
        "members": {
            address: artifacts.sha256(members.file(address, kind)) for address in config.blend.members
        },
        "weights": {key: sha for part in sets for key, sha in part.meta["weights"].items()},
        "marks": sorted({mark for part in sets for mark in part.meta["marks"]}),
    }
    meta = build_meta(kind, setup.samples, setup.folds, facts)
    return PredictionSet(sets[0].row, sets[0].fold, heads, meta)
