"""comp ensemble NAME: from configs/ensembles/NAME.yaml to ensembles/NAME/{oof,test}.arrow, apply.json and score.json.

Everything is a function of the members' files, so a killed command that runs again writes the same bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from comp.engine import hardware, text_table
from comp.engine.bank import bank, predictions, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble import average, blend_config, fit, report
from comp.engine.ensemble.blend_config import BlendConfig
from comp.engine.errors import Refused, UserError
from comp.engine.store import artifacts, locks, paths

FILES = ("oof.arrow", "test.arrow", "apply.json", "score.json")


def blend(name: str) -> dict[str, Any]:
    declared = blend_config.read(name)
    for note in blend_config.notes(declared):
        print(note)
    # Not a run's own config: members may come from several, and what is scored now is the competition's metric of now.
    cfg = resolve.load(paths.root(), "base").config
    rows = samples.load()
    split = folds.load(rows)
    folder = paths.ensemble_folder(name)
    oof, test = (
        member_predictions(declared, "oof", rows, split),
        member_predictions(declared, "test", rows, split),
    )
    artifacts.require_space(
        sum(bank.nbytes(rows, len(each[0].row)) for each in (oof, test)), f"ensembles/{name}"
    )
    hardware.set_threads(cfg.train.threads)
    nested, refits_ = member_recipes(declared), member_refits(cfg, declared, rows, split)
    made = fit.fit_ensemble(cfg, declared.blend, rows, split, oof, test, nested, refits_)
    with locks.lock(folder, f"blending {name}"):
        for file in (folder / name for name in FILES):
            artifacts.remove_from_manifest(
                file
            )  # killed from here on, a mixture of old and new reads as unfinished
        artifacts.write_json(folder / "apply.json", made.recipe)
        frame = rows.frame.iloc[test[0].row.astype(np.int64)]
        said = {address: each.heads for address, each in zip(declared.blend.members, test, strict=True)}
        heads = {"oof": made.nested, "test": average.apply(made.recipe, said, frame)}
        for kind, given in (("oof", oof), ("test", test)):
            bank.write(
                folder / f"{kind}.arrow", _prediction_set(declared, heads[kind], kind, given, rows, split)
            )
        blended = bank.read(folder / "oof.arrow", rows, split)
        facts = _record(cfg, rows, split, declared, oof, blended, made)
        record = score.write(folder, cfg, rows, split, blended, **facts)
        artifacts.add_to_manifest(folder / "apply.json")
    _print_result(name, record)
    return record


def member_predictions(declared: BlendConfig, kind: str, rows: Samples, split: Folds) -> list[PredictionSet]:
    """The members' predictions, row by row the same ones, or every reason why not."""
    found, faults = [], []
    files = (bank.folder(_address_for(each, kind)) / f"{kind}.arrow" for each in declared.blend.members)
    artifacts.hash_files(file for file in files if file.exists())
    for i, address in enumerate(declared.blend.members):
        there = _address_for(address, kind)
        why = "" if there == address else f"{address} is weighed by the OOF predictions of {there}: "
        try:
            found.append(bank.load(there, kind, rows, split))
        except UserError as refused:
            faults += [declared.fault(f"members.{i}", f"members: {why}{line}") for line in refused.lines]
    if faults:
        raise Refused(*faults)
    first = found[0]
    for i, each in enumerate(found):
        if not np.array_equal(each.row, first.row) or not np.array_equal(each.predicted, first.predicted):
            there, here = first.predicted.sum(), each.predicted.sum()
            names = declared.blend.members
            faults.append(
                declared.fault(
                    f"members.{i}",
                    f"members: {names[i]} and {names[0]} predict different {kind} rows ({here} and {there}); "
                    "a --debug run cannot be blended with a whole one",
                )
            )
    if faults:
        raise Refused(*faults)
    return found


def _address_for(member: str, kind: str) -> str:
    """Whose predictions a member is fitted by, and applied to. exp001:full has no OOF rows: it takes the weight that exp001
    earned with its own."""
    return run_members.cv_address(member) if kind == "oof" else member


def _prediction_set(
    declared: BlendConfig,
    heads: fit.Stored,
    kind: str,
    given: list[PredictionSet],
    rows: Samples,
    split: Folds,
) -> PredictionSet:
    name, listed = declared.name, declared.blend.members
    facts = {
        "run": name,
        "member": "",
        "config": declared.hash,
        "space": declared.blend.merge_space,
        "members": {address: artifacts.sha256(_file(address, kind)) for address in listed},
        "weights": {key: sha for each in given for key, sha in each.meta["weights"].items()},
        "marks": sorted({mark for each in given for mark in each.meta["marks"]}),
    }
    return PredictionSet(given[0].row, given[0].fold, heads, predictions.build_meta(kind, rows, split, facts))


def _file(address: str, kind: str) -> Any:
    return bank.find(_address_for(address, kind), kind)


def member_recipes(declared: BlendConfig) -> dict[str, Any]:
    """The apply.json of members that are ensembles; a ring of them is refused."""
    found = {}
    for i, address in enumerate(declared.blend.members):
        file = bank.folder(address) / "apply.json"
        if file.exists():
            found[address] = artifacts.read_json(artifacts.verified(file, f"comp ensemble {address}"))
            if declared.name in _addresses_in(found[address]):
                raise Refused(
                    declared.fault(f"members.{i}", f"members: {address} is itself made from {declared.name}")
                )
    return found


