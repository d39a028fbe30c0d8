"""comp kernel NAME --budget 9h: what gains least for its seconds goes first, until the rest fits. What it gains is known
from OOF rows; what it takes, from a rehearsal on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comp.engine import hardware
from comp.engine.bank import bank, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve, run_members, yaml_lines
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.deliver import kernel, rehearse
from comp.engine.ensemble import average, blend, blend_config
from comp.engine.errors import Refused, UserError
from comp.engine.store import artifacts, paths


@dataclass(frozen=True)
class Team:
    """Members with their shares, as an ensemble file would list them."""

    members: tuple[str, ...]
    shares: tuple[float, ...]


def fit(name: str, text: str) -> str:
    """The name of what fits: NAME itself, a member with fewer views, or a new ensemble NAME-<budget>."""
    limit = hardware.parse_duration("--budget", text)
    cfg = resolve.load(paths.root(), "base").config
    if not rehearse.file_of(name).exists():
        kernel.build(name)
        measure(name)
    facts = artifacts.read_json(rehearse.file_of(name))
    table = samples.load()
    split = folds.load(table)
    ensemble = (bank.folder(name) / "apply.json").exists()
    declared = blend_config.read(name) if ensemble else None
    team = (
        Team(tuple(declared.blend.members), tuple(declared.blend.shares))
        if declared
        else Team((name,), (1.0,))
    )
    space = declared.blend.merge_space if declared else "probability"
    sign = score.metric_of(cfg).sign
    first = team
    while True:
        takes = facts["start"] + cost(team, facts)
        if takes <= limit:
            break
        now = sign * worth(team, space, cfg, table, split)
        options = []
        for other, why in cheaper(team):
            saved = cost(team, facts) - cost(other, facts)
            if saved > 0:
                lost = now - sign * worth(other, space, cfg, table, split)
                options.append((lost / saved, why, other, lost, saved))
        if not options:
            raise Refused(
                f"{name}: takes {takes / 3600:.2f} h with one member and its fewest views left; {text} are not enough"
            )
        _, why, team, lost, saved = min(options, key=lambda option: option[0])
        print(f"{why}: {-lost:+.5f} for {saved / 3600:.2f} h")
    print(f"{name}: {(facts['start'] + cost(team, facts)) / 3600:.2f} h of {text}, on this machine")
    if team == first:
        return name
    if len(team.members) == 1 and not declared:
        return team.members[0]
    return _declared(name, text, team, declared)


def measure(name: str) -> None:
    """A rehearsal whose only refusal may be that it takes too long: that is why we are here."""
    try:
        rehearse.rehearse(name)
    except UserError:
        if not rehearse.file_of(name).exists():
            raise


def cost(team: Team, facts: dict[str, Any]) -> float:
    """Seconds for the hidden set. A model that two members share is run once; fewer views take their share of the time."""
    total, measured = 0.0, facts["seconds_an_image"]
    for leaf in {
        leaf["address"]: leaf for member in team.members for leaf in kernel.leaves_of(member)
    }.values():
        if leaf["address"] in measured:
            total += measured[leaf["address"]]
            continue
        alike = [
            (each, kernel.leaves_of(each)[0]) for each in measured if each.partition(":")[0] == leaf["run"]
        ]
        one, known = max(alike, key=lambda pair: len(pair[1]["tta"]))
        passes = len(leaf["tta"]) * len(leaf["checkpoints"]) / (len(known["tta"]) * len(known["checkpoints"]))
        total += measured[one] * passes
    return total * float(facts["hidden_rows"])


def cheaper(team: Team) -> list[tuple[Team, str]]:
    """One member less, or one member with fewer views, where such a member has OOF predictions."""
    found = []
    for i, member in enumerate(team.members):
        if len(team.members) > 1:
            shares = team.shares[:i] + team.shares[i + 1 :]
            if sum(shares) > 0:
                found.append(
                    (
                        Team(
                            team.members[:i] + team.members[i + 1 :], tuple(s / sum(shares) for s in shares)
                        ),
                        f"without {member}",
                    )
                )
        for other in siblings(member):
            if other not in team.members:
                found.append(
                    (
                        Team((*team.members[:i], other, *team.members[i + 1 :]), team.shares),
                        f"{other} for {member}",
                    )
                )
    return found


def siblings(member: str) -> list[str]:
    """The same checkpoints under fewer views."""
    if (bank.folder(member) / "apply.json").exists():
        return []
    mine = kernel.leaves_of(member)[0]
    found = []
    for address in bank.members():
        if (
            address.partition(":")[0] != mine["run"]
            or address == member
            or not (bank.folder(run_members.cv_address(address)) / "oof.arrow").exists()
        ):
            continue
        leaf = kernel.leaves_of(address)[0]
        if leaf["checkpoints"] == mine["checkpoints"] and set(leaf["tta"]) < set(mine["tta"]):
            found.append(address)
    return found


def worth(team: Team, space: str, cfg: Config, table: Samples, split: Folds) -> float:
    sets = [bank.load(run_members.cv_address(each), "oof", table, split) for each in team.members]
    nested = {
        each: artifacts.read_json(bank.folder(each) / "apply.json")
        for each in team.members
        if (bank.folder(each) / "apply.json").exists()
    }
    recipe = average.build_recipe(table, team.members, sets, team.shares, space, nested)
    heads = average.apply(recipe, {each: s.heads for each, s in zip(team.members, sets, strict=True)})
    found = score.evaluate(
        cfg, table, split, PredictionSet(sets[0].row, sets[0].fold, heads, {**sets[0].meta, "marks": []})
    )["oof"]
    if found is None:
        raise Refused(f"{', '.join(team.members)}: the metric is undefined on their OOF rows")
    return float(found)


def _declared(name: str, text: str, team: Team, declared: Any) -> str:
    """configs/ensembles/NAME-<budget>.yaml, and what it makes."""
    new = f"{name}-{text}"
    said = {key: value for key, value in declared.blend.model_dump().items() if value is not None} | {
        "members": list(team.members)
    }
    if "weights" in said:
        said["weights"] = [round(share, 6) for share in team.shares]
    file = paths.path("configs", "ensembles", f"{new}.yaml")
    artifacts.write_text(
        file,
        f"# {name}, less what does not fit into {text}: written by comp kernel {name} --budget {text}\n{yaml_lines.dump(said)}",
    )
    print(f"written: {paths.relative(file)}")
    blend.blend(new)
    return new
