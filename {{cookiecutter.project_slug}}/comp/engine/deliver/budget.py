"""comp kernel NAME --budget 9h: drop members and TTA views, the one that loses least score for the seconds it
saves first, until the rest fits. Scores are those on the OOF rows, seconds are measured by a rehearsal on
this machine."""

from __future__ import annotations

from comp.engine import hardware
from comp.engine.config import resolve, yaml_lines
from comp.engine.data import folds, samples
from comp.engine.deliver import blend_cost, rehearse
from comp.engine.deliver.blend_cost import Blend
from comp.engine.ensemble import blend as ensembles
from comp.engine.ensemble import blend_config
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths


def fit(name: str, text: str) -> str:
    """The name of what fits: NAME itself, a member with fewer views, or a new ensemble NAME-<budget>."""
    limit = hardware.parse_duration("--budget", text)
    cfg = resolve.load(paths.root(), "base").config
    rehearsal = rehearse.last_report(name)
    start_seconds = rehearsal["start_seconds"]
    table = samples.load()
    split = folds.load(table)
    is_ensemble = (paths.ensemble_folder(name) / "apply.json").exists()
    declared = blend_config.read(name) if is_ensemble else None
    first = (
        Blend(tuple(declared.blend.members), tuple(declared.blend.normalized_weights))
        if declared
        else Blend((name,), (1.0,))
    )
    space = declared.blend.merge_space if declared else "probability"

    def score(blend: Blend) -> float:
        return blend_cost.oof_score(blend, space, cfg, table, split)

    blend = first
    while (total := start_seconds + blend_cost.seconds(blend, rehearsal)) > limit:
        now, options = score(blend), []
        for other, change in blend_cost.cheaper(blend):
            saved = blend_cost.seconds(blend, rehearsal) - blend_cost.seconds(other, rehearsal)
            if saved > 0:
                lost = now - score(other)
                options.append((lost / saved, change, other, lost, saved))
        if not options:
            raise UserError(
                "budget-too-small",
                where=f"--budget {text}",
                what=f"{name} takes {total / 3600:.2f} h even with one member and its fewest views",
            )
        _, change, blend, lost, saved = min(options, key=lambda option: option[0])
        print(f"{change}: {-lost:+.5f} for {saved / 3600:.2f} h")
    print(f"{name}: {total / 3600:.2f} h of {text}, on this machine")
    if blend == first:
        return name
    if declared is None:
        return blend.members[0]
    return _write(name, text, blend, declared.blend)


def _write(name: str, text: str, blend: Blend, declared: blend_config.Blend) -> str:
    """configs/ensembles/NAME-<budget>.yaml, and the ensemble that it declares."""
    new = f"{name}-{text}"
    tree = {key: value for key, value in declared.model_dump().items() if value is not None}
    tree["members"] = list(blend.members)
    if "weights" in tree:
        tree["weights"] = [round(weight, 6) for weight in blend.weights]
    file = paths.path("configs", "ensembles", f"{new}.yaml")
    header = (
        f"# {name} without what does not fit into {text}: written by comp kernel {name} --budget {text}\n"
    )
    artifacts.write_text(file, header + yaml_lines.dump(tree))
    print(f"written: {paths.relative(file)}")
    ensembles.blend(new)
    return new
