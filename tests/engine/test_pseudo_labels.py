"""comp pseudo: each fold is trained on pseudo-labels of its own models only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import banked
import numpy as np
import pandas as pd
import pytest
from banked import run, said
from conftest import config
from safetensors.torch import load_file, save_file
from test_target_scaler import declare_values

from comp import models
from comp.engine.bank import bank
from comp.engine.config import experiments
from comp.engine.data import folds, make_folds, prepare, samples
from comp.engine.ensemble import blend
from comp.engine.errors import UserError
from comp.engine.extras import audit_pseudo, audit_runs, audit_statistics, pseudo_labels
from comp.engine.extras.findings import Finding, Leak, NotChecked
from comp.engine.extras.pseudo_labels import Selection
from comp.engine.run import (
    loading,
    model_selection,
    pixel_stats,
    pretrained,
    pseudo_rows,
    runner,
    target_scaler,
    tracking,
)
from comp.engine.store import artifacts, paths

CONFIDENT = Selection(None, None, False, 1.0)


def written(source: str = "exp001", selection: Selection = CONFIDENT) -> pd.DataFrame:
    pseudo_labels.write(source, source, selection)
    return pseudo_rows.read(source)


def test_pseudo_labels_of_a_fold_depend_on_its_own_models_only(empty: Path) -> None:
    """Predictions of fold 2 change the labels of fold 2 and of the refit on all data, and no others."""
    project = banked.lay_out(empty)
    run(project, "exp001")
    before = written(selection=Selection(0.6, None, False, 1.0))
    assert set(before["fold"]) == {*range(5), pseudo_rows.FULL}
    said(project, "exp001", 0, 2, 77)
    after = written(selection=Selection(0.6, None, False, 1.0))
    moved = [
        n
        for n in (*range(5), -1)
        if not before[before["fold"] == n]
        .reset_index(drop=True)
        .equals(after[after["fold"] == n].reset_index(drop=True))
    ]
    assert moved == [2, -1]


def test_a_fold_gets_its_own_rows_and_is_scored_on_the_same_rows(empty: Path) -> None:
    project = banked.lay_out(empty)
    run(project, "exp001")
    lines = written(selection=Selection(0.6, None, False, 0.5))
    for number in (*range(5), "full"):
        more = pseudo_rows.add_rows(project.samples, lines, "exp001", number)
        split = folds.Folds(project.folds.frame, project.folds.meta, more)
        (before, scored), (after, still) = project.folds.split(number), split.split(number)
        new = np.setdiff1d(after, before)
        mine = lines[lines["fold"] == (pseudo_rows.FULL if number == "full" else number)]
        assert set(before) <= set(after) and np.array_equal(scored, still)
        assert more.hash == project.samples.hash
        assert more.frame["id"].iloc[new].tolist() == sorted(mine["id"]) and len(new) == len(mine) > 20
        assert set(more.frame["source"].iloc[new]) == {f"pseudo:exp001:fold{number}"}
        assert (more.frame["weight"].iloc[new] == 0.5).all() and (
            more.frame["weight"].iloc[before] == 1
        ).all()
        given = mine.set_index("id")["target.label"].loc[more.frame["id"].iloc[new]]
        assert np.array_equal(more.targets(project.head)[new, 0], given)
        assert not np.isin(split.inner_split(number, 0.2)[1], new).any(), (
            "nothing is chosen on labels that were made"
        )
    assert (project.samples.frame["source"].iloc[new] == "test").all(), (
        "the samples themselves are as they were"
    )


def test_the_most_confident_rows_of_each_class_are_taken(empty: Path) -> None:
    project = banked.lay_out(empty)
    run(project, "exp001")
    mean = bank.read(paths.fold_folder("exp001", 0, 3) / "test.arrow", project.samples, project.folds)
    p = mean.probability(project.head)
    sure = written()
    assert (
        sorted(sure.loc[sure["fold"] == 3, "id"])
        == project.samples.frame["id"].iloc[mean.row[p.max(1) >= 0.9]].tolist()
    )
    share = written(selection=Selection(None, 0.25, False, 1.0))
    for code, name in enumerate(banked.CLASSES):
        mine = np.flatnonzero(p.argmax(1) == code)
        best = mine[np.argsort(-p[mine].max(1))][: round(0.25 * len(mine))]
        taken = share[(share["fold"] == 3) & (share["label"] == name)]
        assert set(taken["id"]) == set(project.samples.frame["id"].iloc[mean.row[best]])
    with pytest.raises(UserError, match=r"fold 0: .* 0.9999, the highest is 0.\d+; --confidence"):
        written(selection=Selection(0.9999, None, False, 1.0))


def test_soft_labels_are_a_share_per_class(empty: Path) -> None:
    project = banked.lay_out(empty)
    run(project, "exp001")
    lines = written(selection=Selection(0.6, None, True, 1.0))
    more = pseudo_rows.add_rows(project.samples, lines, "exp001", 1)
    target = pseudo_rows.training_target(more, project.head)
    mine = lines[lines["fold"] == 1].set_index("id")
    at = np.flatnonzero(more.frame["id"].isin(mine.index))
    own = project.folds.split(1)[0]
    assert target.shape == (len(more.frame), 3)
    assert np.array_equal(target[own], np.eye(3)[project.samples.truth(project.head, own)])
    assert target[at].max(1) == pytest.approx(mine["confidence"].to_numpy()) and target[at].max() < 1
    assert target[at].sum(1) == pytest.approx(1.0)
    hard = pseudo_rows.training_target(project.samples, project.head)
    assert hard.ndim == 1, "without soft labels the loss takes codes, as ever"


@pytest.mark.parametrize("task", ["binary", "multilabel", "ordinal", "regression"])
def test_other_tasks(empty: Path, task: str) -> None:
    project = banked.lay_out(empty, task)
    run(project, "exp001", seeds=2)
    lines = written(selection=Selection(None, 0.3, False, 1.0))
    columns = list(project.head.columns)
    if task == "regression":
        both = [
            bank.read(paths.fold_folder("exp001", s, 0) / "test.arrow", project.samples, project.folds)
            for s in (0, 1)
        ]
        a, b = (each.heads["label"][:, 0] for each in both)
        near = np.argsort(np.abs(a - b))[: round(0.3 * len(a))]
        mine = lines[lines["fold"] == 0].set_index("id")["target.label"]
        ids = project.samples.frame["id"].to_numpy()[both[0].row[near]]
        assert set(mine.index) == set(ids), "values that the seeds agree on"
        assert mine.loc[ids].to_numpy() == pytest.approx((a + b)[near] / 2, abs=1e-6)
    else:
        values = lines[columns].to_numpy()
        assert np.array_equal(values, np.rint(values)) and values.min() >= 0
    more = pseudo_rows.add_rows(project.samples, lines, "exp001", 0)
    assert not np.isnan(
        more.targets(project.head)[folds.Folds(project.folds.frame, project.folds.meta, more).split(0)[0]]
    ).any()


def test_confidence_of_values_needs_several_models(empty: Path) -> None:
    run(banked.lay_out(empty, "regression"), "exp001")
    with pytest.raises(UserError, match="comp train RUN --seed 1"):
        written()
    assert len(written(selection=Selection(None, 1.0, False, 1.0))) == 6 * banked.TEST
    with pytest.raises(
        UserError, check=lambda error: error.code == "option-unused" and error.where == "--soft"
    ):
        written(selection=Selection(None, 1.0, True, 1.0))


def test_teachers_fitted_on_scored_rows_are_errors(empty: Path) -> None:
    project = banked.lay_out(empty)
    run(project, "exp001")
    for name, method, more in (("fitted", "logistic", "members"), ("after", "mean", "after")):
        folder = paths.ensemble_folder(name)
        artifacts.write_json(folder / "apply.json", {"members": [], "space": "logit", more: []})
        artifacts.write_json(folder / "score.json", {"method": method})
        artifacts.add_to_manifest(folder / "apply.json", folder / "score.json")
        with pytest.raises(UserError, match=rf"{name} is fitted \({method}\)") as caught:
            written(name)
        assert (caught.value.code, caught.value.key) == ("teacher-leaks", "comp pseudo")
    with pytest.raises(UserError, match=r"exp001:full was trained .*; take exp001") as caught:
        written("exp001:full")
    assert caught.value.code == "teacher-leaks"
    with pytest.raises(UserError, match="no such run or ensemble; the nearest are exp001"):
        written("exp01")
    picks = config("select.name=best", "select.on=fold", "train.ema_decay=null", experiment="base")
    run(project, "picked", cfg=picks)
    with pytest.raises(UserError, match="picked is selected_on_fold"):
        written("picked")
    run(project, "elsewhere", folds="others")
    with pytest.raises(UserError, match="trained on other folds"):
        written("elsewhere")


def test_a_plain_average_labels_with_the_mean_of_its_runs(empty: Path) -> None:
    project = banked.lay_out(empty)
    for seed, name in enumerate(("exp002", "exp003")):
        banked.member(project, name, seed=seed)
        run(project, name)
        said(project, name, 0, 1, 50 + seed)
    banked.declare(project, "mean", "members: [exp002, exp003]\nmethod: mean")
    blend.blend("mean")
    lines = written("mean", Selection(None, 1.0, True, 1.0))
    p = [
        bank.read(paths.fold_folder(n, 0, 1) / "test.arrow", project.samples, project.folds).probability(
            project.head
        )
        for n in ("exp002", "exp003")
    ]
    mine = lines[lines["fold"] == 1].set_index("id").sort_index()
    assert mine[pseudo_rows.soft_columns(project.head)].to_numpy() == pytest.approx(
        (p[0] + p[1]) / 2, abs=1e-6
    )


def resealed(change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """A changed table with a valid manifest entry."""
    file = paths.pseudo_file("exp001")
    facts = {k: v for k, v in (artifacts.manifest_entry(file) or {}).items() if k not in ("sha256", "size")}
    change(pseudo_rows.read("exp001")).to_parquet(file, index=False)
    artifacts.add_to_manifest(file, **facts)


def test_the_audit_recomputes_the_labels(empty: Path) -> None:
    project = banked.lay_out(empty)
    run(project, "exp001")
    written()
    cfg = config("data.pseudo_labels=exp001", experiment="base")

    def found() -> list[str]:
        run(project, "exp002", cfg=cfg)
        return [each[0] for each in audit_pseudo.leaks("exp002", cfg, project.samples, project.folds)]

    assert found() == []
    original = pseudo_rows.read("exp001")

    def of_all(lines: pd.DataFrame) -> pd.DataFrame:
        """As a careless script would: the mean of all folds' models labels the rows once, for every fold."""
        return pd.concat([lines[lines["fold"] == -1].assign(fold=n) for n in (*range(5), -1)])

    resealed(of_all)
    assert found() == ["pseudo-labels from models trained on the fold"] * 5
    resealed(lambda lines: original.assign(fold=original["fold"].replace({0: 1, 1: 0})))
    assert found() == ["pseudo-labels from models trained on the fold"] * 2
    resealed(lambda lines: original.assign(**{"target.label": 0.0}))
    assert set(found()) == {"pseudo-labels that differ from those of their models"}


