"""comp seed-noise, compare and tta; comparisons and plots of an ensemble."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked import TRAIN, Project, declare, lay_out, member
from PIL import Image

from comp import metrics
from comp.engine import cli
from comp.engine.bank import predictions, score
from comp.engine.bank.metric_formulas import MetricUndefined
from comp.engine.config import experiments, resolve
from comp.engine.data import make_folds, prepare, samples
from comp.engine.ensemble import comparison, plots, postprocess_selection, report
from comp.engine.ensemble.blend import blend
from comp.engine.ensemble.context import Context
from comp.engine.errors import UserError
from comp.engine.extras import compare, seed_noise, tta_search, tta_views
from comp.engine.report import html
from comp.engine.run import views as tta
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

TINY = (
    "base: exp001\naugment: {recipe: none}\ntrack: {mode: none}\nmachine: {num_workers: 0, progress: false}\n"
    "optim: {lr: 0.02}\ntrain: {epochs: 1, max_samples: 48, batch_size: 8, ema_decay: null}\n"
    "schedule: {warmup: 0}\n"
)


def few(project: Path) -> None:
    """Rows and folds enough for pairs, in a tenth of the time."""
    table = samples.load()
    rows = np.concatenate([table.positions("train")[:200], table.positions("test")[:40]])
    samples.save(table.frame.take(rows.tolist()).reset_index(drop=True), table.heads)
    file = project / "configs" / "competition.yaml"
    file.write_text(file.read_text().replace("k: 5", "k: 2"))
    make_folds.make(resolve.load(project, "base").config, samples.load(), remake=True)


def test_seeds_recipes_and_views_of_a_real_run(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tta, "VIEWS", {name: tta.VIEWS[name] for name in ("identity", "hflip", "rot90")})
    few(project)
    (project / "configs" / "tiny.yaml").write_text(TINY)
    (project / "configs" / "slow.yaml").write_text("base: tiny\noptim: {lr: 1e-3}\n")
    record = seed_noise.seed_noise("tiny", 2)
    assert record["std"] > 0 and len(record["scores"]) == 2
    weights = (paths.fold_folder("tiny-seeds", 0, 0) / "weights.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    (pair,) = compare.compare(["tiny", "slow"], 2)
    out = capsys.readouterr().out
    assert out.startswith("8 folds to train") and "(2 experiments x 2 seeds x 2 folds)" in out
    assert "accuracy OOF, mean of 2 seeds" in out and "90 % CI" in out
    assert [line for line in out.splitlines() if line.startswith("next: ")] == [out.splitlines()[-1]]
    assert (paths.fold_folder("tiny-seeds", 0, 0) / "weights.safetensors").stat().st_mtime_ns == weights, (
        "trained once"
    )
    assert pair["pairs"] == 4 and pair["low"] < pair["difference"] < pair["high"]
    assert Image.open(paths.path("runs", "comparisons", "tiny-slow.png")).size[0] > 300
    capsys.readouterr()
    scored = [
        ("tiny", {"oof": 0.5}),
        ("slow-seeds", {"oof": record["mean"] + record["std"]}),
        ("far", {"oof": 9.0}),
    ]
    out = "\n".join(seed_noise.differences(metrics.find("accuracy"), scored))
    assert (
        "within seed noise" in out
        and "far: " in out
        and "more than seed noise" in out
        and "  tiny: " not in out
    )
    assert "seed noise of tiny: ±" in out and "slow-seeds: " in out
    with pytest.raises(UserError, check=lambda error: error.code == "seeds-too-few"):
        seed_noise.seed_noise("tiny", 1)
    with pytest.raises(UserError, check=lambda error: error.code == "experiments-too-few"):
        compare.compare(["tiny", "tiny"], 2)

    record = tta_search.tta("slow-seeds")
    out = capsys.readouterr().out
    closer = {"zoom110", "zoom125", "zoom150", "crop_top_left", "crop_middle"}
    assert set(record["alone"]) >= {"identity", "hflip", "rot90", *closer}
    assert "ms per image" in out and "plain" not in out
    assert all(option["views"][0] == "identity" for option in record["options"]) and "next: comp " in out
    assert "views and space chosen on other folds: nested score " in out and [
        o["space"] for o in record["options"]
    ] == list(tta_search.SPACES)
    with pytest.raises(UserError, check=lambda error: error.code == "time-limit-too-low"):
        tta_search.tta("slow-seeds", max_ms=1e-9)
    assert experiments.stored_config("slow-seeds") == resolve.load(project, "slow").config


def test_candidate_views(project: Path) -> None:
    every = tta_views.candidate_views("light", [], None)
    assert set(every) == {*tta.VIEWS, *tta.CROPS, "light", "light2", "light3"} and every[0] == "identity"
    assert tta_views.candidate_views("light", [], "zoom110, heavy2") == [
        "identity",
        "zoom110",
        "heavy2",
    ]
    tta.views(every)


def test_views_of_several_targets(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One set of views for all runs, by the mean of their scores; an unknown view is an error before the
    first pass."""
    file = project / "configs" / "competition.yaml"
    text = (
        file.read_text()
        .replace("target: label", "target: {label: multiclass, pen: multiclass}")
        .replace("task: multiclass\n", "")
        .replace("metadata: [pen]\n", "")
    )
    file.write_text(text)
    prepare.prepare(resolve.load(project, "base").config)
    few(project)
    (project / "configs" / "tiny.yaml").write_text(TINY)
    assert cli.main(["train", "tiny"]) == 0
    capsys.readouterr()
    assert cli.main(["tta", "tiny", "--views", "hflip,zoom101"]) == 2
    assert "zoom101" in capsys.readouterr().err and not list(paths.run_folder("tiny").rglob("view-*"))
    assert cli.main(["tta", "tiny", "--views", "hflip,zoom110,light2"]) == 0
    record = artifacts.read_json(paths.run_folder("tiny") / "tta.json")
    assert list(record["alone"]) == ["identity", "hflip", "zoom110", "light2"]
    assert record["plain"] == pytest.approx(
        artifacts.read_json(paths.run_folder("tiny") / "score.json")["oof"]
    )


