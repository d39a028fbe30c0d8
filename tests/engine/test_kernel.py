"""A code competition: the bundle, its rehearsal, and its budget."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK
from forked import forked
from test_target_scaler import declare_values

from comp.engine import cli
from comp.engine.bank import bank, predictions
from comp.engine.config.resolve import load
from comp.engine.data import folds, samples
from comp.engine.data.samples import Samples
from comp.engine.deliver import (
    budget,
    bundle,
    kernel,
    kernel_inputs,
    kernel_models,
    recheck,
    rehearsal_inputs,
    rehearse,
    wheels,
)
from comp.engine.ensemble import latency
from comp.engine.ensemble.blend import blend
from comp.engine.errors import UserError
from comp.engine.extras import features
from comp.engine.run import frozen_heads, runner
from comp.engine.store import artifacts, paths

STACK = "members: [exp001, 'exp001:tta-identity-hflip']\nmethod: logistic\nmetadata: [pen]\n"


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal_inputs, "ROWS", 40)


# --- bundle -------------------------------------------------------------------------------------------------


def test_the_bundle_is_complete_and_reproducible(trained: Path) -> None:
    made = kernel.build("blend001")
    bundle = made / "bundle"
    listed = artifacts.read_json(bundle / "manifest.json")
    there = {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()} - {
        "manifest.json"
    }
    assert there == set(listed) and "comp/engine/deliver/kernel_predict.py" in there
    assert all(entry["sha256"] == artifacts.sha256(bundle / name) for name, entry in listed.items())
    assert [name for name in there if name.endswith(".whl")] == [
        f"wheels/timm-{wheels.metadata.version('timm')}-py3-none-any.whl"
    ]
    assert sum(name.endswith("weights.safetensors") for name in there) == 5
    before = kernel.bundle_hash(made)
    assert kernel.bundle_hash(kernel.build("blend001")) == before
    facts = artifacts.read_json(made / "notebook" / "kernel-metadata.json")
    assert facts["enable_internet"] is False and facts["competition_sources"] == ["practice"]
    notebook = artifacts.read_json(made / "notebook" / facts["code_file"])
    assert (
        "'-m', 'comp', 'predict', '--kernel'"
        in notebook["cells"][1]["source"]
        == (made / "script.py").read_text()
    )


def test_a_snapshot_predicts_the_same_in_a_bundle(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of its own in each fold, and without the other files of the project."""
    monkeypatch.setattr(wheels, "of_imports", list)
    few = ["train.epochs=2", "snapshots.cycles=2", "train.max_samples=40"]
    runner.train("exp001", [*QUICK, *few], name="snaps")
    bundle = kernel.build("snaps:snap1") / "bundle"
    assert len(list(bundle.rglob("fold*/snap1/weights.safetensors"))) == 5
    assert len(list(bundle.rglob("weights.safetensors"))) == 5
    table = samples.load()
    stored = bank.load("snaps:snap1", "test", table, folds.load(table))
    cfg = load(paths.root(), "base").config
    home = cfg.competition.model_copy(update={"raw": str(trained / "data" / "raw")})
    (trained / "runs").rename(trained / "gone")
    monkeypatch.setenv("COMP_ROOT", str(bundle))
    paths.root.cache_clear()
    about = artifacts.read_json(bundle / "bundle.json")
    heads = tuple(kernel_inputs.head_of(each) for each in about["heads"])
    hidden = kernel_inputs.test_rows(
        cfg.model_copy(update={"competition": home}), heads, about["multi_image"]
    )
    rows = hidden.positions("test")[:30]
    predicted, damaged, _ = kernel_models.predict_runs(about, home, hidden, rows)
    assert not damaged and list(predicted) == ["snaps:snap1"]
    assert predicted["snaps:snap1"]["label"] == pytest.approx(stored.heads["label"][:30], abs=1e-4)


