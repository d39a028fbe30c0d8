"""Which weights a run keeps and which members it has, as a function of its config alone.

runs/exp003/seed0/fold1/weights.safetensors          what speaks for the run, fixed beforehand
runs/exp003/seed0/fold1/snap2/weights.safetensors    kept beside it: a member of its own, exp003:snap2
runs/exp003/seed0/foldfull/                          the same of the refit on all rows: exp003:full, exp003:full-snap2
"""

from __future__ import annotations

from comp.engine.config.schema import Config

REFIT = "full"  # name of the fold that trains on all rows, and of the member that it is


def final_weights(cfg: Config) -> str:
    """raw | ema | swa | tail | uniform | greedy"""
    if cfg.average.predict_with != "default":
        return cfg.average.predict_with
    return "raw" if cfg.train.ema_decay is None else "ema"


def snapshots(cfg: Config) -> list[str]:
    return [f"snap{i + 1}" for i in range(cfg.snapshots.cycles or 0)]


def extra_weights(cfg: Config) -> list[str]:
    """Folders within a fold's, each with weights and predictions of its own."""
    return [*snapshots(cfg), *cfg.average.members]


def extra_members(cfg: Config) -> dict[str, list[str]]:
    """Every member of a finished run beside itself -> the kept weights whose predictions it is the mean of."""
    found = {name: [name] for name in extra_weights(cfg)}
    if snaps := snapshots(cfg):
        last = snaps[-cfg.snapshots.last :]
        found[f"last{len(last)}"] = last
    return found


def refit_member(member: str = "") -> str:
    """The name of a member where the refit makes it: full, and full-snap2 of snap2."""
    return f"{REFIT}-{member}" if member else REFIT


def is_refit(member: str) -> bool:
    return member == REFIT or member.startswith(f"{REFIT}-")


def cv_member(member: str) -> str:
    """The member of the CV that is made as this one of the refit is: snap2 of full-snap2, the run itself of full."""
    return member.removeprefix(REFIT).removeprefix("-") if is_refit(member) else member


def cv_address(address: str) -> str:
    """Whose OOF predictions stand for this address: those of exp003 for exp003:full, of exp003:snap2 for exp003:full-snap2."""
    run, _, member = address.partition(":")
    return f"{run}:{cv_member(member)}" if cv_member(member) else run


def selects_by_score(cfg: Config) -> bool:
    """Whether anything is picked by its score, so that rows are needed to pick on."""
    return cfg.select.name == "best" or "greedy" in (final_weights(cfg), *cfg.average.members)


def selected_by_score(cfg: Config, name: str = "") -> bool:
    """Whether these weights were picked by their score; the run's own have no name."""
    return name == "greedy" or (name == "" and (cfg.select.name == "best" or final_weights(cfg) == "greedy"))


def marks(cfg: Config, name: str = "") -> list[str]:
    return ["selected_on_fold"] if cfg.select.on == "fold" and selected_by_score(cfg, name) else []