QUIET = ["track=none", "machine.num_workers=0", "machine.progress=false", "train.ema_decay=null", "train.epochs=1", "schedule.warmup=0", "train.batch_size=64", "augment=none"]  # fmt: skip


def test_training_uses_the_pseudo_labelled_rows(project: Path) -> None:
    digits = banked.digits(project)
    run(digits, "teacher")
    pseudo_labels.write("teacher", "teacher", Selection(None, 0.2, False, 1.0))
    runner.train("exp001", [*QUIET, "data.pseudo_labels=teacher"], fold="1", name="taught")
    (epoch,) = [
        line for line in tracking.read(paths.fold_folder("taught", 0, 1) / "log.jsonl") if "epoch" in line
    ]
    lines = pseudo_rows.read("teacher")
    drawn = len(digits.folds.split(1)[0]) + (lines["fold"] == 1).sum()
    assert epoch["step"] == drawn // 64 > len(digits.folds.split(1)[0]) // 64
    oof = bank.read(paths.fold_folder("taught", 0, 1) / "oof.arrow", digits.samples, digits.folds)
    test = bank.read(paths.fold_folder("taught", 0, 1) / "test.arrow", digits.samples, digits.folds)
    assert np.array_equal(oof.row, digits.folds.split(1)[1]) and oof.predicted.all()
    assert np.array_equal(test.row, digits.samples.positions("test"))
    pseudo_labels.write("teacher", "teacher", Selection(None, 0.1, False, 1.0))
    with pytest.raises(UserError, match=r"trained with another data/pseudo/teacher.parquet"):
        runner.train("exp001", [*QUIET, "data.pseudo_labels=teacher"], fold="2", name="taught")
    with pytest.raises(
        UserError,
        match=r"data/pseudo/techer.parquet: data.pseudo_labels: no such table; the nearest are teacher",
    ):
        runner.train("exp001", [*QUIET, "data.pseudo_labels=techer"], name="other")


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_the_audit_includes_pseudo_labelled_rows_in_statistics(project: Path, task: str) -> None:
    """Pixel and target statistics stored with the weights are those of all training rows of the fold."""
    if task == "regression":
        declare_values(project, 1000.0, 9500.0)
    digits = banked.digits(project)
    run(digits, "teacher", seeds=2)
    pseudo_labels.write("teacher", "teacher", Selection(None, 0.5, False, 1.0))
    runner.train(
        "exp001",
        [*QUIET, "data.pseudo_labels=teacher", "data.normalize=data", "data.size=8"],
        fold="1",
        name="taught",
    )

    def found() -> list[Finding]:
        return audit_runs.of_run("taught", samples.load(), digits.folds)

    assert found() == []
    place = paths.fold_folder("taught", 0, 1)
    file, context = place / bank.WEIGHTS, loading.load_context(experiments.stored_config("taught"))
    right = load_file(file)
    assert "pixel_mean" in right and ("target_mean" in right) == (task == "regression")
    # What the labelled rows of this fold are measured without, or of more than the training part, is still
    # found.
    _, scored = context.folds.split(1)
    joined = pseudo_rows.fold_context(context, 1)
    own = model_selection.fold_rows(joined, 1)[0]
    for rows, what in (
        (context.folds.split(1)[0], "statistics that differ from those of the training rows"),
        (np.union1d(own, scored), "statistics fitted on validation rows"),
    ):
        module = models.build(context.cfg, context.samples.heads, pretrained=False, loader=context.loader)
        pixel_stats.fit_pixel_stats(context.cfg, module, context.loader, rows)
        target_scaler.fit(context.cfg, module, joined.samples, rows)
        measured = {n: v for n, v in module.state_dict().items() if n in pretrained.FOLD_STATISTICS}
        save_file(right | measured, file)
        artifacts.add_to_manifest(file)
        assert [(type(each), each[0]) for each in audit_statistics.leaks(context, [file])] == [(Leak, what)]
    save_file(right, file)
    artifacts.add_to_manifest(file)
    assert found() == []

    # A damaged, replaced or deleted table of pseudo-labels is not a leak.
    table = paths.pseudo_file("teacher")

    def damage() -> None:
        table.write_bytes(table.read_bytes()[:-1] + b"x")

    for change, why in (
        (damage, "damaged"),
        (
            lambda: pseudo_labels.write("teacher", "teacher", Selection(None, 0.3, False, 1.0)),
            "is gone or changed since the training",
        ),
        (table.unlink, "is gone or changed since the training"),
    ):
        change()
        unseen = found()
        assert [(type(each), each[0]) for each in unseen] == [
            (NotChecked, "taught, its pseudo-labels"),
            (NotChecked, "taught, its statistics"),
        ]
        assert all(each[1].startswith("data/pseudo/teacher.parquet") and why in each[1] for each in unseen)


