"""Any command about ensembles, killed at random events and typed again, leaves the bytes of one that was never killed."""

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

from comp import jobs, store
from comp import pictures as pictures_
from comp.ensemble import augmented, compare, drawings
from comp.ensemble.blend import FILES, blend
from comp.predict import tta

# Of one run of a command and the next these differ: clocks, measured latencies, what a dead process left half-written.
ABOUT_TIME = ("log.jsonl", "birth.json", "speed.json", "code.diff", ".lock", ".guard", ".part")


def bytes_of(*folders: Path) -> dict[str, Any]:
    files = (file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file): _content(file) for file in files if not file.name.endswith(ABOUT_TIME)}


def _content(file: Path) -> Any:
    if file.name != store.MANIFEST or not file.parent.name.startswith("fold"):
        return file.read_bytes()
    said = store.read_json(file)  # of a fold: where its log ends, and a line of a log holds a clock
    return {
        name: {key: value for key, value in entry.items() if key != "log"} for name, entry in said.items()
    }


def dice() -> random.Random:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # what pytest shows of a test that failed
    return random.Random(seed)


def test_killed_anywhere_an_ensemble_ends_in_the_same_bytes(empty: Path) -> None:
    project = three(lay_out(empty, "binary", metric="log_loss"))
    text = "method: greedy\nafter: [temperature]"
    made(project, text)
    folder = store.ensemble_folder("blend001")
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
    """Every kind of method, over what the one before left behind; and two levels."""
    project: Project = three(lay_out(empty, "binary", metric="log_loss"))
    declare(project, "below", "members: [exp001, exp002]\nmethod: logistic")
    blend("below")
    chance, folder = dice(), store.ensemble_folder("blend001")
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
            sealed = [name for name in FILES if store.sealed(folder / name)]
            old = bytes_of(folder)
            assert all(
                old[str(folder / n)] in (whole[str(folder / n)], before.get(str(folder / n))) for n in sealed
            )
            made(project, text, members)
            assert bytes_of(folder) == whole, (text, event)


def in_a_row(work: Callable[[], Any], count: int, kills: int, chance: random.Random) -> int:
    """Killed again and again, each time at an event that the work has not yet come to, then let through."""
    died = sum(killed(work, chance.randrange(max(2, 2 * count // kills))) for _ in range(kills))
    work_done = killed(work, 10**9)
    assert not work_done
    return died


@pytest.mark.slow
def test_pictures_seeds_recipes_and_views_killed_at_random_moments(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.gather(config())  # torch and all that stands on it, so that no child has to import it
    pictures_.figure_of(2, 2)
    monkeypatch.setattr(tta, "VIEWS", {name: tta.VIEWS[name] for name in ("identity", "hflip")})
    few(project)
    (project / "configs" / "tiny.yaml").write_text(TINY)
    (project / "configs" / "slow.yaml").write_text("base: tiny\noptim: {rate: 1e-3}\n")
    for name, method in (("blend001", "greedy"),):
        (project / "configs" / "ensembles" / f"{name}.yaml").write_text(
            f"members: [tiny-seeds, slow-seeds, 'tiny-seeds:seed1']\nmethod: {method}\n"
        )

    def pictures() -> None:
        blend("blend001")
        drawings.draw("blend001")

    commands: dict[str, Callable[[], Any]] = {
        "noise": lambda: compare.noise("tiny", 2),
        "compare": lambda: compare.compare(["tiny", "slow"], 2),
        "tta": lambda: augmented.tta("slow-seeds"),
        "ensemble --pictures": pictures,
    }
    counts = {name: events(work, tmp_path / "count") for name, work in commands.items()}
    whole = bytes_of(project / "runs", project / "ensembles")
    for name in ("runs", "ensembles"):
        shutil.rmtree(project / name, ignore_errors=True)
    chance, died = dice(), 0
    for name, work in commands.items():
        died += in_a_row(work, counts[name], 5, chance)
    assert bytes_of(project / "runs", project / "ensembles") == whole
    assert died >= 12, died