def test_the_gain_of_a_view_is_the_mean_over_heads() -> None:
    random = np.random.default_rng(0)
    truth = [random.integers(0, 2, 400).astype(float) for _ in range(2)]
    heads = [Head(name, "binary", (name,), (name,), ("0", "1")) for name in "ab"]
    auc = metrics.find("roc_auc")

    def seen(*noise: float) -> np.ndarray:
        return np.column_stack(
            [2 * t - 1 + random.normal(0, n, 400) for t, n in zip(truth, noise, strict=True)]
        )

    given = {"identity": seen(2, 2), "hflip": seen(2, 1.5), "vflip": seen(40, 2)}
    search = tta_search.ViewSearch(given, truth, heads, [auc, auc], ("logit",), dict.fromkeys(given, 1.0))
    assert search.search().views == ("identity", "hflip")
    both = search.average(search.search())
    assert np.allclose(both, (given["identity"] + given["hflip"]) / 2)


def test_a_difference_is_significant_only_beyond_both_errors() -> None:
    random = np.random.default_rng(0)
    clear = compare.difference(0.02 + random.normal(0, 0.005, (4, 5)))
    assert clear["significant"] and clear["text"].startswith("better by 0.0")
    noise = compare.difference(random.normal(0, 0.02, (4, 5)))
    assert not noise["significant"] and noise["text"].startswith("within noise")
    by_fold = compare.difference(np.tile([0.1, -0.05, 0.04, -0.03, 0.0], (6, 1)))
    assert not by_fold["significant"], "six seeds that agree on five folds are still five folds"


