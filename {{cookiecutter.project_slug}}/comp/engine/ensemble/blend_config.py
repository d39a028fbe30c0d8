"""configs/ensembles/*.yaml: which members, how they become one. Every mistake is one line with the file and its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from comp.engine.config import resolve
from comp.engine.config.competition_schema import Count, NotNegative, OneOrMore, Positive, Section
from comp.engine.config.resolve import nearest
from comp.engine.ensemble import member_filter
from comp.engine.errors import Refused, UserError
from comp.engine.store import artifacts, paths

AVERAGES = ("mean", "weighted", "rank", "geometric", "power", "median", "trimmed", "snapshots")
SEARCHED = ("greedy", "hill", "slsqp", "optuna")
STACKED = ("logistic", "ridge", "elastic_net", "mlp", "lightgbm")
Method = Literal[
    "mean", "weighted", "rank", "geometric", "power", "median", "trimmed", "snapshots",
    "greedy", "hill", "slsqp", "optuna",
    "logistic", "ridge", "elastic_net", "mlp", "lightgbm",
]  # fmt: skip
After = Literal["temperature", "platt", "isotonic", "thresholds"]
# Which methods know a key; with any other it would have no effect, and that is refused.
METHODS_OF_KEY = {
    "weights": ("weighted", "rank", "geometric"),
    "power": ("power",),
    "trim": ("trimmed",),
    "rounds": ("greedy",),
    "precision": ("hill",),
    "trials": ("optuna",),
    "negative": ("hill", "slsqp", "optuna"),
    "bags": SEARCHED,
    "bag_of": SEARCHED,
    "per_class": SEARCHED,
    "max_seconds": SEARCHED,
    "images": SEARCHED,
    "strength": STACKED,
    "metadata": STACKED,
    "encoded": STACKED,
}


class Blend(Section):
    members: OneOrMore  # runs, members, ensembles, exp003:snapshots, exp003:seeds, or a filter like score>0.9
    method: Method
    space: Literal["probability", "logit", "geometric", "rank"] | None = None  # where members meet
    weights: Annotated[list[NotNegative], Field(min_length=1)] | None = None  # one a member, in their order
    power: Positive | None = None  # 2.0; above 1 the surest member is heard most
    trim: Annotated[float, Field(ge=0, lt=0.5)] | None = None  # 0.2; share of members left out at each end
    rounds: Count | None = None  # 50; members picked, with replacement
    precision: Positive | None = None  # 0.05; steps between weights that are tried
    trials: Count | None = None  # 200
    negative: bool | None = None  # false; weights below 0
    bags: Count | None = None  # 1; searches whose weights are averaged
    # members: half of them a bag; rows: a bootstrap sample a bag; folds: a bag without each of them, as many as there are
    bag_of: Literal["members", "rows", "folds"] | None = None
    per_class: bool | None = None  # false; each class has weights of its own
    max_seconds: Positive | None = None  # no ceiling; of inference, from the latencies measured in prediction
    images: Count | None = None  # that max_seconds must do; the rows of the test table
    strength: Positive | None = None  # of the penalty; chosen on parts of the rows that teach
    metadata: OneOrMore | None = None  # columns of competition.metadata that a stacker reads
    encoded: OneOrMore | None = None  # such columns as target means, those of the other folds
    after: Annotated[list[After], Field(min_length=1)] | None = (
        None  # tried in this order, kept where the honest score gains
    )
    correct: Literal["prior", "rank"] | None = None  # of test predictions, where test differs from train

    @model_validator(mode="after")
    def _fit_together(self) -> Blend:
        for key, methods in METHODS_OF_KEY.items():
            if getattr(self, key) is not None and self.method not in methods:
                if key == "weights":
                    raise ValueError(
                        f"weights: the {self.method} weighs all members alike; write method: weighted, or leave weights out"
                        if self.method in AVERAGES
                        else f"weights: method: {self.method} finds its own; leave weights out"
                    )
                raise ValueError(
                    f"{key}: has no effect with method: {self.method}; {', '.join(methods)} know it"
                )
        if self.bag_of == "folds" and self.bags is not None:
            raise ValueError(
                "bags: has no effect with bag_of: folds, which makes one bag a fold; leave it out"
            )
        if self.bag_of in ("members", "rows") and (self.bags or 1) == 1:
            raise ValueError("bag_of: has no effect without bags, a number above 1")
        if self.images is not None and self.max_seconds is None:
            raise ValueError("images: has no effect without max_seconds")
        if self.space == "rank" and self.method not in SEARCHED and self.method != "rank":
            raise ValueError(
                f"space: rank is for {', '.join(SEARCHED)}; the plain mean of ranks is method: rank"
            )
        if self.space == "rank" and self.negative:
            raise ValueError(
                "negative: a mean of ranks has no room for weights below 0; take space: probability or logit"
            )
        if self.method in STACKED and self.space not in (None, "logit", "probability"):
            raise ValueError(f"space: {self.space} is no input of a stacker; take logit or probability")
        if self.weights is None:
            if self.method == "weighted":
                raise ValueError(
                    f"method: weighted needs weights: a list of {len(self.members)} numbers, one a member"
                )
            return self
        if len(self.weights) != len(self.members):
            raise ValueError(
                f"weights: {len(self.weights)} numbers for {len(self.members)} members, one each is wanted"
            )
        if not sum(self.weights) > 0:
            raise ValueError("weights: all are 0, so nobody speaks")
        return self

    @property
    def shares(self) -> list[float]:
        """Weights that sum to 1. Of snapshots the later cycles weigh more."""
        if self.method == "snapshots":
            weights = [float(i + 1) for i in range(len(self.members))]
        else:
            weights = self.weights or [1.0] * len(self.members)
        return [weight / sum(weights) for weight in weights]

    @property
    def merge_space(self) -> str:
        usual = "logit" if self.method in STACKED else "probability"
        return {"rank": "rank", "geometric": "geometric"}.get(self.method, self.space or usual)


@dataclass(frozen=True)
class BlendConfig:
    name: str
    blend: Blend
    lines: Mapping[str, str]  # dotted key -> file:line

    @property
    def hash(self) -> str:
        """Of what is declared, not of how the file is written."""
        return artifacts.digest(self.blend.model_dump())

    def fault(self, key: str, message: str) -> str:
        return f"{self.lines.get(key, f'configs/ensembles/{self.name}.yaml')}: {message}"


def read(name: str) -> BlendConfig:
    folder = paths.path("configs", "ensembles")
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(each.stem for each in folder.glob("*.yaml"))
        there = (
            f"the nearest are {', '.join(nearest(name, known, 3))}" if known else "the folder has none yet"
        )
        raise Refused(f"{paths.relative(file)}: no such file; {there}")
    tree, lines = resolve.parse(file, paths.relative(file))
    blend = resolve.validate(Blend, tree, lines, paths.relative(file))
    blend = blend.model_copy(update={"members": _expanded(name, blend, lines)})
    declared = BlendConfig(name, blend, lines)
    if faults := _faults(declared):
        raise Refused(*faults)
    return declared


def _expanded(name: str, blend: Blend, lines: Mapping[str, str]) -> list[str]:
    """Filters and plurals as the addresses that they stand for now."""
    found: list[str] = []
    for i, entry in enumerate(blend.members):
        where = lines.get(f"members.{i}", f"configs/ensembles/{name}.yaml")
        if not member_filter.is_filter(entry):
            found.append(entry)
            continue
        try:
            many = member_filter.addresses(entry)
        except UserError as refused:
            raise Refused(*(f"{where}: members: {line}" for line in refused.lines)) from None
        found += [each for each in many if each not in found]
        if blend.weights is not None:
            raise Refused(
                f"{where}: members: {entry} stands for several, so weights cannot be given one by one"
            )
    return found


def _faults(declared: BlendConfig) -> list[str]:
    members, faults = declared.blend.members, []
    for i, member in enumerate(members):
        if member in members[:i]:
            faults.append(
                declared.fault(
                    f"members.{i}", f"members: {member} stands here twice; give it a weight instead"
                )
            )
        if member.partition(":")[0] == declared.name:
            faults.append(declared.fault(f"members.{i}", f"members: {member} is this ensemble itself"))
    if paths.run_folder(declared.name).is_dir():
        faults.append(
            f"{declared.name}: is the name of a run already, and an address must mean one thing; rename the file"
        )
    return faults


def notes(declared: BlendConfig) -> list[str]:
    """What was written and has no effect is said aloud."""
    blend = declared.blend
    if blend.space is None or blend.space == blend.merge_space:
        return []
    return [
        declared.fault(
            "space",
            f"space: {blend.space} has no effect, since method: {blend.method} says where members meet",
        )
    ]
