"""A name stands for one config, one table, one set of folds and the same images; mistakes are refused before
anything is trained."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from banked import lay_out
from conftest import config
from PIL import Image
from test_compare import few
from test_training import TINY, refusal

from comp import models
from comp.engine import cli, pages
from comp.engine.bank import bank
from comp.engine.config import experiments
from comp.engine.data import cache, image_files, make_folds, prepare, samples
from comp.engine.errors import UserError
from comp.engine.run import fingerprint, runner
from comp.engine.store import artifacts, locks, paths

# --- before anything is trained ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=resnet81", ["resnet81", "resnet18"]),
        ("loss.name=mse", ["mse", "cross_entropy"]),
        ("augment.recipe=hevay", ["hevay", "heavy"]),
        ("augment.recipe=recipe", ["comp/competition.py defines no recipe(size); define it there"]),
        ("predict.tta=[hflp]", ["hflp", "hflip"]),
    ],
)
def test_an_unknown_choice_names_the_nearest(project: Path, override: str, words: list[str]) -> None:
    said = refusal(lambda: runner.train("exp001", [*TINY, override], fold="0", name="x"))
    assert all(word in said for word in words) and f"{override.split('=', maxsplit=1)[0]}: " in said, said
    assert not (project / "runs/x").exists(), "a refused start must leave nothing that blocks the next"


def test_an_override_that_changes_results_needs_a_name(project: Path) -> None:
    assert "--as NAME" in refusal(lambda: runner.train("exp001", ["optim.lr=1"]))
    assert not (project / "runs").exists()


def test_another_config_under_the_same_name_is_refused_with_a_remedy(project: Path) -> None:
    runner.train("exp001", TINY, fold="0", name="x")
    before = artifacts.sha256(project / "runs/x/seed0/fold0/weights.safetensors")
    said = refusal(lambda: runner.train("exp001", [*TINY, "optim.lr=1e-4"], fold="0", name="x"))
    assert "optim.lr: was trained with 0.005, now 0.0001" in said and "--as" in said and "--fresh" in said
    assert artifacts.sha256(project / "runs/x/seed0/fold0/weights.safetensors") == before
    runner.train("exp001", [*TINY, "optim.lr=1e-4"], fold="0", name="x", fresh=True)
    assert artifacts.sha256(project / "runs/x/seed0/fold0/weights.safetensors") != before
    assert len(list((project / "runs/.trash").iterdir())) == 1
    runner.train(
        "exp001", [*TINY, "optim.lr=1e-4", "train.seeds=[1]"], fold="0", name="x"
    )  # another seed is the same run


def test_a_knob_that_the_network_does_not_have_is_refused(project: Path) -> None:
    cfg = config("model.drop_path_rate=0.1", "model.name=test_vit", "data.size=160")
    heads = samples.load().heads
    models.build(cfg, heads, pretrained=False)
    said = refusal(
        lambda: models.build(config("model.drop_path_rate=0.1", "model.name=vgg11"), heads, pretrained=False)
    )
    assert "model.drop_path_rate" in said and "vgg11" in said


def test_independent_mistakes_are_reported_together(project: Path) -> None:
    overrides = [*TINY, "predict.tta=[hflp]", "model.image_pool=max", "optim.name=adamww"]
    said = refusal(lambda: runner.train("exp001", overrides, fold="0", name="x"))
    lines = said.splitlines()
    assert len(lines) == 3, said
    for line, key in zip(lines, ("predict.tta", "model.image_pool", "optim.name"), strict=True):
        assert key in line
    assert not (project / "runs/x").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(project: Path) -> None:
    said = refusal(
        lambda: runner.train(
            "exp001",
            [*TINY, "optim.lr=1e30", "optim.clip_grad=null", "train.batch_size=8"],
            fold="0",
            name="x",
        )
    )
    assert re.search(r"step \d+: the loss", said) or "validation" in said
    assert "train.amp=bf16" in said and "no NaN was saved" in said
    assert not (project / "runs/x/seed0/fold0/weights.safetensors").exists()


# --- a name stands for one config, one table, one set of folds ------------------------------------


def test_a_run_is_not_resumed_on_other_folds(project: Path) -> None:
    """Otherwise rows would be scored by a model that was trained on them."""
    runner.train("exp001", TINY, fold="0", name="x")
    make_folds.make(config("competition.folds.seed=7"), samples.load(), remake=True)
    said = refusal(lambda: runner.train("exp001", [*TINY, "competition.folds.seed=7"], fold="1", name="x"))
    assert "folds.seed: was trained with 0, now 7" in said
    cut = pd.read_csv(project / "data/raw/train.csv", dtype=str).iloc[:-3]
    cut.to_csv(project / "data/raw/train.csv", index=False)
    prepare.prepare(config())
    make_folds.make(config(), samples.load(), remake=True)
    said = refusal(lambda: runner.train("exp001", TINY, fold="1", name="x"))
    assert "another data/samples.parquet" in said and "other folds" in said


def test_a_run_is_not_resumed_with_another_loss(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.train("exp001", TINY, fold="0", name="x")

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, target, reduction="none")

    monkeypatch.setattr(pages.competition, "loss", loss, raising=False)
    assert "another comp/competition.py" in refusal(lambda: runner.train("exp001", TINY, fold="1", name="x"))


def test_fresh_replaces_one_fold_and_not_the_others(project: Path) -> None:
    for number in "01":
        runner.train("exp001", TINY, fold=number, name="x")
    kept = artifacts.sha256(project / "runs/x/seed0/fold0/weights.safetensors")
    runner.train("exp001", TINY, fold="1", name="x", fresh=True)
    assert artifacts.sha256(project / "runs/x/seed0/fold0/weights.safetensors") == kept
    assert len(list((project / "runs/.trash").iterdir())) == 1
    with locks.lock(project / "runs/x/seed0/fold0", "training"):
        said = refusal(lambda: runner.train("exp001", TINY, name="x", fresh=True))
    assert "already training" in said and (project / "runs/x/seed0/fold1/oof.arrow").exists()


def test_fresh_moves_nothing_when_refused_and_its_remedy_works(project: Path) -> None:
    few(project)
    for number in "01":
        runner.train("exp001", TINY, fold=number, name="x")
    kept = project / "runs/x/seed0/fold0/weights.safetensors"
    other = [*TINY, "optim.lr=1e-4"]
    said = refusal(lambda: runner.train("exp001", other, fold="0", name="x", fresh=True))
    assert "optim.lr: was trained with 0.005, now 0.0001" in said
    assert artifacts.manifest_entry(kept) and not (project / "runs/.trash").exists(), "nothing moved"
    (advice,) = re.findall(r"comp (train exp001 --as x .* --fresh)", said)
    assert cli.main(shlex.split(advice)) == 0
    assert experiments.stored_config("x").optim.lr == 1e-4 and (project / "runs/x/score.json").exists()


def test_fresh_moves_no_seed_while_another_is_locked(project: Path) -> None:
    two = [*TINY, "train.seeds=[0,1]"]
    for seed in (0, 1):
        folder = paths.fold_folder("x", seed, 0)
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"w")
    with locks.lock(paths.fold_folder("x", 1, 0), "training"):
        said = refusal(lambda: runner.train("exp001", two, fold="0", name="x", fresh=True))
    assert "already training" in said
    assert (paths.fold_folder("x", 0, 0) / "weights.safetensors").exists()


def test_run_id_changes_with_the_config_and_the_command_is_the_last_one(empty: Path) -> None:
    split = lay_out(empty).folds

    def started(rate: str, *more: str) -> tuple[str, str]:
        cfg = config(f"optim.lr={rate}", *more)
        fingerprint.claim("x", cfg, split, f"comp train exp001 --as x optim.lr={rate}{''.join(more)}")
        return fingerprint.resume_command("x"), fingerprint.run_id("x")

    first = started("0.1")
    assert started("0.1") == first, "killed and begun again it is the same run"
    other = started("0.2")
    assert other[0].endswith("optim.lr=0.2") and other[1] != first[1], "the config began anew, so did the run"
    artifacts.write_text(paths.fold_folder("x", 0, 0) / "oof.arrow", "")
    artifacts.add_to_manifest(paths.fold_folder("x", 0, 0) / "oof.arrow")
    seeds = started("0.2", "train.seeds=[0,1]")
    assert seeds[0].endswith("train.seeds=[0,1]") and seeds[1] == other[1], "more seeds of the same run"
    assert "comp train exp001 --as x optim.lr=0.3 --fresh" in refusal(lambda: started("0.3"))
    assert fingerprint.resume_command("x") == seeds[0]


def test_the_resume_command_can_be_typed_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.train("exp001", [*TINY, "predict.tta=[identity, hflip]"], fold="0", name="x")
    runner.train("exp001", ["machine.progress=false", "train.max_samples=20"], fold="0", debug=True, name="y")
    words = shlex.split(fingerprint.resume_command("x"))
    assert words[:5] == ["comp", "train", "exp001", "--as", "x"] and "predict.tta=[identity, hflip]" in words
    assert shlex.split(fingerprint.resume_command("y"))[:6] == [
        "comp",
        "train",
        "exp001",
        "--as",
        "y",
        "--debug",
    ]
    assert f"next: {fingerprint.resume_command('y')}" in capsys.readouterr().out


def test_an_interrupted_start_is_no_start(project: Path) -> None:
    """Killed between config.yaml and its manifest entry: the same command continues, and so does another
    config."""
    (project / "runs/x").mkdir(parents=True)
    (project / "runs/x/config.yaml").write_text("data: {size: 3}\n")
    runner.train("exp001", TINY, fold="0", name="x")
    assert (project / "runs/x/seed0/fold0/test.arrow").exists()


def test_a_run_cannot_have_the_name_of_an_ensemble(project: Path) -> None:
    (project / "configs/ensembles/blend001.yaml").write_text("members: [x]\nmethod: mean\n")
    assert "ensemble" in refusal(lambda: runner.train("exp001", TINY, fold="0", name="blend001"))


def test_runs_without_a_newer_knob_can_be_resumed(project: Path) -> None:
    runner.train("exp001", TINY, fold="0", name="x")
    file = project / "runs/x/config.yaml"
    kept = [line for line in file.read_text().splitlines() if "drop_path_rate" not in line]
    assert len(kept) == len(file.read_text().splitlines()) - 1
    file.write_text("\n".join(kept) + "\n")
    artifacts.add_to_manifest(file)
    assert experiments.stored_config("x").model.drop_path_rate == 0.0
    runner.train("exp001", TINY, fold="1", name="x")


def test_a_batch_of_damaged_images_only_is_no_crash(project: Path) -> None:
    table = samples.load()
    (project / "data/raw" / table.frame["images"].iloc[table.positions("test")[47]][0]).write_bytes(b"")
    tiny = [*TINY, "predict.batch_size=47", "model.name=test_convnext"]
    runner.train("exp001", tiny, fold="0", name="x")
    assert len((project / "runs/x/seed0/fold0/test_damaged.txt").read_text().splitlines()) == 1


def test_a_missing_device_is_one_line(project: Path) -> None:
    assert "machine.device" in refusal(lambda: runner.train("exp001", ["machine.device=gpu"]))
    if not torch.cuda.is_available():
        said = refusal(lambda: runner.train("exp001", [*TINY, "machine.device=cuda"], name="x"))
        assert "no GPU" in said


# --- the image files of a run ---------------------------------------------------------------------

CACHES = ["data.cache=true", "data.cache=false"]


def files(project: Path, kind: str, count: int) -> list[Path]:
    """The images of the first rows of a source, in the order of the table."""
    rows = samples.load()
    return [project / "data/raw" / rows.frame["images"].iloc[at][0] for at in rows.positions(kind)[:count]]


def replaced(where: list[Path]) -> dict[Path, bytes]:
    """Replaces each image by its negative, a file of another size. Returns the old contents."""
    old = {file: file.read_bytes() for file in where}
    for file in where:
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file, "PNG", compress_level=0)
        assert file.stat().st_size != len(old[file])
    return old


def touched(project: Path) -> None:
    """As in a copy of the project: every file has another mtime and the same bytes."""
    for file in (project / "data/raw").rglob("*.png"):
        os.utime(file, ns=(1, 1))


def without_cache(project: Path, cache: str) -> None:
    """Of other runs as well, so that no cache has hashed the files."""
    if cache == CACHES[1]:
        shutil.rmtree(project / "data/cache")


def typed(*words: str) -> int:
    return cli.main(["train", "exp001", "--as", "x", *TINY, *words])


@pytest.mark.parametrize(("cache", "kind"), [(CACHES[0], "train"), (CACHES[1], "test")])
def test_replaced_images_are_refused_by_name_and_count(
    project: Path, cache: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    without_cache(project, cache)
    assert typed("--fold", "0", cache) == 0
    left = paths.path("runs/x/seed0/fold0/test.arrow").read_bytes()
    victims = files(project, kind, 7)
    old = replaced(victims)
    decoded = sum(file.stat().st_size for file in project.glob("data/cache/*/pixels.bin"))
    capsys.readouterr()
    for command in (["--fold", "1", cache], ["--fold", "1", "--fresh", cache]):
        assert typed(*command) == 2
        said = capsys.readouterr().err
        assert said.startswith("runs/x: 7 of its 1797 image files") and "--fresh" in said and "--as" in said
        assert (
            all(f"{kind}/{file.name}" in said for file in victims[:5])
            and f"{kind}/{victims[5].name}" not in said
        )
    assert not paths.path("runs/x/seed0/fold1/weights.safetensors").exists()
    assert decoded == sum(file.stat().st_size for file in project.glob("data/cache/*/pixels.bin")), (
        "nothing is spent"
    )
    for file, data in old.items():
        file.write_bytes(data)
    assert typed("--fold", "1", cache) == 0, "the old files again, whatever their mtimes"
    assert "runs/x: 7 image files have another mtime" in capsys.readouterr().out
    assert paths.path("runs/x/seed0/fold0/test.arrow").read_bytes() == left
    replaced(victims)
    assert typed("--fold", "0", "--fresh", cache) == 2, "its other fold has seen the old ones"
    artifacts.move_to_trash(paths.path("runs/x/seed0/fold1"))
    assert typed("--fold", "0", "--fresh", cache) == 0, "nothing of the old is left"


@pytest.mark.parametrize("cache", CACHES)
def test_a_run_with_touched_images_is_resumed_with_a_note(
    project: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    without_cache(project, cache)
    assert typed("--fold", "0", cache) == 0
    touched(project)
    capsys.readouterr()
    assert typed("--fold", "1", cache) == 0
    what = "bytes" if cache == CACHES[0] else "size, and no image cache has hashed them"
    assert (
        f"note: runs/x: 1797 image files have another mtime and the same {what}; it is resumed"
        in capsys.readouterr().out
    )
    fingerprint.validate_images("x", config(cache))
    noted = "note:" in capsys.readouterr().out
    assert noted == (cache == CACHES[1]), "what was hashed again is not hashed a second time"


def test_a_changed_file_of_the_same_size_is_found_by_its_hash(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the caches are gone."""
    (victim,) = files(trained, "train", 1)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    shutil.rmtree(trained / "data/cache")
    assert cli.main(["predict", "exp001"]) == 2
    said = capsys.readouterr().err
    assert f"1 of its 1797 image files have changed since it was started: train/{victim.name};" in said
    victim.unlink()
    with pytest.raises(UserError) as missing:
        fingerprint.validate_images("exp001", config())
    (error,) = missing.value.errors
    assert (error.code, error.where, error.remedy) == ("images-missing", "runs/exp001", "restore them")
    assert f"1 of its 1797 image files are missing: train/{victim.name}" in error.what


