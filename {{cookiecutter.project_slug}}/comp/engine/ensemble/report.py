"""The scores of an ensemble: nested and in-sample, against its best member and the plain mean; score.json and
the printed table.

The nested score predicts each fold with parameters fitted on the other folds; the in-sample score uses
parameters fitted on all rows. Their difference is the optimism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comp.engine import text_table
from comp.engine.bank import bank, predictions, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.ensemble import comparison, members
from comp.engine.ensemble.blend_config import BlendConfig
from comp.engine.ensemble.context import Setup
from comp.engine.ensemble.fit import FittedEnsemble
from comp.engine.store import artifacts, paths


def write_score(
    setup: Setup, config: BlendConfig, oof: list[PredictionSet], fitted: FittedEnsemble
) -> dict[str, Any]:
    """Writes score.json, after oof.arrow was written."""
    folder = paths.ensemble_folder(config.name)
    blended = bank.read(folder / "oof.arrow", setup.samples, setup.folds)
    facts = _facts(setup, config, oof, blended, fitted)
    return score.write(folder, setup.cfg, setup.samples, setup.folds, blended, **facts)


def oof_score(setup: Setup, predictions: PredictionSet) -> float | None:
    """The score over all OOF rows; None if it is undefined."""
    oof: float | None = score.evaluate(setup.cfg, setup.samples, setup.folds, predictions)["oof"]
    return oof


def _facts(
    setup: Setup,
    config: BlendConfig,
    oof: list[PredictionSet],
    blended: PredictionSet,
    fitted: FittedEnsemble,
) -> dict[str, Any]:
    """What score.json has besides the score itself: the scores of the members, of the plain mean and
    in-sample, and the comparison with the best member and the plain mean."""
    tables = (setup.cfg, setup.samples, setup.folds)
    blend, listed = config.blend, []
    for address, weight, part in zip(blend.members, fitted.weights, oof, strict=True):
        own = score.evaluate(*tables, part)
        hashes = {kind: artifacts.sha256(members.file(address, kind)) for kind in bank.KINDS}
        listed.append(
            {"address": address, "weight": weight, "marks": own["marks"], "sha256": hashes}
            | {key: own[key] for key in ("oof", "mean", "std")}
        )
    plain = predictions.merge(oof, setup.samples, setup.folds, "probability")
    plain_score = score.evaluate(*tables, plain)
    in_sample = None
    if fitted.in_sample is not None:
        set_in_sample = PredictionSet(blended.row, blended.fold, fitted.in_sample, blended.meta)
        in_sample = oof_score(setup, set_in_sample)
    others, scores = {}, {}
    sign = score.metric_of(setup.cfg).sign
    with_score = [i for i, member in enumerate(listed) if member["oof"] is not None]
    if with_score:
        best = max(with_score, key=lambda i: sign * listed[i]["oof"])
        label = f"the best member {blend.members[best]}"
        others[label], scores[label] = oof[best], listed[best]["oof"]
    if (blend.method, blend.merge_space) != ("mean", "probability") and plain_score["oof"] is not None:
        others["the plain mean"], scores["the plain mean"] = plain, plain_score["oof"]
    compared = comparison.compare(*tables, blended, others)
    for label, pair in compared["against"].items():
        pair["score"] = scores[label]
    return {
        "config": config.hash,
        "method": blend.method,
        "space": blend.merge_space,
        "members": listed,
        "plain_mean": {key: plain_score[key] for key in ("oof", "mean", "std")},
        "in_sample": in_sample,
        "after": fitted.notes,
    } | compared


# --- printed ------------------------------------------------------------------------------------------------


def print_result(name: str, record: dict[str, Any]) -> None:
    print(text_table.render(table_header(record), table_lines(name, record), ["weight"]))
    print(*summary_lines(name, record), sep="\n")
    folder = paths.relative(paths.ensemble_folder(name))
    print(
        f"written: {folder}/oof.arrow, test.arrow, apply.json, score.json\nnext: comp submit {name} --dry-run"
    )


def table_header(record: dict[str, Any]) -> list[str]:
    return ["member", "weight", f"{record['metric']} OOF", "folds", "marks"]


def table_lines(name: str, record: dict[str, Any]) -> list[list[str]]:
    """The members with a weight, the plain mean, and the ensemble itself."""

    def line(label: str, weight: str, scores: dict[str, Any]) -> list[str]:
        oof = "-" if scores["oof"] is None else f"{scores['oof']:.4f}"
        return [label, weight, oof, score.mean_std(scores), ", ".join(scores.get("marks", []))]

    shown = [m for m in record["members"] if m["weight"] != 0]
    rows = [line(m["address"], "-" if m["weight"] is None else f"{m['weight']:.3f}", m) for m in shown]
    return [
        *rows,
        line("plain mean", "", record["plain_mean"]),
        line(f"{name} ({record['method']})", "", record),
    ]


def summary_lines(name: str, record: dict[str, Any]) -> list[str]:
    without = sum(m["weight"] == 0 for m in record["members"])
    lines = [f"{without} of {len(record['members'])} members have no weight"] if without else []
    lines += [*record["after"], *score_lines(name, record)]
    if "selected_on_fold" in record["marks"]:
        marked = [m["address"] for m in record["members"] if "selected_on_fold" in m["marks"]]
        lines.append(
            f"selected_on_fold: {', '.join(marked) or 'a member'} chose the epoch on the validation rows; "
            "these scores are too good"
        )
    return lines


def score_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """Nested and in-sample score, interval, comparisons, recommendation."""
    if record["oof"] is None:
        return [score.summary(record)]
    sign = 1 if record["direction"] == "max" else -1
    lines = []
    if record["in_sample"] is not None:
        optimism = sign * (record["in_sample"] - record["oof"])
        lines.append(
            f"nested score {record['oof']:.4f}, in-sample {record['in_sample']:.4f}: optimism {optimism:.4f}"
        )
    if record["interval"]:
        low, high = record["interval"]["low"], record["interval"]["high"]
        level = f"{100 * record['interval']['level']:.0f}"
        test = record["interval"]["on_test"]
        lines.append(
            f"{level} % CI of the OOF score {low:.4f} to {high:.4f}; "
            f"{level} % prediction interval for the test score {test['low']:.4f} to {test['high']:.4f}"
        )
    elif reason := record.get("undefined_interval"):
        lines.append(f"no interval and no comparison: {reason}")
    for other, pair in record["against"].items():
        lines.append(f"against {other} ({pair['score']:.4f}): {pair['text']}")
    lines.append(recommendation(name, record))
    return lines


def recommendation(name: str, record: Mapping[str, Any]) -> str:
    """The ensemble, unless the best member or the plain mean scores as well."""
    sign = 1 if record["direction"] == "max" else -1
    pairs = record["against"]
    simpler = {other: pair["score"] for other, pair in pairs.items()} or _simpler(record)

    def as_good(other: str) -> bool:
        gain = sign * (record["oof"] - simpler[other])
        return gain <= 0 or (other in pairs and not pairs[other]["significant"])

    candidates = [other for other in simpler if as_good(other)]
    if not candidates:
        return f"recommended: {name}"
    best = max(candidates, key=lambda other: sign * simpler[other])
    if sign * (record["oof"] - simpler[best]) > 0:
        return f"recommended: {best}; within noise: it is simpler and as good as {name}"
    return f"recommended: {best}, which is simpler and scores {simpler[best]:.4f}, not worse than {name}"


def _simpler(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores of the best member and the plain mean, for a record without comparisons."""
    sign = 1 if record["direction"] == "max" else -1
    with_score = [member for member in record["members"] if member["oof"] is not None]
    found = {}
    if with_score:
        best = max(with_score, key=lambda member: sign * member["oof"])
        found[f"the best member {best['address']}"] = best["oof"]
    is_plain = (record["method"], record["space"]) == ("mean", "probability")
    if not is_plain and record["plain_mean"]["oof"] is not None:
        found["the plain mean"] = record["plain_mean"]["oof"]
    return found
