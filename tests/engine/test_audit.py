"""comp audit: nothing on clean data, and every planted leak by its name. Leaks are planted in files, or by
replacing one function."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked import Project, declare, lay_out, member
from conftest import config

from comp.engine.bank import bank, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import experiments
from comp.engine.data import folds, samples
from comp.engine.ensemble import blend as blending
from comp.engine.extras import audit, audit_ensembles, audit_folds, audit_log, audit_predictions, audit_runs
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.run import loading, runner
from comp.engine.store import artifacts, paths

RECIPE = [
    "track=none", "augment=none", "train.epochs=3", "train.max_samples=48", "train.batch_size=8", "machine.num_workers=0",
    "machine.progress=false", "optim.lr=0.01", "data.normalize=data",
]  # fmt: skip


def names(found: Sequence[Finding]) -> set[str]:
    return {each.name for each in found if isinstance(each, Leak)}


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(practice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one tiny run; nobody writes here."""
    root = tmp_path_factory.mktemp("audited") / "project"
    shutil.copytree(practice, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_ROOT", str(root))
        paths.root.cache_clear()
        runner.train("exp001", RECIPE, name="run")
    paths.root.cache_clear()
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path, enter: Any) -> Path:
    shutil.copytree(trained, tmp_path / "project")
    return enter(tmp_path / "project")


def leaks_of_run(run: str = "run") -> list[Finding]:
    table = samples.load()
    return audit_runs.of_run(run, table, folds.load(table))


def rewritten(number: int, change: Any) -> None:
    """The OOF of a fold with other values, sealed as if it were right."""
    table = samples.load()
    split = folds.load(table)
    file = paths.fold_folder("run", 0, number) / "oof.arrow"
    stored = bank.read(file, table, split)
    values = {name: change(np.array(each)) for name, each in stored.heads.items()}
    assert stored.fold is not None
    bank.write(file, PredictionSet(stored.row.copy(), stored.fold.copy(), values, stored.meta))


def test_a_clean_run_has_no_leaks(run: Path) -> None:
    assert leaks_of_run() == []


def test_misaligned_rows_are_found_by_predicting_them_again(run: Path) -> None:
    rewritten(1, lambda values: np.roll(values, 1, axis=0))
    assert names(leaks_of_run()) == {"misaligned rows"}


def test_predictions_of_training_rows_are_found_by_predicting_them_again(run: Path) -> None:
    from comp import predict

    table = samples.load()
    rows = folds.load(table).split(1)[1][
        : len(bank.read_meta(paths.fold_folder("run", 0, 1) / "oof.arrow")) and 48
    ]
    context = loading.load_context(experiments.stored_config("run"))
    values = predict.predict(context, paths.fold_folder("run", 0, 2) / "weights.safetensors", rows)[0][
        "label"
    ]
    rewritten(1, lambda _: values)
    leak = leaks_of_run()[0]
    assert isinstance(leak, Leak)
    assert (
        leak.name == "in-sample base predictions" and leak.method == "re-prediction" and "fold2" in leak.where
    )


def test_a_merged_set_that_differs_from_its_parts(run: Path) -> None:
    table = samples.load()
    stored = bank.load("run", "oof", table, folds.load(table))
    assert stored.fold is not None
    known = np.flatnonzero(stored.predicted)
    for change, name in (
        (lambda v: np.roll(v, 1, axis=0), "misaligned rows"),
        (lambda v: v + 1, "predictions that differ from those of their folds"),
    ):
        values = np.array(stored.heads["label"])
        values[known] = change(values[known])
        bank.write(
            run / "runs/run/oof.arrow",
            PredictionSet(stored.row.copy(), stored.fold.copy(), {"label": values}, stored.meta),
        )
        assert names(leaks_of_run()) == {name}