def test_scores_of_old_and_new_images_are_not_merged(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor predicted again; existing predictions stay. Missing files were not replaced."""
    before = {kind: paths.path(f"runs/exp001/{kind}.arrow").read_bytes() for kind in ("oof", "test")}
    victims = files(trained, "test", 3)
    old = replaced(victims)
    for command in (
        ["predict", "exp001"],
        ["predict", "exp001", "--tta", "identity,vflip"],
        ["tta", "exp001"],
    ):
        capsys.readouterr()
        assert cli.main(command) == 2, command
        assert (
            f"3 of its 1797 image files have changed since it was started: test/{victims[0].name}"
            in capsys.readouterr().err
        )
    assert not paths.path("runs/exp001/members/tta-identity-vflip").exists()
    for file in old:
        file.unlink()
    assert cli.main(["predict", "exp001"]) == 0
    assert (
        f"note: runs/exp001: 3 image files are missing, like test/{victims[0].name}"
        in capsys.readouterr().out
    )
    assert {kind: paths.path(f"runs/exp001/{kind}.arrow").read_bytes() for kind in before} == before
    assert cli.main(["predict", "exp001", "--tta", "identity,vflip"]) == 2
    assert "images" not in bank.read_meta(paths.path("runs/exp001/oof.arrow"))


def test_a_lost_record_of_images_is_made_again_if_the_files_are_the_same(trained: Path) -> None:
    (record,) = (trained / "data/images").glob("*.parquet")
    assert artifacts.read_json(trained / "runs/exp001/inputs.json")["images"] == record.stem
    whole = record.read_bytes()
    for damage in (whole[:-100], b"", None):
        record.unlink()
        if damage is not None:
            record.write_bytes(damage)
        fingerprint.validate_images("exp001", config())
        assert record.read_bytes() == whole
    record.unlink()
    replaced(files(trained, "train", 1))
    assert f"data/images/{record.name}: missing" in refusal(
        lambda: fingerprint.validate_images("exp001", config())
    )


def test_an_archive_of_images_is_one_file(project: Path) -> None:
    raw = project / "data/raw"

    def packed(change: int) -> None:
        with zipfile.ZipFile(raw / "train.zip", "w") as archive:
            for file in sorted((raw / "train").iterdir()):
                data = bytearray(file.read_bytes())
                data[-20] ^= change
                archive.writestr(file.name, bytes(data))

    packed(0)
    yaml = project / "configs/competition.yaml"
    yaml.write_text(yaml.read_text().replace('"train/{id}.png"', '"train.zip/{id}.png"'))
    prepare.prepare(config())
    make_folds.make(config(), samples.load(), remake=True)
    digest = image_files.record(config())
    assert image_files.compare(config(), digest) == (361, [], [], 0, 0)
    cache.open_images(
        config(), sorted({i for images in samples.load().frame["images"] for i in images}), False
    )
    hashed = image_files.record(config())
    packed(0)
    assert image_files.compare(config(), hashed) == (361, [], [], 1, 0)
    assert image_files.compare(config(), hashed) == (361, [], [], 0, 0)
    assert image_files.compare(config(), digest)[1:] == ([], [], 0, 1)
    packed(1)
    assert image_files.compare(config(), hashed) == (361, ["train.zip"], [], 0, 0), "of the same size"


def test_a_kill_while_the_record_is_written_loses_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the mtimes of touched files are updated, and before the first fold."""
    (record,) = (trained / "data/images").iterdir()
    before = record.read_bytes()
    touched(trained)

    def killed(table: object, file: Path, **_: object) -> None:
        file.write_bytes(b"PAR1 half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_files.pq, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            fingerprint.validate_images("exp001", config())
        assert record.read_bytes() == before and len(list((trained / "data/images").iterdir())) == 1
        record.unlink()
        with pytest.raises(KeyboardInterrupt):
            image_files.record(config())
        assert not list((trained / "data/images").iterdir())
    assert image_files.compare(config(), record.stem) == (1797, [], [], 0, 0)