def test_a_short_run_uses_some_of_them(empty: Path) -> None:
    project = banked.lay_out(empty)
    run(project, "exp001")
    more = pseudo_rows.add_rows(
        project.samples, written(selection=Selection(0.6, None, False, 1.0)), "exp001", 2
    )
    train_rows = folds.Folds(project.folds.frame, project.folds.meta, more).split(2)[0]
    few = model_selection.limit_rows(train_rows, more, 40)
    assert (
        (more.frame["source"].iloc[few] == "train").sum() == 30
        and len(few) == 40
        and (np.diff(few) > 0).all()
    )
    assert np.array_equal(model_selection.limit_rows(train_rows, more, None), train_rows)
    own = project.folds.split(2)[0]
    assert np.array_equal(model_selection.limit_rows(own, project.samples, 40), own[:40])


def test_extra_rows_train_every_fold_by_their_weight(project: Path) -> None:
    """Extra images that are all labelled 3: with weight 1 the network learns it, with weight 0 it does not.
    No training row has these images, or its fold would not be trained on them."""
    raw, file = project / "data/raw", project / "configs/competition.yaml"
    own = pd.read_csv(raw / "train.csv", dtype=str).head(160)
    others = pd.read_csv(raw / "test.csv", dtype=str)["id"].head(160)
    file.write_text(file.read_text() + 'weight: trust\nextra: [{table: extra.csv, image: "test/{id}.png"}]\n')
    called = {}
    for weight in ("0", "1"):
        own.assign(trust="1").to_csv(raw / "train.csv", index=False)
        own.assign(id=others, label="3", trust=weight, writer="somebody else").to_csv(
            raw / "extra.csv", index=False
        )
        cfg = config()
        prepare.prepare(cfg)
        table = samples.load()
        make_folds.make(cfg, table, remake=True)
        split, extra = folds.load(table), table.positions("extra")
        assert len(extra) == 160 and set(table.frame["weight"].iloc[extra]) == {float(weight)}
        for number in range(5):
            train_rows, scored = split.split(number)
            assert set(extra) <= set(train_rows) and not set(extra) & set(scored)
        runner.train(
            "exp001", [*QUIET, "train.batch_size=16", "train.epochs=2"], fold="1", name=f"weight{weight}"
        )
        oof = bank.read(paths.fold_folder(f"weight{weight}", 0, 1) / "oof.arrow", table, split)
        called[weight] = (oof.heads["label"].argmax(1) == 3).mean()
    assert called["1"] > 0.6 > 0.4 > called["0"]