def member_refits(cfg: Config, declared: BlendConfig, rows: Samples, split: Folds) -> dict[str, fit.Refit]:
    """Members that labels had a hand in, fitted again on the rows that are asked for; by their declarations, which must be
    those that they were made from."""
    found: dict[str, fit.Refit] = {}
    for i, address in enumerate(declared.blend.members):
        if not _fitted_on_labels(address):
            continue
        if stale(address, artifacts.read_json(bank.folder(address) / "score.json")):
            raise Refused(
                declared.fault(
                    f"members.{i}",
                    f"members: {address} is fitted again without each fold, and its declaration or members are no longer "
                    f"those it was made from; make it again: comp ensemble {address}",
                )
            )
        inner = blend_config.read(address)
        oof, below = member_predictions(inner, "oof", rows, split), member_refits(cfg, inner, rows, split)
        found[address] = partial(fit.refit, cfg, inner.blend, rows, split, oof, below)
    return found


def _fitted_on_labels(address: str) -> bool:
    """Whether labels set something in this ensemble, or in one that it is made from."""
    file = bank.folder(address) / "score.json"
    if not (bank.folder(address) / "apply.json").exists() or not artifacts.manifest_entry(file):
        return False
    record = artifacts.read_json(artifacts.verified(file))
    return record["in_sample"] is not None or any(_fitted_on_labels(m["address"]) for m in record["members"])


def _addresses_in(recipe: dict[str, Any]) -> set[str]:
    return {m["address"] for m in recipe["members"]}.union(
        *(_addresses_in(m["recipe"]) for m in recipe["members"] if "recipe" in m)
    )


def _record(
    cfg: Config,
    rows: Samples,
    split: Folds,
    declared: BlendConfig,
    oof: list[PredictionSet],
    blended: PredictionSet,
    made: fit.FittedEnsemble,
) -> dict[str, Any]:
    """What stands beside the score: each member's own, the score of the rows that taught, and whether it really beats the
    best member and the plain mean."""
    blend, listed = declared.blend, []
    for address, share, each in zip(blend.members, made.weights, oof, strict=True):
        own = score.evaluate(cfg, rows, split, each)
        kinds = {kind: artifacts.sha256(_file(address, kind)) for kind in bank.KINDS}
        listed.append(
            {"address": address, "weight": share, "marks": own["marks"], "sha256": kinds}
            | {key: own[key] for key in ("oof", "mean", "std")}
        )
    plain = predictions.merge(oof, rows, split, "probability")
    said = score.evaluate(cfg, rows, split, plain)
    in_sample = None
    if made.in_sample is not None:
        as_taught = PredictionSet(blended.row, blended.fold, made.in_sample, blended.meta)
        in_sample = score.evaluate(cfg, rows, split, as_taught)["oof"]
    others, scores = {}, {}
    sign = score.metric_of(cfg).sign
    alone = [i for i, member in enumerate(listed) if member["oof"] is not None]
    if alone:
        best = max(alone, key=lambda i: sign * listed[i]["oof"])
        label = f"the best member {blend.members[best]}"
        others[label], scores[label] = oof[best], listed[best]["oof"]
    if (blend.method, blend.merge_space) != ("mean", "probability") and said["oof"] is not None:
        others["the plain mean"], scores["the plain mean"] = plain, said["oof"]
    beside = report.compare(cfg, rows, split, blended, others)
    for label, pair in beside["against"].items():
        pair["score"] = scores[label]
    return {
        "config": declared.hash,
        "method": blend.method,
        "space": blend.merge_space,
        "members": listed,
        "plain_mean": {key: said[key] for key in ("oof", "mean", "std")},
        "in_sample": in_sample,
        "after": made.notes,
    } | beside


def table_header(record: dict[str, Any]) -> list[str]:
    return ["member", "weight", f"{record['metric']}, all rows", "folds", "marks"]


def table_lines(name: str, record: dict[str, Any]) -> list[list[str]]:
    """The members that have a weight, the plain mean, and the ensemble itself."""

    def line(label: str, weight: str, of: dict[str, Any]) -> list[str]:
        return [label, weight, _number(of["oof"]), score.mean_std(of), ", ".join(of.get("marks", []))]

    shown = [m for m in record["members"] if m["weight"] != 0]
    rows = [line(m["address"], "-" if m["weight"] is None else f"{m['weight']:.3f}", m) for m in shown]
    return [
        *rows,
        line("plain mean", "", record["plain_mean"]),
        line(f"{name} ({record['method']})", "", record),
    ]


def summary_lines(name: str, record: dict[str, Any]) -> list[str]:
    silent = sum(m["weight"] == 0 for m in record["members"])
    out = [f"{silent} of {len(record['members'])} members have no weight"] if silent else []
    out += [*record["after"], *report.summary_lines(name, record)]
    if "selected_on_fold" in record["marks"]:
        guilty = [m["address"] for m in record["members"] if "selected_on_fold" in m["marks"]]
        out.append(
            f"selected_on_fold: {', '.join(guilty) or 'a member'} chose its epoch on the rows it is scored on, "
            "so these scores are too good"
        )
    return out


def _print_result(name: str, record: dict[str, Any]) -> None:
    print(text_table.render(table_header(record), table_lines(name, record), ["weight"]))
    print(*summary_lines(name, record), sep="\n")
    folder = paths.relative(paths.ensemble_folder(name))
    print(
        f"written: {folder}/oof.arrow, test.arrow, apply.json, score.json\nnext: comp submit {name} --dry-run"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def stale(name: str, record: dict[str, Any]) -> bool:
    """Declared anew, or a member made anew, since this ensemble was made."""
    try:
        if blend_config.read(name).hash != record["config"]:
            return True
    except UserError:
        return True
    for member in record["members"]:
        for kind, then in member["sha256"].items():
            entry = artifacts.manifest_entry(
                bank.folder(_address_for(member["address"], kind)) / f"{kind}.arrow"
            )
            if entry is not None and entry["sha256"] != then:
                return True
    return False
