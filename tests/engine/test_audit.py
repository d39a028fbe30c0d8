"""comp audit: nothing on clean data, every planted leak by its name, and chance on coin flips. Leaks are planted in files, or by
replacing one function; the audit reads no setting that says so."""

from __future__ import annotations

import shutil
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked import Project, declare, lay_out, member
from conftest import config

from comp import metrics
from comp.engine.bank import bank, nested_cv, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data import folds, samples
from comp.engine.ensemble import blend as blending
from comp.engine.ensemble.blend_config import AVERAGES, SEARCHED, STACKED
from comp.engine.extras import audit_runs, canary, flips, leak_audit
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.run import runner
from comp.engine.store import artifacts, paths

RECIPE = [
    "track=none", "augment=none", "train.epochs=3", "train.limit=48", "train.batch_size=8", "machine.num_workers=0",
    "machine.progress=false", "optim.lr=0.01", "data.normalize=data",
]  # fmt: skip


def names(found: Sequence[Finding]) -> set[str]:
    return {each.name for each in found if isinstance(each, Leak)}


# --- the pipeline on coin flips ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> flips.World:
    return flips.world(0, rows=300)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "METHODS", ("mean", "greedy", "logistic"))


def test_a_clean_pipeline_listens_to_nobody(world: flips.World, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    assert canary.leaks(world, canary.watched(world)) == []


def greedy_epoch(weights: list[Any], x: Any, y: Any, taught: Any, scored: Any) -> int:
    auc = metrics.find("roc_auc")
    return int(np.argmax([auc(y[scored], x[scored] @ w - (x[scored] @ w).min() + 0.0) for w in weights]))


def plant(monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    statistics, pseudo, assemble = canary.statistics, canary.pseudo, canary.assemble
    everyone = lambda y: np.arange(len(y))  # noqa: E731
    if leak == "statistics fitted on validation rows":
        monkeypatch.setattr(canary, "statistics", lambda x, y, taught: statistics(x, y, everyone(y)))
    elif leak == "pseudo-labels that saw the fold":
        monkeypatch.setattr(canary, "pseudo", lambda x, y, extra, taught: pseudo(x, y, extra, everyone(y)))
    elif leak == "in-sample base predictions":
        train = canary.train
        monkeypatch.setattr(canary, "train", lambda x, y, taught, *rest: train(x, y, everyone(y), *rest))
    elif leak == "best epoch picked on the scored fold":
        monkeypatch.setattr(canary, "epoch", greedy_epoch)
    elif leak == "misaligned rows":
        monkeypatch.setattr(canary, "assemble", lambda parts, rows: np.roll(assemble(parts, rows), 1, axis=0))
    elif leak == "in-sample meta-model":

        def in_sample(fold: Any, fit: Any, apply: Any, **rest: Any) -> nested_cv.NestedPrediction:
            final, rows = fit(np.arange(len(fold))), np.arange(len(fold))
            return nested_cv.NestedPrediction(apply(final, rows), {}, final, ())

        monkeypatch.setattr(nested_cv, "nested_predict", in_sample)


PLANTED = [
    "statistics fitted on validation rows", "pseudo-labels that saw the fold", "in-sample base predictions",
    "best epoch picked on the scored fold", "misaligned rows", "in-sample meta-model",
]  # fmt: skip


@pytest.mark.parametrize("leak", PLANTED)
def test_a_planted_leak_is_flagged_by_its_name(
    world: flips.World, monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    quick(monkeypatch)
    plant(monkeypatch, leak)
    assert names(canary.leaks(world, canary.watched(world))) == {leak}


def test_a_choice_of_cut_points_by_the_rows_they_are_scored_on_is_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nested cut points, but whether they or plain rounding are reported is decided by the reported number."""
    from comp.engine.bank import thresholds

    def luckier(metric: Any, head: Any, value: Any, table: Any, split: Any, rows: Any, fold: Any) -> Any:
        truth, value = table.truth(head, rows), value[:, 0]
        fitted = nested_cv.nested_predict(
            fold,
            lambda at: thresholds.fit_cuts(value[at], truth[at], 4, metric),
            lambda cuts, at: thresholds.apply_cuts(value[at], cuts),
        ).prediction.astype(np.int64)
        plain = thresholds.apply_cuts(value, [0.5, 1.5, 2.5])
        return (fitted if metric(truth, fitted) > metric(truth, plain) else plain), None

    monkeypatch.setattr(flips, "METHODS", ("mean",))
    monkeypatch.setattr(flips, "STEPS", ())
    luck = flips.world(2, rows=300)
    assert canary.leaks(luck, canary.watched(luck)) == []
    monkeypatch.setattr(score, "metric_predictions", luckier)
    (leak,) = canary.leaks(luck, canary.watched(luck))
    assert leak.name == "in-sample meta-model" and leak.where == "cut points"


def test_what_selection_costs_at_a_thousand_rows() -> None:
    assert np.mean([canary.selection(flips.world(seed)) for seed in range(5)]) == pytest.approx(
        0.077, abs=0.02
    )


@pytest.mark.slow
def test_twenty_worlds_of_coin_flips() -> None:
    """Every method within 3 standard errors in at least 19, and in-sample visibly not where there is anything to fit; nothing
    flagged on any clean world."""
    errors, gaps = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for seed in range(20):
        world = flips.world(seed)
        first = canary.watched(world)
        assert canary.leaks(world, first) == [], seed
        for name, each in canary.chance(world, first).items():
            errors[name].append(each["errors"])
            gaps[name].append(each["in_sample"] - each["honest"])
    assert set(errors) >= {*AVERAGES, *SEARCHED, *STACKED} - ({"lightgbm"} - set(flips.METHODS))
    wrong = []
    for name, gap in gaps.items():
        within = sum(abs(each) <= canary.LIMIT for each in errors[name])
        error = np.std(gap, ddof=1) / 20**0.5
        print(
            f"{name}: {within} of 20 within, in-sample {np.mean(gap):+.4f} ± {error:.4f} above honest, {np.mean(errors[name]):+.2f}"
        )
        visibly = np.mean(gap) > 3 * error if flips.fits(name) else np.abs(gap).max() < 1e-3
        if within < 19 or not visibly:
            wrong.append(name)
    assert not wrong, wrong


# --- files ---------------------------------------------------------------------------------------------------------------


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
    return leak_audit.of_run(run, table, folds.load(table))


def rewritten(number: int, change: Any) -> None:
    """The OOF of a fold with other values, sealed as if it were right."""
    table = samples.load()
    split = folds.load(table)
    file = paths.fold_folder("run", 0, number) / "oof.arrow"
    said = bank.read(file, table, split)
    values = {name: change(np.array(each)) for name, each in said.heads.items()}
    assert said.fold is not None
    bank.write(file, PredictionSet(said.row.copy(), said.fold.copy(), values, said.meta))


def test_a_clean_run_is_clean(run: Path) -> None:
    assert leaks_of_run() == []


def test_rows_that_moved_are_found_by_predicting_them_again(run: Path) -> None:
    rewritten(1, lambda values: np.roll(values, 1, axis=0))
    assert names(leaks_of_run()) == {"misaligned rows"}


def test_predictions_of_rows_that_taught_are_found_by_predicting_them_again(run: Path) -> None:
    from comp import predict

    table = samples.load()
    rows = folds.load(table).split(1)[1][
        : len(bank.read_meta(paths.fold_folder("run", 0, 1) / "oof.arrow")) and 48
    ]
    material = runner.gather(runner.stored_config("run"))
    said = predict.predict(material, paths.fold_folder("run", 0, 2) / "weights.safetensors", rows)[0]["label"]
    rewritten(1, lambda values: said)
    leak = leaks_of_run()[0]
    assert isinstance(leak, Leak)
    assert (
        leak.name == "in-sample base predictions" and leak.knew == "re-prediction" and "fold2" in leak.where
    )


def test_sets_that_do_not_merge_to_what_stands_above_them(run: Path) -> None:
    table = samples.load()
    said = bank.load("run", "oof", table, folds.load(table))
    assert said.fold is not None
    known = np.flatnonzero(said.predicted)
    for change, name in (
        (lambda v: np.roll(v, 1, axis=0), "misaligned rows"),
        (lambda v: v + 1, "predictions that their folds do not repeat"),
    ):
        values = np.array(said.heads["label"])
        values[known] = change(values[known])
        bank.write(
            run / "runs/run/oof.arrow",
            PredictionSet(said.row.copy(), said.fold.copy(), {"label": values}, said.meta),
        )
        assert names(leaks_of_run()) == {name}


def test_every_head_is_predicted_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp import predict

    table = samples.load()
    file = paths.fold_folder("run", 0, 0) / "oof.arrow"
    said = bank.read(file, table, folds.load(table))
    two = {name: np.array(said.heads["label"]) for name in ("label", "second")}
    place = {int(row): i for i, row in enumerate(said.row)}
    monkeypatch.setattr(
        predict,
        "predict",
        lambda material, weights, rows: ({n: v[[place[r] for r in rows]] for n, v in two.items()}, {}),
    )
    heads = (table.heads[0], replace(table.heads[0], name="second"))
    material = replace(
        runner.gather(runner.stored_config("run")), samples=samples.Samples(table.frame, heads, table.hash)
    )
    stored = {name: values.copy() for name, values in two.items()}
    both = PredictionSet(said.row, said.fold, stored, said.meta)
    assert audit_runs._again(material, {file: both}) == []
    stored["second"][:] = np.roll(stored["second"], 1, axis=0)
    assert names(audit_runs._again(material, {file: both})) == {
        "predictions that their weights do not repeat"
    }


def test_a_run_whose_weights_are_gone_is_named_as_not_checked(run: Path) -> None:
    for number in (0, 3):
        (paths.fold_folder("run", 0, number) / bank.WEIGHTS).unlink()
    (gap,) = leaks_of_run()
    assert isinstance(gap, NotChecked) and gap.what == "run"
    assert "2 sets" in gap.why and "fold0/oof.arrow" in gap.why and "fold3/oof.arrow" in gap.why


def test_statistics_of_a_real_run_that_saw_its_validation_rows(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comp.engine.run import pixel_stats

    honest_fit, everyone = pixel_stats.fit_pixel_stats, samples.load().positions("train")
    with monkeypatch.context() as patch:
        patch.setattr(
            pixel_stats,
            "fit_pixel_stats",
            lambda cfg, module, loader, taught: honest_fit(cfg, module, loader, everyone),
        )
        runner.train("exp001", RECIPE, name="leaky", fold="0")
    (leak,) = leaks_of_run("leaky")
    assert isinstance(leak, Leak) and leak.name == "statistics fitted on validation rows"
    assert leak.knew == "recomputation" and "leaky/seed0/fold0" in leak.where


def test_a_better_epoch_than_the_last_shows_in_the_log(run: Path) -> None:
    place = paths.fold_folder("run", 0, 0)
    cfg, table = runner.stored_config("run"), samples.load()
    split = folds.load(table)
    said = bank.read(place / "oof.arrow", table, split)
    now = score.validation_score(cfg, table.heads[0], said.heads["label"], table, said.row.astype(np.int64))
    assert audit_runs.of_log(place, cfg, table, split) == []
    lines = [
        f'{{"epoch": {e}, "valid_metric": {value}}}\n'
        for e, value in ((1, now - 0.3), (2, now), (3, now - 0.2))
    ]  # as it would stand there, had the weights of epoch 2 been kept
    (place / "log.jsonl").write_text("".join(lines))
    (leak,) = audit_runs.of_log(place, cfg, table, split)
    assert leak.name == "best epoch picked on the scored fold" and "epoch 2" in leak.where


def test_the_same_picture_in_two_folds(run: Path) -> None:
    table = samples.load()
    split = folds.load(table)
    cfg = config(experiment="base")
    assert leak_audit.duplicates(cfg, table, split) == []
    fold = split.assignment[0]
    a, b = (int(np.flatnonzero(fold == number)[0]) for number in (0, 3))
    raw = paths.path("data", "raw")
    shutil.copy(raw / table.frame["images"].iloc[a][0], raw / table.frame["images"].iloc[b][0])
    (leak,) = leak_audit.duplicates(cfg, table, split)
    assert isinstance(leak, Leak)
    assert leak.name == "duplicates across folds" and leak.knew == "hash" and "0, 3" in leak.where


def test_the_same_picture_inside_archives_and_arrays(empty: Path) -> None:
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
    array, member_, gap = leak_audit.duplicates(project.cfg, project.samples, project.folds)
    assert "00001, 00013 in folds 1, 3" in array[1] and "00022, 00029 in folds 2, 4" in member_[1]
    assert isinstance(gap, NotChecked) and gap.what == "duplicates among 1 images that cannot be read"
    assert "train.zip/399.png" in gap.why


def test_a_group_on_both_sides(run: Path) -> None:
    table = samples.load()
    split = folds.load(table)
    assert leak_audit.groups(table, split) == []
    frame = split.frame.copy()
    frame["fold"] = [(frame["fold"].iloc[0] + 1) % 5, *frame["fold"].iloc[1:]]
    folds.save(frame, {key: value for key, value in split.meta.items() if key != "hash"})
    (leak,) = leak_audit.groups(table, folds.load(table))
    assert leak.name == "a split group" and leak.knew == "provenance"


def test_pseudo_labels_that_every_model_made(empty: Path) -> None:
    project = lay_out(empty, "binary")
    assert leak_audit.pseudo(project.samples, project.folds) == []
    frame = project.samples.frame
    frame.loc[frame.index[-3:], "source"] = "pseudo:exp001"
    again = samples.Samples(frame, project.samples.heads, project.samples.hash)
    leaks = leak_audit.pseudo(again, folds.Folds(project.folds.frame, project.folds.meta, again))
    assert names(leaks) == {"pseudo-labels that saw the fold"} and len(leaks) == 5
    assert "pseudo:exp001 teaches fold 0" in leaks[0].where


def test_an_ensemble_scored_on_the_rows_that_taught_it(empty: Path) -> None:
    project = lay_out(empty, "binary", metric="log_loss")
    for i in range(3):
        member(project, f"exp00{i + 1}", seed=i)
    declare(project, "blend001", "members: [exp001, exp002, exp003]\nmethod: logistic")
    blending.blend("blend001")

    def leaks() -> list[Finding]:
        return leak_audit.of_ensemble("blend001", project.cfg, project.samples, project.folds)

    assert leaks() == []
    recipe = artifacts.read_json(bank.folder("blend001") / "apply.json")
    from comp.engine.ensemble import average

    given = {
        a: bank.load(a, "oof", project.samples, project.folds).heads for a in ("exp001", "exp002", "exp003")
    }
    said = bank.load("blend001", "oof", project.samples, project.folds)
    assert said.fold is not None
    planted = PredictionSet(said.row.copy(), said.fold.copy(), average.apply(recipe, given), said.meta)
    bank.write(bank.folder("blend001") / "oof.arrow", planted)
    assert names(leaks()) == {"in-sample meta-model"}


def test_the_verb_says_what_it_looked_at(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(leak_audit.flips, "world", lambda seed: WORLD)
    project: Project = lay_out(empty, "binary")
    project.samples.frame["images"] = [[] for _ in range(len(project.samples.frame))]
    member(project, "exp001", marks=["selected_on_fold"])
    member(project, "exp001:greedy", seed=2, marks=["selected_on_fold"])
    member(project, "exp002", seed=3)
    declare(project, "blend001", "members: ['exp001:greedy', exp002]\nmethod: ridge")
    blending.blend("blend001")
    capsys.readouterr()
    before = {file: file.read_bytes() for file in empty.rglob("*") if file.is_file()}
    assert leak_audit.audit() == 0
    assert {f: f.read_bytes() for f in empty.rglob("*") if f.is_file()} == before, "it only looks"
    out = capsys.readouterr().out
    assert "optimistic: exp001 chose its epoch" in out and "optimistic: exp001:greedy chose" in out
    assert "optimistic: blend001 is made from exp001:greedy, which is marked selected_on_fold" in out
    assert "optimistic: exp002" not in out and "AUC that is not there" in out
    assert "not checked: runs/exp001/members/greedy/oof.arrow: it names no weights" in out
    assert "not checked: duplicates among 400 images that cannot be read: 00000.png" in out
    assert "no leaks; 4 not checked, see above" in out


WORLD = flips.world(1, rows=300)