def test_views_are_searched_on_one_part_and_scored_on_another() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 600).astype(float)
    head = Head("t", "binary", ("t",), ("t",), ("0", "1"))
    good = {n: (2 * truth - 1 + random.normal(0, 2, 600))[:, None] for n in ("identity", "hflip", "vflip")}
    bad = {"rot90": random.normal(0, 5, 600)[:, None]}
    auc = metrics.find("roc_auc")
    cost = dict.fromkeys([*good, *bad], 2.0)
    search = tta_search.ViewSearch(good | bad, (truth,), (head,), (auc,), ("probability", "logit"), cost)
    assert sorted(search.search().views) == ["hflip", "identity", "vflip"]
    assert len(dataclasses.replace(search, max_ms=4.0).search().views) == 2
    dear = next(
        n for n in search.search().views if n != "identity"
    )  # gains most, and not for ten times as long
    second = dataclasses.replace(search, ms=cost | {dear: 20.0}).search().views
    assert second[1] not in ("identity", dear) and dear in second
    noise = {n: random.normal(size=(600, 1)) for n in ("identity", "hflip", "vflip", "rot90", "rot180")}
    fold = np.arange(600) % 5
    from comp.engine.bank import nested_cv

    search = tta_search.ViewSearch(
        noise, (truth,), (head,), (auc,), ("probability", "logit"), dict.fromkeys(noise, 1.0)
    )
    out = nested_cv.nested_predict(fold, search.search, search.average)
    nested, in_sample = (
        head.spec.to_probability(p)[:, 0] for p in (out.prediction, search.average(out.final))
    )
    assert auc(truth, in_sample) >= auc(truth, nested) - 0.02
    # A view whose deviation is the label cancels in one space only: the space is selected by the other folds
    # too.
    loud = {
        n: np.where(random.random(600) < 0.1, -9.0, 1.5)[:, None] * (2 * truth - 1)[:, None]
        for n in ("identity", "hflip", "vflip")
    }
    search = tta_search.ViewSearch(
        loud,
        (truth,),
        (head,),
        (metrics.find("log_loss"),),
        ("logit", "probability"),
        dict.fromkeys(loud, 1.0),
    )
    assert {
        c.space for c in nested_cv.nested_predict(fold, search.search, search.average).parameters.values()
    } == {"probability"}