def test_every_head_is_predicted_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp import predict

    table = samples.load()
    file = paths.fold_folder("run", 0, 0) / "oof.arrow"
    stored = bank.read(file, table, folds.load(table))
    two = {name: np.array(stored.heads["label"]) for name in ("label", "second")}
    place = {int(row): i for i, row in enumerate(stored.row)}
    monkeypatch.setattr(
        predict,
        "predict",
        lambda context, weights, rows: ({n: v[[place[r] for r in rows]] for n, v in two.items()}, {}),
    )
    heads = (table.heads[0], replace(table.heads[0], name="second"))
    context = replace(
        loading.load_context(experiments.stored_config("run")),
        samples=samples.Samples(table.frame, heads, table.hash),
    )
    values = {name: column.copy() for name, column in two.items()}
    both = PredictionSet(stored.row, stored.fold, values, stored.meta)
    assert audit_predictions.repredict(context, {file: both}) == []
    values["second"][:] = np.roll(values["second"], 1, axis=0)
    assert names(audit_predictions.repredict(context, {file: both})) == {
        "predictions that differ from those of their weights"
    }


def test_a_run_whose_weights_are_gone_is_named_as_not_checked(run: Path) -> None:
    for number in (0, 3):
        (paths.fold_folder("run", 0, number) / bank.WEIGHTS).unlink()
    (gap,) = leaks_of_run()
    assert isinstance(gap, NotChecked) and gap.what == "run"
    assert "2 sets" in gap.reason and "fold0/oof.arrow" in gap.reason and "fold3/oof.arrow" in gap.reason


def test_statistics_fitted_on_validation_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp.engine.run import pixel_stats

    fit, train_rows = pixel_stats.fit_pixel_stats, samples.load().positions("train")
    with monkeypatch.context() as patch:
        patch.setattr(
            pixel_stats, "fit_pixel_stats", lambda cfg, module, feed, rows: fit(cfg, module, feed, train_rows)
        )
        runner.train("exp001", RECIPE, name="leaky", fold="0")
    (leak,) = leaks_of_run("leaky")
    assert isinstance(leak, Leak) and leak.name == "statistics fitted on validation rows"
    assert leak.method == "recomputation" and "leaky/seed0/fold0" in leak.where


def test_a_better_epoch_than_the_last_shows_in_the_log(run: Path) -> None:
    place = paths.fold_folder("run", 0, 0)
    cfg, table = experiments.stored_config("run"), samples.load()
    split = folds.load(table)
    stored = bank.read(place / "oof.arrow", table, split)
    now = score.validation_score(
        cfg, table.heads[0], stored.heads["label"], table, stored.row.astype(np.int64)
    )
    assert audit_log.selected_epoch(place, cfg, table, split) == []
    lines = [
        f'{{"epoch": {e}, "valid_metric": {value}}}\n'
        for e, value in ((1, now - 0.3), (2, now), (3, now - 0.2))
    ]  # as if the weights of epoch 2 had been saved
    (place / "log.jsonl").write_text("".join(lines))
    (leak,) = audit_log.selected_epoch(place, cfg, table, split)
    assert leak.name == "best epoch picked on the scored fold" and "epoch 2" in leak.where


def test_the_same_image_in_two_folds(run: Path) -> None:
    table = samples.load()
    split = folds.load(table)
    cfg = config(experiment="base")
    assert audit_folds.duplicates(cfg, table, split) == []
    fold = split.assignment[0]
    a, b = (int(np.flatnonzero(fold == number)[0]) for number in (0, 3))
    raw = paths.path("data", "raw")
    shutil.copy(raw / table.frame["images"].iloc[a][0], raw / table.frame["images"].iloc[b][0])
    (leak,) = audit_folds.duplicates(cfg, table, split)
    assert isinstance(leak, Leak)
    assert leak.name == "duplicates across folds" and leak.method == "hash" and "0, 3" in leak.where


def test_the_same_image_inside_archives_and_arrays(empty: Path) -> None:
    project = lay_out(empty, "binary")
    raw = paths.path("data", "raw")
    raw.mkdir(parents=True)
    stack = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    stack[13] = stack[1]  # folds 3 and 1
    np.save(raw / "stack.npy", stack)
    with zipfile.ZipFile(raw / "train.zip", "w") as archive:
        for i in range(20, 399):
            archive.writestr(f"{i}.png", b"the same" if i in (22, 29) else str(i))  # folds 2 and 4
    project.samples.frame["images"] = [
        [f"stack.npy/{i}" if i < 20 else f"train.zip/{i}.png"] for i in range(len(project.samples.frame))
    ]
    array, member_, gap = audit_folds.duplicates(project.cfg, project.samples, project.folds)
    assert "00001, 00013 in folds 1, 3" in array[1] and "00022, 00029 in folds 2, 4" in member_[1]
    assert isinstance(gap, NotChecked) and gap.what == "duplicates among 1 images that cannot be read"
    assert "train.zip/399.png" in gap.reason


