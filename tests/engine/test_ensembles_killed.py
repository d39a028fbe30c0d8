"""Ensemble commands, killed at random events and restarted, write the same bytes as without a kill."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from banked import Project, declare, lay_out, made, three
from conftest import config
from killed import events, killed
from test_compare import TINY, few

from comp.engine.ensemble import plots
from comp.engine.ensemble.blend import FILES, blend
from comp.engine.extras import compare, seed_noise, tta_search
from comp.engine.report import plots as plots_
from comp.engine.run import loading, views
from comp.engine.store import artifacts, paths

# These differ between two runs of a command: times, measured latencies, temporary files after a kill.
OF_RUNS = ("oof.arrow", "test.arrow", "weights.safetensors", "score.json")
ABOUT_TIME = ("log.jsonl", "started.json", "speed.json", "code.diff", ".lock", ".guard", ".part")


def bytes_of(*folders: Path) -> dict[str, bytes]:
    files = (file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file): file.read_bytes() for file in files if not file.name.endswith(ABOUT_TIME)}


def artefacts(project: Path) -> dict[str, bytes]:
    """The files of runs that other commands read. Checkpoints and manifests are left out: they record the
    length of a log with times."""
    found = bytes_of(project / "runs", project / "ensembles")
    return {
        name: content for name, content in found.items() if Path(name).name in OF_RUNS or "seed" not in name
    }


def dice() -> random.Random:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # what pytest shows of a test that failed
    return random.Random(seed)


def test_killed_anywhere_an_ensemble_ends_in_the_same_bytes(empty: Path) -> None:
    project = three(lay_out(empty, "binary", metric="log_loss"))
    text = "method: greedy\nafter: [temperature]"
    made(project, text)
    folder = paths.ensemble_folder("blend001")
    whole, chance = bytes_of(folder), dice()
    shutil.rmtree(folder)
    count = events(lambda: made(project, text), empty / "count")
    assert count > 20 and bytes_of(folder) == whole
    for event in chance.sample(range(count), 2):
        shutil.rmtree(folder)
        assert killed(lambda: made(project, text), event)
        made(project, text)
        assert bytes_of(folder) == whole, event


@pytest.mark.slow
def test_an_ensemble_killed_at_twenty_random_moments(empty: Path) -> None:
    """Every kind of method, each over the files of the previous one; and two levels."""
    project: Project = three(lay_out(empty, "binary", metric="log_loss"))
    declare(project, "below", "members: [exp001, exp002]\nmethod: logistic")
    blend("below")
    chance, folder = dice(), paths.ensemble_folder("blend001")
    for text, members in {
        "method: greedy\nbags: 3": "[exp001, exp002, exp003]",
        "method: logistic\nafter: [platt]": "[exp001, exp002, exp003]",
        "method: slsqp\ncorrect: rank": "[exp001, exp002, exp003]",
        "method: optuna\ntrials: 10": "[exp001, exp002, exp003]",
        "method: ridge": "[below, exp003]",
    }.items():
        before = bytes_of(folder)
        count = events(lambda t=text, m=members: made(project, t, m), empty / "count")  # type: ignore[misc]
        whole = bytes_of(folder)
        for event in chance.sample(range(count), 4):
            shutil.rmtree(folder)
            for name, content in before.items():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_bytes(content)
            assert killed(lambda t=text, m=members: made(project, t, m), event)  # type: ignore[misc]
            sealed = [name for name in FILES if artifacts.manifest_entry(folder / name)]
            old = bytes_of(folder)
            assert all(
                old[str(folder / n)] in (whole[str(folder / n)], before.get(str(folder / n))) for n in sealed
            )
            made(project, text, members)
            assert bytes_of(folder) == whole, (text, event)


def in_a_row(work: Callable[[], Any], count: int, kills: int, chance: random.Random) -> int:
    """Killed several times, each time at a later event, then run to the end."""
    died = sum(killed(work, chance.randrange(max(2, 2 * count // kills))) for _ in range(kills))
    work_done = killed(work, 10**9)
    assert not work_done
    return died


@pytest.mark.slow
def test_plots_seeds_recipes_and_views_killed_at_random_moments(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.load_context(config())  # torch and all that stands on it, so that no child has to import it
    plots_.new_figure(2, 2)
    monkeypatch.setattr(views, "VIEWS", {name: views.VIEWS[name] for name in ("identity", "hflip")})
    few(project)
    (project / "configs" / "tiny.yaml").write_text(TINY)
    (project / "configs" / "slow.yaml").write_text("base: tiny\noptim: {lr: 1e-3}\n")
    base = project / "configs" / "base.yaml"
    base.write_text(base.read_text().replace("mode: offline ", "mode: none "))
    (project / "configs" / "ensembles" / "blend001.yaml").write_text(
        "members: [tiny-seeds, slow-seeds, 'tiny-seeds:seed1']\nmethod: greedy\n"
    )

    def images() -> None:
        blend("blend001")
        plots.draw("blend001")

    commands: dict[str, Callable[[], Any]] = {
        "noise": lambda: seed_noise.seed_noise("tiny", 2),
        "compare": lambda: compare.compare(["tiny", "slow"], 2),
        "tta": lambda: tta_search.tta("slow-seeds"),
        "ensemble --plots": images,
    }
    counts = {name: events(work, tmp_path / "count") for name, work in commands.items()}
    whole = artefacts(project)
    for name in ("runs", "ensembles"):
        shutil.rmtree(project / name, ignore_errors=True)
    chance, died = dice(), 0
    for name, work in commands.items():
        died += in_a_row(work, counts[name], 5, chance)
    now = artefacts(project)
    assert sorted(now.keys() ^ whole.keys()) == []
    assert [name for name in now if now[name] != whole[name]] == []
    assert died >= 12, died
