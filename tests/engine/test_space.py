"""Space files: every mistake is one line with file and line, exit code 2, before torch is imported; shipped
spaces are valid."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, config

from comp.engine import cli
from comp.engine.errors import UserError
from comp.engine.tune import space, study_config

RATE = "  optim.lr: {low: 1e-4, high: 1e-2, log: true}\n"
MISTAKES = {
    # text of the file: what the error must contain
    "search:\n  optim.rat: {low: 1e-4, high: 1e-2}\n": "odd.yaml:2: optim.rat: no such knob; did you mean optim.lr?",
    "search:\n  optim: {low: 1e-4, high: 1e-2}\n": "odd.yaml:2: optim: is a section; name one of its knobs: optim.name",
    "search:\n  competition.metric: [accuracy, log_loss]\n": "competition.metric: changes what is scored",
    "search:\n  machine.num_workers: [1, 2]\n": "machine.num_workers: cannot be searched, it changes no result",
    "search:\n  train.seeds: [[0], [1]]\n": "train.seeds: cannot be searched",
    "search:\n  train.threads: {low: 1, high: 4}\n": "train.threads: cannot be searched, it changes only rounding errors",
    "search:\n  optim.lr: 3e-4\n": "optim.lr: 0.0003 must be {low: …, high: …} or a list of choices",
    "search:\n  optim.lr: {lo: 1e-4, high: 1e-2}\n": "odd.yaml:2: optim.lr: lo: no such key; did you mean low?",
    "search:\n  optim.lr: {log: true}\n": "optim.lr: needs either low and high, or choices",
    "search:\n  optim.lr: {low: 1e-4, high: 1, choices: [1, 2]}\n": "optim.lr: needs either low and high, or choices",
    "search:\n  optim.lr: {low: 1e-4}\n": "optim.lr: high is missing",
    "search:\n  optim.lr: {low: 1e-2, high: 1e-4}\n": "optim.lr: low 0.01 must be below high 0.0001",
    "search:\n  optim.lr: {low: small, high: 1e-4}\n": "optim.lr: low: 'small' must be a number",
    "search:\n  optim.lr: {low: 1e-4, high: .inf}\n": "optim.lr: high: inf must be a number",
    "search:\n  optim.lr: {low: 0, high: 1e-2, log: true}\n": "optim.lr: low must be above 0 for a log range, not 0",
    "search:\n  optim.lr: {low: 1e-4, high: 1e-2, log: yes}\n": "optim.lr: log: 'yes' must be true or false",
    "search:\n  optim.lr: {low: 1e-4, high: 1e-2, log: true, step: 1e-3}\n": "optim.lr: log and step cannot be combined",
    "search:\n  model.drop_rate: {low: 0, high: 0.5, step: 0.7}\n": "model.drop_rate: step: 0.7 must be above 0 and at most 0.5",
    "search:\n  train.epochs: {low: 4, high: 8.5}\n": "train.epochs: high: 8.5 must be an integer",
    "search:\n  model.name: {low: 1, high: 2}\n": "model.name: is not a number; give a list of choices",
    "search:\n  model.name: [resnet18]\n": "model.name: choices: ['resnet18'] must be a list of two or more",
    "search:\n  model.name: [resnet18, resnet18]\n": "model.name: choices: 'resnet18' is there twice",
    "search:\n  model.name: {choices: [a, b], log: true}\n": "model.name: log is for ranges",
    "search:\n  optim.clip_mode: [norm, vlaue]\n": "optim.clip_mode: must be 'norm', 'value' or 'agc', not 'vlaue'; did you mean value?",
    "search:\n  model.drop_rate: {low: 0, high: 1.5}\n": "odd.yaml:2: model.drop_rate: must be below 1, not 1.5",
    "search:\n  schedule.warmup: {low: 0, high: 99}\n": "schedule.warmup: 99.0 epochs are shortened to half of train.epochs",
    f"search:\n{RATE}  optim.clip_grad: {{low: 1, high: 2, when: {{optim.nam: sgd}}}}\n": "optim.clip_grad: when: optim.nam is not searched",
    f"search:\n{RATE}  optim.clip_grad: {{low: 1, high: 2, when: {{optim.lr: 1}}}}\n": "optim.clip_grad: when: optim.lr is a range",
    "search:\n  optim.name: [adamw, sgd]\n  optim.clip_grad: {low: 1, high: 2, when: {optim.name: sg}}\n": "'sg' is not a choice of optim.name; did you mean sgd?",
    "search:\n  optim.name: {choices: [adamw, sgd], when: {optim.name: sgd}}\n": "optim.name: when: names the knob itself",
    "search:\n  optim.name: {choices: [adamw, sgd], when: {train.amp: fp32}}\n"
    "  train.amp: {choices: [fp32, bf16], when: {optim.name: sgd}}\n": "when: the conditions form a cycle",
    f"search:\n{RATE}sampler: tpee\n": "odd.yaml:3: sampler: 'tpee' is none of tpe, gp, cmaes, qmc, random, grid; did you mean tpe?",
    f"search:\n{RATE}pruner: mediann\n": "pruner: 'mediann' is none of median",
    f"search:\n{RATE}objectives: [speed]\n": "objectives: ['speed'] must be [score] or [score, time]",
    f"search:\n{RATE}objectives: [score, time]\n": "pruner: median supports one objective only; set pruner: none",
    f"search:\n{RATE}sampler: grid\n": "sampler: grid needs a step or choices for optim.lr",
    "search:\n  model.name: [a, b]\nsampler: cmaes\n": "sampler: cmaes does not support choices, like those of model.name",
    f"search:\n{RATE}folds: 9\n": "folds: 9 must be an integer from 1 to 5",
    f"search:\n{RATE}trials: many\n": "trials: 'many' must be an integer",
    f"search:\n{RATE}serch: 1\n": "odd.yaml:3: serch: no such key; did you mean search?",
    "search: {}\n": "odd.yaml:1: search: no knobs; add lines like",
    f"search:\n{RATE}{RATE}": "search.optim.lr is set for the second time, first on line 2",
    "search:\n  optim.lr: {low: 1e-4, high: 1e-2\n": "odd.yaml:3: is not YAML",
    "- optim.lr\n": "must consist of `key: value` lines, not a list",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(empty: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (empty / "configs" / "tune").mkdir()
    (empty / "configs" / "tune" / "odd.yaml").write_text(text)
    assert cli.main(["tune", "exp001", "--space", "odd"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert MISTAKES[text] in lines[0] and lines[0].startswith("configs/tune/odd.yaml:")
    assert not (empty / "studies").exists()


def test_all_mistakes_are_reported_at_once(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(MISTAKES) >= 30
    (empty / "configs" / "tune").mkdir()
    (empty / "configs" / "tune" / "odd.yaml").write_text(
        "search:\n  optim.rat: [1, 2]\n  machine.num_workers: [1, 2]\nsampler: x\n"
    )
    assert cli.main(["tune", "exp001", "--space", "odd"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_torch_is_not_imported_for_any_mistake(empty: Path) -> None:
    """All of them in one process, which prints at the end what it imported."""
    (empty / "configs" / "tune").mkdir()
    for number, text in enumerate(MISTAKES):
        (empty / "configs" / "tune" / f"odd{number}.yaml").write_text(text)
    code = (
        "import sys; from comp.engine import cli; "
        f"ends = [cli.main(['tune', 'exp001', '--space', f'odd{{n}}']) for n in range({len(MISTAKES)})]; "
        "sys.exit(2 if set(ends) == {2} and 'torch' not in sys.modules else f'{ends} {sorted(sys.modules)}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == len(MISTAKES), done.stderr[-2000:]
    assert all(
        expected in line
        for expected, line in zip(
            MISTAKES.values(), (re.sub(r"odd\d+", "odd", x) for x in lines), strict=True
        )
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--export", "exp014", "--hours", "1"], "--hours: has no effect with --export"),
        (["--confirm", "3", "--on", "local"], "--on: has no effect with --confirm"),
        (["--trial", "7"], "--trial: has no effect without --export NAME"),
        (["--hours", "1", "--until", "07:30"], "--hours: cannot be combined with --until"),
        (["--until", "half past seven"], "--until half past seven: not a time of day; write it like 07:30"),
    ],
)
def test_conflicting_options(
    empty: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], answer: str
) -> None:
    assert cli.main(["tune", "exp001", *arguments]) == 2
    assert answer in capsys.readouterr().err


def test_an_unknown_space_suggests_the_nearest(empty: Path) -> None:
    (empty / "configs" / "tune").mkdir()
    (empty / "configs" / "tune" / "quick.yaml").write_text(f"search:\n{RATE}")
    with pytest.raises(
        UserError, match=r"--space quik: there is no configs/tune/quik.yaml; did you mean quick\?"
    ):
        study_config.read("quik", config(), "exp001")


@pytest.mark.parametrize("name", sorted(file.stem for file in (HERE / "configs" / "tune").glob("*.yaml")))
def test_every_space_that_ships_loads(empty: Path, name: str) -> None:
    shutil.copytree(HERE / "configs" / "tune", empty / "configs" / "tune")
    loaded = study_config.read(name, config(), "exp001")
    rng = random.Random(0)
    for _ in range(20):
        setting = loaded.sample(rng)
        assert loaded.restrict(setting) == setting
        space.with_setting(config(), setting)


def test_knobs_are_sorted_by_their_conditions(empty: Path) -> None:
    (empty / "configs" / "tune").mkdir()
    (empty / "configs" / "tune" / "s.yaml").write_text(
        "search:\n  optim.momentum: {low: 0.5, high: 0.9, when: {optim.name: sgd}}\n"
        "  optim.name: [adamw, sgd]\n"
    )
    loaded = study_config.read("s", config(), "exp001")
    assert [knob.key for knob in loaded.knobs] == ["optim.name", "optim.momentum"]
    drawn = [loaded.sample(random.Random(seed)) for seed in range(20)]
    assert {len(setting) for setting in drawn} == {1, 2}
    assert all(("optim.momentum" in setting) == (setting["optim.name"] == "sgd") for setting in drawn)
