"""Sets of weights and members of a run, as functions of its config alone.

runs/exp003/seed0/fold1/weights.safetensors          the run's own weights (average.predict_with)
runs/exp003/seed0/fold1/snap2/weights.safetensors    extra weights, which make the member exp003:snap2
runs/exp003/seed0/foldfull/                          the refit on all rows: exp003:full, exp003:full-snap2
"""

from __future__ import annotations

from comp.engine.config.schema import Config

REFIT = "full"  # name of the fold that trains on all rows, and of the member that it makes
DEBUG, SEEDS = "-debug", "-seeds"  # ends of the names of runs by --debug, and by comp seed-noise and compare


def final_weights(cfg: Config) -> str:
    """The weights that make the run's predictions: raw | ema | swa | tail | uniform | greedy."""
    if cfg.average.predict_with != "default":
        return cfg.average.predict_with
    return "raw" if cfg.train.ema_decay is None else "ema"


def snapshots(cfg: Config) -> list[str]:
    return [f"snap{i + 1}" for i in range(cfg.snapshots.cycles or 0)]


def extra_weights(cfg: Config) -> list[str]:
    """Subfolders of a fold's folder, each with weights and predictions of its own."""
    return [*snapshots(cfg), *cfg.average.members]


def extra_members(cfg: Config) -> dict[str, list[str]]:
    """The further members of a finished run -> the extra weights whose predictions each one averages."""
    members = {name: [name] for name in extra_weights(cfg)}
    if snaps := snapshots(cfg):
        last = snaps[-cfg.snapshots.last :]
        members[f"last{len(last)}"] = last
    return members


def is_auxiliary(run: str) -> bool:
    """Whether a run exists for a test or a comparison, and is not meant to be submitted."""
    return run.endswith((DEBUG, SEEDS))


def refit_member(member: str = "") -> str:
    """The name of a member in the refit: full for the run itself, full-snap2 for snap2."""
    return f"{REFIT}-{member}" if member else REFIT


def is_refit(member: str) -> bool:
    return member == REFIT or member.startswith(f"{REFIT}-")


def cv_member(member: str) -> str:
    """The cross-validated member that corresponds to a member of the refit: snap2 to full-snap2, "" (the
    run itself) to full."""
    return member.removeprefix(REFIT).removeprefix("-") if is_refit(member) else member


def cv_address(address: str) -> str:
    """The address whose OOF predictions are used: exp003 for exp003:full, exp003:snap2 for
    exp003:full-snap2."""
    run, _, member = address.partition(":")
    return f"{run}:{cv_member(member)}" if cv_member(member) else run


def selects_by_score(cfg: Config) -> bool:
    """Whether an epoch or weights are selected by their score, which needs rows to compute it on."""
    return cfg.select.name == "best" or "greedy" in (final_weights(cfg), *cfg.average.members)


def selected_by_score(cfg: Config, name: str = "") -> bool:
    """Whether this set of weights was selected by its score. `name`: "" for the run's own weights."""
    return name == "greedy" or (name == "" and (cfg.select.name == "best" or final_weights(cfg) == "greedy"))


def marks(cfg: Config, name: str = "") -> list[str]:
    """Marks for the metadata of predictions. selected_on_fold: the weights were selected on the validation
    rows of the fold, so the OOF score is optimistic."""
    return ["selected_on_fold"] if cfg.select.on == "fold" and selected_by_score(cfg, name) else []