def test_damaged_weights_are_not_bundled(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = paths.fold_folder("exp001", 0, 2) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert cli.main(["kernel", "exp001"]) == 2
    assert "fold2/weights.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["package", "manifest", "half moved"])
def test_a_killed_build_is_built_again(trained: Path, where: str) -> None:
    whole = kernel.bundle_hash(kernel.build("exp001"))
    shutil.rmtree(kernel.folder("exp001"))

    def work() -> None:
        def die(*_: object, **__: object) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "half moved":
            original, count = os.replace, [0]

            def replace(old: Any, new: Any) -> None:
                count[0] += "notebook" in str(new) and ".making" not in str(new)
                original(old, new) if not count[0] else die()

            os.replace = replace  # type: ignore[assignment]
        else:
            setattr(bundle, {"package": "_link_artefacts", "manifest": "write_manifest"}[where], die)
        kernel.build("exp001")

    assert os.WIFSIGNALED(forked(work))
    assert kernel.bundle_hash(kernel.build("exp001")) == whole


# --- rehearsal ----------------------------------------------------------------------------------------------


def test_rehearsal_in_namespaces_reproduces_the_predictions(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a first rehearsal that was killed and left its folder."""

    def work() -> None:
        rehearse.subprocess.run = kill_at("predict", rehearse.subprocess.run)
        cli.main(["kernel", "blend001", "--rehearse"])

    before = {file: file.read_bytes() for file in (trained / "data" / "raw").rglob("*") if file.is_file()}
    assert os.WIFSIGNALED(forked(work))
    assert (kernel.folder("blend001") / ".rehearsal").exists()
    assert cli.main(["kernel", "blend001", "--rehearse"]) == 0
    assert not (kernel.folder("blend001") / ".rehearsal").exists()
    assert before == {file: file.read_bytes() for file in before}
    printed = capsys.readouterr().out
    facts = artifacts.read_json(rehearse.file_of("blend001"))
    assert (
        facts["max_difference"] <= 1e-5
        and facts["peak"] > 0
        and set(facts["seconds_per_image"]) == {"exp001", "exp001:tta-identity-hflip"}
    )
    assert (
        "2 images damaged" in printed
        and "hidden set of 41 rows" in printed
        and "next: comp kernel blend001 --push" in printed
    )
    assert facts["bundle"] == kernel.bundle_hash(kernel.folder("blend001"))
    assert "no network, /kaggle as on Kaggle" in printed or "weaker" in printed


def kill_at(word: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, until it is about to start a command that contains `word`."""

    def run(command: Any, *given: Any, **named: Any) -> Any:
        if word in command:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(command, *given, **named)

    return run


def test_images_in_archives_are_linked_and_not_copied(trained: Path, tmp_path: Path) -> None:
    """Rows of such a layout cannot be made up, so the rehearsal gets all of data/raw, which may be a hundred
    gigabytes."""
    raw = trained / "data" / "raw"
    with zipfile.ZipFile(raw / "test.zip", "w") as archive:
        for file in (raw / "test").iterdir():
            archive.write(file, f"test/{file.name}")
    shutil.rmtree(raw / "test")
    cfg = load(paths.root(), "base", ["competition.test.image=test.zip/test/{id}.png"]).config
    for linked, others in ((True, 2), (False, 1)):
        rehearsal_inputs.lay_out(cfg.competition, tmp_path / str(linked), hidden=False, linked=linked)
        laid_out = tmp_path / str(linked) / "test.zip"
        assert laid_out.stat().st_nlink == others and laid_out.read_bytes() == (raw / "test.zip").read_bytes()


IMAGE = Path(__file__).with_name("kaggle_image.txt")


def test_the_list_of_kaggles_versions_is_that_of_its_image() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", IMAGE.read_text(), re.MULTILINE))
    for name, version in wheels.IMAGE.items():
        assert (pins[name.lower()] + ".").startswith(f"{version}."), name
    assert "://" not in IMAGE.read_text() and IMAGE.read_text().count("--hash=") > len(pins)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Python with the versions of Kaggle's image: 3.12 where it can be had, else this one. uv links what it
    has already."""
    place = tmp_path_factory.mktemp("image") / "venv"
    uv = [str(Path(sys.executable).with_name("uv"))]
    if not Path(uv[0]).exists():
        uv = ["uv"]
    if subprocess.run([*uv, "venv", "-q", "--no-python-downloads", "--python", wheels.PYTHON, str(place)], check=False).returncode:  # fmt: skip
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(place)], check=True)
    python = place / "bin" / "python"
    subprocess.run(
        [*uv, "pip", "install", "-q", "--require-hashes", "--python", str(python), "-r", str(IMAGE)],
        check=True,
    )
    yield python
    shutil.rmtree(place)  # gigabytes


@pytest.mark.slow
def test_under_the_versions_of_kaggles_image(
    image: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its torch, timm, pandas and scikit-learn give the same predictions to 1e-5, of a stack too; then the
    verbs of data and training, in it alone."""
    (trained / "configs/ensembles/stack001.yaml").write_text(STACK)
    blend("stack001")
    kernel.build("stack001")
    facts = rehearse.rehearse("stack001", str(image))
    assert facts["max_difference"] <= 1e-5
    print(capsys.readouterr().out, facts)

    def comp(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(image), "-m", "comp", *arguments]
        return subprocess.run(command, cwd=trained, capture_output=True, text=True, check=False)

    shutil.rmtree(trained / "runs")
    for verb in (["prepare"], ["check"], ["folds"], ["train", "exp001", "--debug"]):
        done = comp(*verb)
        assert done.returncode == 0, done.stdout + done.stderr
    done = comp("runs")
    assert done.returncode == 0 and "exp001-debug" in done.stdout, done.stdout + done.stderr
    done = comp("studies")
    assert done.returncode == 2 and "pip install 'optuna>=5'" in done.stderr
    done = comp("ledger")  # the ledger is printed without Kaggle as well
    assert (
        "pip install 'kaggle==2.2.4'" in done.stdout + done.stderr and "nothing was sent yet" in done.stdout
    )


@pytest.mark.slow
def test_a_blend_with_heads_of_frozen_features_is_rehearsed(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logistic regression, MLP and k-NN: the bundle and the recheck reproduce the stored predictions."""
    (trained / "configs" / "exp003.yaml").write_text("base: exp001\ndata: {size: 16}\n")
    quiet = ["machine.num_workers=0", "machine.progress=false"]
    features.features("exp003", quiet, "logistic,mlp,knn")
    (trained / "configs" / "ensembles" / "blend002.yaml").write_text(
        "members: [exp001, exp003:logistic, exp003:mlp, exp003:knn]\nmethod: mean\n"
    )
    blend("blend002")
    kernel.build("blend002")
    facts = rehearse.rehearse("blend002")
    assert facts["max_difference"] <= 1e-5 and set(facts["seconds_per_image"]) >= {
        "exp003:logistic",
        "exp003:knn",
    }
    capsys.readouterr()
    recheck.recheck("blend002")
    assert "predicted 8 rows again" in capsys.readouterr().out
    assert latency.seconds_per_image("exp003:mlp") > 0
    # Heads that were fitted on another backbone's features are not believed.
    file = frozen_heads.backbone_of("exp003")
    artifacts.add_to_manifest(file, remade=True)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    artifacts.add_to_manifest(file)
    with pytest.raises(UserError, match="comp features exp003"):
        recheck.recheck("exp003:logistic")


@pytest.fixture
def run_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Repeat the result of the first rehearsal: only what is done with it differs."""
    ran, original = dict[bool, dict[str, Any]](), rehearse._run

    def once(cfg: Any, name: str, space: Path, hidden: bool, python: str) -> dict[str, Any]:
        working, stored_part = space / "kaggle" / "working", tmp_path / f"kept{hidden}"
        if hidden not in ran:
            ran[hidden] = original(cfg, name, space, hidden, python)
            shutil.copytree(working, stored_part)
        else:
            shutil.copytree(stored_part, working)
        return ran[hidden]

    monkeypatch.setattr(rehearse, "_run", once)


@pytest.mark.slow
def test_regression_is_rehearsed_and_rechecked_in_the_targets_unit(
    project: Path, run_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Targets of 5,000 to 14,000, learned standardised: mean and deviation are in the weights, wherever these
    predict."""
    declare_values(project, 1000.0, 9500.0)
    runner.train("exp001", [*QUICK, "train.batch_size=16"], name="exp001")
    table = samples.load()
    split = folds.load(table)
    stored = bank.load("exp001", "test", table, split)
    predicted = stored.heads["label"]
    assert 9000 < predicted.mean() < 10000 and predicted.std() > 1500, (
        "it has learned something, in the unit of the target"
    )
    assert cli.main(["kernel", "exp001", "--rehearse"]) == 0
    facts = artifacts.read_json(rehearse.file_of("exp001"))
    assert facts["max_difference"] <= 1e-5 and "hidden set of 41 rows" in capsys.readouterr().out
    recheck.recheck("exp001")
    assert "predicted 8 rows again with 5 of 5 checkpoints" in capsys.readouterr().out

    # Not vacuous: stored values that are a ten-thousandth too large are found by both.
    for place in (bank.folder("exp001"), *(paths.fold_folder("exp001", 0, n) for n in range(split.count))):
        stored_part = bank.read(place / "test.arrow", table, split)
        large = {"label": stored_part.heads["label"] * np.float32(1.0001)}
        bank.write(
            place / "test.arrow", predictions.PredictionSet(stored_part.row, None, large, stored_part.meta)
        )
    with pytest.raises(UserError, match=r"exp001, seed 0, fold 0: row .*: the stored prediction is"):
        recheck.recheck("exp001")
    assert cli.main(["kernel", "exp001", "--rehearse"]) == 2
    assert "differ from the stored ones by up to 1.0e-04" in capsys.readouterr().err


@pytest.mark.slow
def test_two_gpus_share_the_rows(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    kernel.build("blend001")
    facts = rehearse.rehearse("blend001")
    assert facts["gpus"] == 2 and facts["max_difference"] <= 1e-5


@pytest.mark.slow
def test_rehearsal_without_namespaces_and_its_errors(
    trained: Path, run_once: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sockets are blocked instead, and the output says so; then it takes too long, or other weights were
    bundled."""
    monkeypatch.setattr(rehearse, "NAMESPACES", "exit 1")
    assert cli.main(["kernel", "exp001", "--rehearse"]) == 0
    assert "weaker" in capsys.readouterr().out
    guard = trained / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(rehearse.BLOCKED)
    code = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(guard)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "no network in a rehearsal" in done.stderr

    declared = trained / "configs" / "competition.yaml"
    text = declared.read_text()
    declared.write_text(text + "kernel: {hidden_rows: 100000000}\n")
    assert cli.main(["kernel", "exp001", "--rehearse"]) == 2
    assert "--budget 9h" in capsys.readouterr().err
    declared.write_text(text)
    # The stored predictions are those of other weights: a bundle made by hand, or a bug.
    file, table = bank.folder("exp001") / "test.arrow", samples.load()
    predicted = bank.read(file, table, folds.load(table))
    other = {name: values[::-1].copy() for name, values in predicted.heads.items()}
    bank.write(file, predictions.PredictionSet(predicted.row, None, other, predicted.meta))
    assert cli.main(["kernel", "exp001", "--rehearse"]) == 2
    assert "differ from the stored ones" in capsys.readouterr().err


@pytest.mark.slow
def test_too_much_memory(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "configs" / "competition.yaml"
    file.write_text(file.read_text() + "kernel: {ram: 0.05}\n")
    assert cli.main(["kernel", "exp001", "--rehearse"]) == 2
    assert "failed" in (printed := capsys.readouterr().err) or "memory" in printed


def test_predict_kernel_needs_a_bundle(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--kernel"]) == 2
    assert "comp kernel NAME" in capsys.readouterr().err


def test_budget_drops_what_gains_least(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.write_json(
        rehearse.file_of("blend001"),
        {
            "seconds_per_image": {"exp001": 0.1, "exp001:tta-identity-hflip": 0.2},
            "hidden_rows": 36000,
            "start_seconds": 60.0,
        },
    )
    assert budget.fit("blend001", "4h") == "blend001"

    def killed_while_blending() -> None:
        bank.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        budget.fit("blend001", "150m")

    assert os.WIFSIGNALED(forked(killed_while_blending))
    assert (trained / "configs/ensembles/blend001-150m.yaml").exists()
    assert budget.fit("blend001", "150m") == "blend001-150m"
    out = capsys.readouterr().out
    assert "without exp001" in out and "h of 150m" in out
    assert (trained / "configs/ensembles/blend001-150m.yaml").exists() and (
        paths.ensemble_folder("blend001-150m") / "apply.json"
    ).exists()
    assert cli.main(["kernel", "blend001", "--budget", "10m"]) == 2
    assert "even with one member" in capsys.readouterr().err
    assert cli.main(["kernel", "blend001", "--budget", "soon"]) == 2
    artifacts.write_json(
        rehearse.file_of("exp001:tta-identity-hflip"),
        {
            "seconds_per_image": {"exp001:tta-identity-hflip": 0.2},
            "hidden_rows": 36000,
            "start_seconds": 60.0,
        },
    )
    assert budget.fit("exp001:tta-identity-hflip", "90m") == "exp001"


# --- wheels -------------------------------------------------------------------------------------------------


def test_wheels_of_packages_that_the_image_does_not_have(tmp_path: Path) -> None:
    """The wheel is valid: unpacked, it is imported instead of the installed timm."""
    assert wheels.of_imports() == ["timm"]
    (tmp_path / "no suffix").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    for name, reader in (
        ("train/1.png", []),
        ("train/1.DCM", ["pydicom"]),
        ("train/1.JPG", ["simplejpeg"]),
        ("no suffix", ["simplejpeg"]),
    ):
        assert wheels.of_images(Samples(pd.DataFrame({"images": [[name]]}), (), ""), tmp_path) == reader
    (tmp_path / "wheels").mkdir()
    wheel = wheels._wheel(tmp_path / "wheels", "timm")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        assert "timm/models/resnet.py" in names and not any(
            name.endswith(".pyc") or ".." in name for name in names
        )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from comp.engine.deliver import kernel_inputs; "
        "from pathlib import Path; kernel_inputs._installed_version = lambda name: None; "
        f"kernel_inputs.unpack_wheels(Path({str(tmp_path / 'wheels')!r})); "
        "import importlib.util; print(importlib.util.find_spec('timm').origin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "comp-wheels-" in done.stdout
