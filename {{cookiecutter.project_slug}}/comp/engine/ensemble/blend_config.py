"""configs/ensembles/*.yaml: the members of an ensemble and the method that combines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from comp.engine.config import resolve
from comp.engine.config.competition_schema import Count, NotNegative, OneOrMore, Positive, Section
from comp.engine.config.resolve import nearest
from comp.engine.ensemble import member_filter
from comp.engine.errors import UserError, joined
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
# The methods that use a key. With any other method the key would have no effect, which is an error.
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
    members: (
        OneOrMore  # runs, exp001:seed1, ensembles, exp003:snapshots, exp003:seeds, or a filter like score>0.9
    )
    method: Method
    space: Literal["probability", "logit", "geometric", "rank"] | None = None  # where they are averaged
    weights: Annotated[list[NotNegative], Field(min_length=1)] | None = None  # one per member, in their order
    power: Positive | None = None  # 2.0; above 1 confident members count more
    trim: Annotated[float, Field(ge=0, lt=0.5)] | None = None  # 0.2; share of members dropped at each end
    rounds: Count | None = None  # 50; members picked, with replacement
    precision: Positive | None = None  # 0.05; grid of the weights that are tried
    trials: Count | None = None  # 200
    negative: bool | None = None  # false; weights below 0
    bags: Count | None = None  # 1; searches whose weights are averaged
    # members: half of them per bag; rows: a bootstrap sample per bag; folds: one bag without each fold
    bag_of: Literal["members", "rows", "folds"] | None = None
    per_class: bool | None = None  # false; separate weights for each class
    max_seconds: Positive | None = None  # no limit; of inference, by the latencies measured in prediction
    images: Count | None = None  # to predict in max_seconds; default: the rows of the test table
    strength: Positive | None = (
        None  # of the penalty; default: chosen by cross-validation within the training rows
    )
    metadata: OneOrMore | None = None  # columns of competition.metadata as inputs of a stacker
    encoded: OneOrMore | None = None  # such columns as target encoding, fitted on the other folds
    # tried in this order; each is used only if it improves the nested score
    after: Annotated[list[After], Field(min_length=1)] | None = None
    correct: Literal["prior", "rank"] | None = None  # of test predictions, if test differs from train

    @model_validator(mode="after")
    def _consistent(self) -> Blend:
        for key, methods in METHODS_OF_KEY.items():
            if getattr(self, key) is not None and self.method not in methods:
                if key == "weights":
                    raise ValueError(
                        f"weights: method {self.method} uses equal weights; use method: weighted, or "
                        "delete weights"
                        if self.method in AVERAGES
                        else f"weights: method {self.method} fits its own; delete weights"
                    )
                raise ValueError(
                    f"{key}: no effect with method {self.method}, only with {', '.join(methods)}"
                )
        if self.bag_of == "folds" and self.bags is not None:
            raise ValueError("bags: no effect with bag_of: folds, which has one bag per fold; delete bags")
        if self.bag_of in ("members", "rows") and (self.bags or 1) == 1:
            raise ValueError("bag_of: no effect without bags above 1")
        if self.images is not None and self.max_seconds is None:
            raise ValueError("images: no effect without max_seconds")
        if self.space == "rank" and self.method not in SEARCHED and self.method != "rank":
            raise ValueError(
                f"space: rank is for {', '.join(SEARCHED)}; the plain mean of ranks is method: rank"
            )
        if self.space == "rank" and self.negative:
            raise ValueError(
                "negative: weights below 0 are undefined in space: rank; use probability or logit"
            )
        if self.method in STACKED and self.space not in (None, "logit", "probability"):
            raise ValueError(f"space: {self.space} is not an input of a stacker; use logit or probability")
        if self.weights is None:
            if self.method == "weighted":
                raise ValueError(
                    f"method: weighted needs weights: a list of {len(self.members)} numbers, one per member"
                )
            return self
        if len(self.weights) != len(self.members):
            raise ValueError(
                f"weights: {len(self.weights)} numbers for {len(self.members)} members, expected one each"
            )
        if not sum(self.weights) > 0:
            raise ValueError("weights: all are 0")
        return self

    @property
    def normalized_weights(self) -> list[float]:
        """The given weights, scaled to sum to 1. Of snapshots, later cycles have higher weights: 1, 2, 3,
        …"""
        if self.method == "snapshots":
            weights = [float(i + 1) for i in range(len(self.members))]
        else:
            weights = self.weights or [1.0] * len(self.members)
        return [weight / sum(weights) for weight in weights]

    @property
    def merge_space(self) -> str:
        """The space in which members are averaged, or in which a stacker reads them."""
        default = "logit" if self.method in STACKED else "probability"
        return {"rank": "rank", "geometric": "geometric"}.get(self.method, self.space or default)


@dataclass(frozen=True)
class BlendConfig:
    """configs/ensembles/<name>.yaml with its line numbers."""

    name: str
    blend: Blend
    lines: Mapping[str, str]  # dotted key -> file:line

    @property
    def hash(self) -> str:
        """Of the values, not of the text of the file."""
        return artifacts.digest(self.blend.model_dump())

    def where(self, key: str) -> str:
        """file:line of a dotted key."""
        return self.lines.get(key, f"configs/ensembles/{self.name}.yaml")

    def member_error(self, i: int, code: str, what: str, remedy: str = "") -> UserError:
        """An error about the member at place i of the list."""
        return UserError(code, where=self.where(f"members.{i}"), key="members", what=what, remedy=remedy)


def read(name: str) -> BlendConfig:
    folder = paths.path("configs", "ensembles")
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        near = f"the nearest are {', '.join(nearest(name, known, 3))}" if known else "the folder is empty"
        raise UserError("ensemble-unknown", where=paths.relative(file), what="no such file", remedy=near)
    tree, lines = resolve.parse(file, paths.relative(file))
    config = BlendConfig(name, resolve.validate(Blend, tree, lines, paths.relative(file)), lines)
    blend = config.blend.model_copy(update={"members": _expand(config)})
    config = BlendConfig(name, blend, lines)
    if errors := _member_errors(config):
        raise joined(errors)
    return config


def _expand(config: BlendConfig) -> list[str]:
    """The member addresses, with filters like score>0.9 or exp003:seeds replaced by what matches now."""
    members: list[str] = []
    for i, entry in enumerate(config.blend.members):
        if not member_filter.is_filter(entry):
            members.append(entry)
            continue
        try:
            matches = member_filter.addresses(entry)
        except UserError as error:
            raise joined(
                [config.member_error(i, e.code, f"{e.where}: {e.what}", e.remedy) for e in error.errors]
            ) from None
        members += [address for address in matches if address not in members]
        if config.blend.weights is not None:
            raise config.member_error(
                i,
                "weights-with-filter",
                f"{entry} matches several members, so weights cannot be listed",
                "delete weights",
            )
    return members


def _member_errors(config: BlendConfig) -> list[UserError]:
    members, errors = config.blend.members, []
    for i, member in enumerate(members):
        if member in members[:i]:
            errors.append(
                config.member_error(
                    i, "member-twice", f"{member} is listed twice", "give it a weight instead"
                )
            )
        if member.partition(":")[0] == config.name:
            errors.append(config.member_error(i, "member-recursive", f"{member} is this ensemble itself"))
    if paths.run_folder(config.name).is_dir():
        errors.append(
            UserError(
                "name-taken",
                where=config.where(""),
                what=f"there is a run named {config.name} already",
                remedy="rename this file",
            )
        )
    return errors


def warnings(config: BlendConfig) -> list[str]:
    """One line for each key without effect."""
    blend = config.blend
    if blend.space is None or blend.space == blend.merge_space:
        return []
    what = f"{blend.space} has no effect: method {blend.method} averages in {blend.merge_space}"
    return [f"{config.where('space')}: space: {what}"]