def test_a_group_on_both_sides(run: Path) -> None:
    table = samples.load()
    split = folds.load(table)
    assert audit_folds.groups(table, split) == []
    frame = split.frame.copy()
    frame["fold"] = [(frame["fold"].iloc[0] + 1) % 5, *frame["fold"].iloc[1:]]
    folds.save(frame, {key: value for key, value in split.meta.items() if key != "hash"})
    (leak,) = audit_folds.groups(table, folds.load(table))
    assert leak.name == "a split group" and leak.method == "provenance"


def test_pseudo_labels_by_the_models_of_all_folds(empty: Path) -> None:
    project = lay_out(empty, "binary")
    assert audit_folds.pseudo_sources(project.samples, project.folds) == []
    frame = project.samples.frame
    frame.loc[frame.index[-3:], "source"] = "pseudo:exp001"
    again = samples.Samples(frame, project.samples.heads, project.samples.hash)
    leaks = audit_folds.pseudo_sources(again, folds.Folds(project.folds.frame, project.folds.meta, again))
    assert names(leaks) == {"pseudo-labels from models trained on the fold"} and len(leaks) == 5
    assert "fold 0 is trained on pseudo:exp001" in leaks[0].where


def test_an_ensemble_scored_on_the_rows_it_was_fitted_on(empty: Path) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    for i in range(3):
        member(project, f"exp00{i + 1}", seed=i)
    declare(project, "blend001", "members: [exp001, exp002, exp003]\nmethod: logistic")
    blending.blend("blend001")

    def leaks() -> list[Finding]:
        return audit_ensembles.of_ensemble("blend001", project.cfg, project.samples, project.folds)

    assert leaks() == []
    recipe = artifacts.read_json(bank.folder("blend001") / "apply.json")
    from comp.engine.ensemble import average

    given = {
        a: bank.load(a, "oof", project.samples, project.folds).heads for a in ("exp001", "exp002", "exp003")
    }
    stored = bank.load("blend001", "oof", project.samples, project.folds)
    assert stored.fold is not None
    planted = PredictionSet(stored.row.copy(), stored.fold.copy(), average.apply(recipe, given), stored.meta)
    bank.write(bank.folder("blend001") / "oof.arrow", planted)
    assert names(leaks()) == {"in-sample meta-model"}


def test_the_verb_lists_leaks_gaps_and_optimistic_scores(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project: Project = lay_out(empty, "binary")
    project.samples.frame["images"] = [[] for _ in range(len(project.samples.frame))]
    member(project, "exp001", marks=["selected_on_fold"])
    member(project, "exp001:greedy", seed=2, marks=["selected_on_fold"])
    member(project, "exp002", seed=3)
    declare(project, "blend001", "members: ['exp001:greedy', exp002]\nmethod: ridge")
    blending.blend("blend001")
    capsys.readouterr()
    before = {file: file.read_bytes() for file in empty.rglob("*") if file.is_file()}
    assert audit.audit() == 0
    assert {f: f.read_bytes() for f in empty.rglob("*") if f.is_file()} == before, "nothing is written"
    out = capsys.readouterr().out
    assert "optimistic: exp001 selected its epoch" in out and "optimistic: exp001:greedy selected" in out
    assert "optimistic: blend001 is made from exp001:greedy, which is marked selected_on_fold" in out
    assert "optimistic: exp002" not in out
    assert "not checked: runs/exp001/members/greedy/oof.arrow: its metadata names no weights" in out
    assert "not checked: duplicates among 400 images that cannot be read: 00000.png" in out
    assert "no leaks; 4 not checked, see above" in out
    table = dict(re.findall(r"^(\S.*?) {2,}(\S.*)$", out, re.MULTILINE))
    assert table["duplicates across folds"] == "no leak found, 1 not checked"
    assert table["a split group"] == "not checked: the samples have no groups"
    assert table["misaligned rows"] == "no leak found, 3 not checked"
    assert table["in-sample meta-model"] == table["best epoch picked on the scored fold"] == "no leak found"