def test_plots_of_an_ensemble(empty: Path) -> None:
    project: Project = lay_out(empty, "binary", metric="log_loss")
    base = empty / "configs" / "base.yaml"
    base.write_text(base.read_text().replace("mode: offline ", "mode: none "))
    for i in range(5):
        member(project, f"exp00{i + 1}", noise=1 + i / 3, seed=i)
    for text in ("method: greedy", "method: logistic", "method: weighted\nweights: [1, 2, 3, 4, 5]"):
        declare(project, "blend001", f"members: [exp001, exp002, exp003, exp004, exp005]\n{text}")
        blend("blend001")
        for file in plots.draw("blend001"):
            assert np.asarray(Image.open(file)).std() > 5, file
    report = (empty / "ensembles" / "blend001" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4
    log = [
        json.loads(line) for line in (empty / "ensembles/blend001/plots/log.jsonl").read_text().splitlines()
    ]
    assert {e["name"] for e in log if e["event"] == "image"} == set(
        plots.NAMES
    )  # W&B is fed from these lines
    (summary,) = [e["values"] for e in log if e["event"] == "summary"]
    assert summary["metric"] == "log_loss" and summary["oof"] > 0 and summary["in_sample"] is None
    assert "<td>blend001 (weighted)</td>" in report and "recommended: " in report


def test_a_page_shows_text_as_text(empty: Path) -> None:
    """Names of members, classes and trials are other people's words."""
    html.write(empty / "p.html", "<b>", ["a & b"], ["<i>"], [["<script>alert(1)</script>"]], [])
    text = (empty / "p.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "a &amp; b" in text


def test_groups_are_drawn_whole(empty: Path) -> None:
    project: Any = lay_out(empty, "binary")
    project.samples.frame["group"] = np.arange(len(project.samples.frame)) // 10
    assert score.groups_of(project.samples, np.arange(40)).max() == 3


@pytest.mark.parametrize("kind", ["targets", "graded", "samples of a row"])
def test_interval_comparison_and_gate_are_of_the_score(
    empty: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two targets by metrics of their own, outputs that the host does not score, two samples of each row."""
    monkeypatch.setattr(comparison, "RESAMPLES", 40)
    project: Any = lay_out(empty, "binary")
    table, cfg, random = project.samples, project.cfg, np.random.default_rng(0)
    column, heads = table.frame["target.label"], table.heads
    if kind == "targets":
        table.frame["target.kind"] = random.integers(0, 3, len(table.frame)).astype(float)
        heads = (*heads, Head("kind", "multiclass", tuple("abc"), ("target.kind",), tuple("abc")))
        each: dict[str, Any] = {"task": None, "target": {"label": "binary", "kind": "multiclass"}}
        cfg = in_competition(cfg, metric={"label": "roc_auc", "kind": "accuracy"}, **each)
    elif kind == "graded":
        table.frame["target.other"] = random.integers(0, 2, len(table.frame)).astype(float)
        columns = ("target.label", "target.other")
        heads = (Head("label", "multilabel", columns, columns, graded=("target.label",)),)
        each = {"task": "multilabel", "target": ["label", "other"]}
        cfg = in_competition(cfg, metric="mean_column_auc", **each)
    else:  # as in ten lines of five folds: i and i + 5 are one row
        at = np.arange(len(table.frame))
        table.frame["row"] = [f"{i // 10}_{i % 5}" for i in at]
        table.frame["target.label"] = column.to_numpy()[at - at % 10 + at % 5]
    table = dataclasses.replace(table, heads=heads)
    sets: list[Any] = []
    for noise in (2.0, 4.0):
        values = {}
        for head in heads:
            truth = table.targets(head)[:TRAIN]
            wide = np.eye(3)[truth[:, 0].astype(int)] if head.task == "multiclass" else truth
            values[head.name] = (2 * wide - 1 + random.normal(0, noise, wide.shape)).astype(np.float32)
        fold = project.folds.assignment[0][:TRAIN].astype(np.int16)
        meta = predictions.build_meta("oof", table, project.folds, {})
        sets.append(predictions.PredictionSet(np.arange(TRAIN, dtype=np.int32), fold, values, meta))
    ours, theirs = (score.evaluate(cfg, table, project.folds, each)["oof"] for each in sets)
    found = comparison.compare(cfg, table, project.folds, sets[0], {"it": sets[1]})
    assert found["against"]["it"]["difference"] == pytest.approx(ours - theirs, abs=1e-12)
    assert found["interval"]["low"] < ours < found["interval"]["high"]
    rows = sets[0].row.astype(np.int64)
    fold = sets[0].fold.astype(np.int64)
    context = Context(cfg, table, project.folds, None, rows, fold, {})  # type: ignore[arg-type]
    gate = [
        postprocess_selection.measure_gain(context, h, sets[1].heads[h.name], sets[0].heads[h.name], rows)
        for h in heads
    ]
    assert np.mean([gain.with_step for gain in gate]) == pytest.approx(ours, abs=1e-12)
    assert np.mean([gain.before for gain in gate]) == pytest.approx(theirs, abs=1e-12)
    from comp.engine.deliver import shake_up

    sent = shake_up.comparison.mean_scorer(
        cfg, table, project.folds, sets[0], sets[0].predicted, score.scored_rows(table, rows, fold)
    )
    assert sent(np.ones(len(shake_up._oof_rows(table, project.folds)[0]), np.int64)) == pytest.approx(
        ours, abs=1e-12
    )


def in_competition(cfg: Any, **changed: Any) -> Any:
    return cfg.model_copy(update={"competition": cfg.competition.model_copy(update=changed)})


def test_without_a_comparison_the_scores_decide_and_the_reason_is_said(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = lay_out(empty, "binary")
    for i, noise in enumerate((0.5, 9.0)):
        member(project, f"exp00{i + 1}", noise=noise, seed=i)

    def never(*_: Any) -> Any:
        raise MetricUndefined("there is only one group")

    monkeypatch.setattr(comparison, "_resampled_scores", never)
    declare(project, "blend001", "members: [exp001, exp002]\nmethod: weighted\nweights: [1, 30]")
    record = blend("blend001")
    out = capsys.readouterr().out
    assert record["against"] == {} and record["oof"] < record["members"][0]["oof"]
    assert "no interval and no comparison: there is only one group" in out
    assert "recommended: the best member exp001, which is simpler" in out


@pytest.mark.parametrize(
    ("significant", "start"), [(True, "recommended: b"), (False, "recommended: m; within noise")]
)
def test_what_is_within_noise_is_not_recommended(significant: bool, start: str) -> None:
    record = {"direction": "max", "oof": 0.9, "against": {"m": {"score": 0.89, "significant": significant}}}
    assert report.recommendation("b", record).startswith(start)
