"""Retrieval: margin losses and nearest neighbors against formulas, and a competition from training to
kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import config
from torch.nn import functional as F

from comp import metrics, models, predict
from comp.engine.bank import bank, thresholds
from comp.engine.data import folds, make_folds, prepare, samples
from comp.engine.deliver import dry_run, kernel, kernel_inputs, kernel_models, kernel_predict, wheels
from comp.engine.ensemble.blend import blend
from comp.engine.errors import UserError
from comp.engine.run import knn, loading, metric_learning, predict_run, runner
from comp.engine.store import artifacts, paths
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import Head

Z = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
CODES = torch.tensor([0, 0, 1, 1, 2, 0])
HEAD = Head("Id", "retrieval", tuple("abcd"), ("target.Id",), tuple("abcd"))


# --- losses -------------------------------------------------------------------------------------------------


def test_arcface_is_cross_entropy_of_pushed_angles() -> None:
    cosine = torch.tensor([[0.6, 0.2, -0.4], [0.1, 0.9, 0.3]])
    output, target = torch.cat([torch.zeros(2, 4), cosine], 1), torch.tensor([0, 2])
    ours = metric_learning.arcface(output, target, torch.tensor([0.5, 0.2, 0.3]), 10.0, 4)
    pushed = cosine.clone()
    pushed[0, 0] = np.cos(np.arccos(0.6) + 0.5)
    pushed[1, 2] = np.cos(np.arccos(0.3) + 0.3)
    assert ours.tolist() == pytest.approx(
        F.cross_entropy(10 * pushed, target, reduction="none").tolist(), rel=1e-5
    )
    plain = metric_learning.arcface(output, target, torch.zeros(3), 10.0, 4)
    assert plain.tolist() == pytest.approx(
        F.cross_entropy(10 * cosine, target, reduction="none").tolist(), rel=1e-5
    )
    soft = metric_learning.arcface(
        output, F.one_hot(target, 3).float(), torch.tensor([0.5, 0.2, 0.3]), 10.0, 4
    )
    assert torch.equal(ours, soft)


def test_the_rarest_class_has_the_widest_margin() -> None:
    found = metric_learning.class_margins(np.array([16.0, 1, 256, 0]), 0.2, 0.8)
    inner = (16**-0.25 - 256**-0.25) / (1 - 256**-0.25)
    assert found[:3].tolist() == pytest.approx([0.2 + 0.6 * inner, 0.8, 0.2])
    assert metric_learning.class_margins(np.array([3.0, 1]), 0.3, None).tolist() == pytest.approx([0.3, 0.3])


def test_pair_losses_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    d = torch.cdist(Z, Z)
    wanted_pairs, wanted_triples = [], []
    for i in range(6):
        terms = [
            float(d[i, j]) ** 2 if CODES[i] == CODES[j] else max(0.0, 1.2 - float(d[i, j])) ** 2
            for j in range(6)
            if j != i
        ]
        wanted_pairs.append(sum(terms) / 5)
        own = [float(d[i, j]) for j in range(6) if j != i and CODES[i] == CODES[j]]
        other = [float(d[i, j]) for j in range(6) if CODES[i] != CODES[j]]
        wanted_triples.append(max(0.0, max(own) - min(other) + 0.3) if own else 0.0)
    assert metric_learning.contrastive(Z, CODES, 1.2, 4).tolist() == pytest.approx(wanted_pairs, rel=1e-3)
    assert metric_learning.triplet(Z, CODES, 0.3, 4).tolist() == pytest.approx(
        wanted_triples, rel=1e-3, abs=1e-4
    )
    whole = [loss(Z, CODES, 0.9, 4) for loss in (metric_learning.contrastive, metric_learning.triplet)]
    monkeypatch.setattr(metric_learning, "AT_ONCE", 4)
    parts = [loss(Z, CODES, 0.9, 4) for loss in (metric_learning.contrastive, metric_learning.triplet)]
    assert torch.allclose(torch.stack(whole), torch.stack(parts), atol=1e-6)
    with pytest.raises(UserError, match="mixed images have two"):
        metric_learning.triplet(Z, F.one_hot(CODES).float(), 0.3, 4)


def test_a_class_has_the_nearest_of_its_centres() -> None:
    last = metric_learning.EmbeddingLayer(5, 4, classes=3, sub_centers=2)
    out = last(torch.randn(7, 5))
    assert out.shape == (7, 4 + 3) and out[:, :4].norm(dim=1).tolist() == pytest.approx([1.0] * 7)
    assert last.centers is not None
    cosine = F.cosine_similarity(out[:, None, :4], last.centers[None], dim=2).view(7, 3, 2)
    assert out[:, 4:].tolist() == [pytest.approx(row, abs=1e-5) for row in cosine.amax(2).tolist()]


# --- pooling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_gem_lies_between_mean_and_max(empty: Path, name: str) -> None:
    cfg = config("model.global_pool=gem", f"model.name={name}")
    module = models.build(
        cfg, (Head("x", "multiclass", tuple("ab"), ("t",), tuple("ab")),), pretrained=False
    ).eval()
    gem: Any = module.backbone
    images = torch.randn(2, 1, 64, 64)
    fmap = gem.backbone(images)
    fmap = fmap if fmap.shape[1] == gem.features else fmap.permute(0, 3, 1, 2)
    assert module(images).shape == (2, 2)
    positive = fmap.clamp(min=1e-6)
    cubic: torch.Tensor = (positive**3).mean((2, 3)) ** (1 / 3)
    for p, wanted in ((1.0, positive.mean((2, 3))), (3.0, cubic)):
        with torch.no_grad():
            gem.p.fill_(p)
        assert gem(images).detach().numpy() == pytest.approx(wanted.detach().numpy(), rel=1e-4, abs=1e-6)


def test_gem_of_a_model_without_a_feature_map_is_refused(empty: Path) -> None:
    cfg = config("model.global_pool=gem", "model.name=test_vit", "data.size=160")
    module = models.build(cfg, (Head("x", "multiclass", tuple("ab"), ("t",), tuple("ab")),), pretrained=False)
    with pytest.raises(UserError, match=r"model.global_pool: gem .*test_vit"):
        module(torch.randn(2, 1, 160, 160))


def test_attention_is_a_weighted_mean_of_the_images_of_a_sample() -> None:
    heard, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
    out = models.attention_pool(x, torch.tensor([0, 0, 1, 2, 2]), heard)
    wanted = [
        (heard(x[part]).softmax(0) * x[part]).sum(0) for part in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    assert out.detach().numpy() == pytest.approx(torch.stack(wanted).detach().numpy(), rel=1e-5)


# --- neighbours ---------------------------------------------------------------------------------------------


def test_the_nearest_vote_and_other_classes_rank_behind() -> None:
    angle = np.deg2rad([0, 10, 20, 40, 90])
    gallery = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    codes = np.array([0, 1, 1, 2, 2])  # class d has no training rows
    asked = np.array([[1.0, 0.0]], np.float32)
    predicted = knn.class_scores(asked, gallery, codes, HEAD, 3, torch.device("cpu"))[0]
    vote = np.exp(20 * (np.cos(angle) - 1))
    weights = np.array([vote[0], vote[1] + vote[2], vote[3], np.exp(-40)])
    assert np.exp(predicted) == pytest.approx(weights / weights.sum(), rel=1e-4)
    one = knn.class_scores(asked, gallery, codes, HEAD, 1, torch.device("cpu"))[0]
    assert one[1] - one[0] == pytest.approx(20 * (np.cos(angle[1]) - 1), rel=1e-4)


def test_embeddings_of_views_are_averaged_and_normalized() -> None:
    views = np.stack([np.eye(2, 5), np.eye(2, 5, k=1)]).astype(
        np.float32
    )  # outputs beyond the embedding are left out
    assert knn.mean_embedding(views, 3) == pytest.approx(
        np.array([[1, 1, 0], [0, 1, 1]]) / np.sqrt(2), abs=1e-6
    )


def test_the_threshold_of_the_unknown_class_is_fitted_exactly() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(6), 200)
    truth = np.where(p[:, :5].max(axis=1) < 0.35, 5, p[:, :5].argmax(axis=1))
    metric = metrics.find("map@5")
    shift = thresholds.fit_unknown(p, truth, 5, metric, 100)

    def score(shift: float) -> float:
        moved = np.log(p) + np.array([0, 0, 0, 0, 0, shift])
        return metric(truth, np.argsort(-moved, axis=1))

    ranking = thresholds.with_unknown(p, 5, shift, 100)
    assert sorted(map(tuple, np.sort(ranking, axis=1).tolist())) == [(0, 1, 2, 3, 4, 5)] * 200
    assert metric(truth, ranking) == pytest.approx(score(shift))
    assert score(shift) >= max(score(s) for s in np.linspace(-8, 8, 400)) - 0.005
    assert score(shift) > score(0.0) and score(shift) > score(-50.0)


# --- the whole road -----------------------------------------------------------------------------------------

COMPETITION = """
slug: tails
title: Tails
raw: data/raw
train: {table: train.csv, image: "train/{Image}"}
test: {table: sample.csv, image: "test/{Image}"}
id: Image
target: Id
task: retrieval
unknown: new
metric: map@5
folds: {scheme: stratified, k: 2, seed: 0}
submission: {sample: sample.csv, form: ranking, k: 5}
"""
TINY = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "data.size=32", "data.channels=3", "model.name=test_resnet",
    "model.pretrained=false", "augment.recipe=none", "train.epochs=10", "train.batch_size=16", "optim.lr=5e-3",
    "train.ema_decay=null", "model.global_pool=gem", "model.embedding_size=32",
]  # fmt: skip


def image(random: np.random.Generator, who: int | None) -> np.ndarray:
    """Each animal has two colours and a stripe; an unknown one has its own."""
    own = np.random.default_rng(who) if who is not None else random
    ground, stripe, place = own.integers(0, 256, 3), own.integers(0, 256, 3), int(own.integers(4, 24))
    out = np.broadcast_to(ground, (32, 32, 3)).astype(np.float64).copy()
    out[place : place + 5] = stripe
    return np.clip(out + random.normal(0, 12, out.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def tails(empty: Path) -> tuple[Path, dict[str, str]]:
    import cv2

    random = np.random.default_rng(5)
    raw, answers = empty / "data/raw", {}
    for kind, each in (("train", 8), ("test", 2)):
        (raw / kind).mkdir(parents=True)
        rows = [f"w{who}" for who in range(8) for _ in range(each)] + ["new"] * (16 if kind == "train" else 6)
        names = [f"{kind}{i:03d}.png" for i in range(len(rows))]
        for name, label in zip(names, rows, strict=True):
            cv2.imwrite(
                str(raw / kind / name), image(random, None if label == "new" else int(label[1:]) + 100)
            )
        table = pd.DataFrame({"Image": names, "Id": rows})
        if kind == "test":
            answers = dict(zip(names, rows, strict=True))
            table["Id"] = "new w0 w1 w2 w3"
        table.to_csv(raw / ("train.csv" if kind == "train" else "sample.csv"), index=False)
    (empty / "configs/competition.yaml").write_text(COMPETITION)
    cfg = config(experiment="base")
    prepare.prepare(cfg)
    make_folds.make(cfg, samples.load())
    return empty, answers


def map_at_5(file: Path, answers: dict[str, str]) -> float:
    predicted = pd.read_csv(file, dtype=str)
    ranks = [
        row.split().index(answers[i]) if answers[i] in row.split() else None
        for i, row in zip(predicted["Image"], predicted["Id"], strict=True)
    ]
    return float(np.mean([0 if rank is None else 1 / (rank + 1) for rank in ranks]))


def test_from_training_to_the_kernel(
    tails: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, answers = tails
    cfg = config(*TINY)
    run = [*TINY, "loss.margin_rare=0.5", "loss.sub_centers=2"]
    runner.train("exp001", run, name="x")
    runner.train(
        "exp001", [*TINY, "loss=triplet", "sampling.m_per_class=4", "predict.n_neighbors=3"], name="y"
    )
    table = samples.load()
    split = folds.load(table)
    head = table.heads[0]
    assert head.unknown == "new" and head.outputs[-1] != "" and len(head.outputs) == 9
    for name in ("x", "y"):
        record = artifacts.read_json(root / "runs" / name / "score.json")
        assert record["metric"] == "map@5" and record["n"] == 2 and record["oof"] > 0.75, record
        assert len(record["cuts"]["Id"]) == 1
    # the gallery is of the fold's own training rows, and of none that it is scored on, none that are unknown
    unknown = head.classes.index("new")
    for number in range(2):
        weights = paths.fold_folder("x", 0, number) / "weights.safetensors"
        held, codes = knn.read(knn.gallery_file(weights))
        train_rows, scored = split.split(number)
        own = table.truth(head, train_rows)
        assert codes.tolist() == own[own != unknown].tolist() and not set(train_rows) & set(scored)
        assert np.linalg.norm(held, axis=1) == pytest.approx(np.ones(len(held)), abs=1e-5)
    # views: the normalised embeddings are averaged, then asked
    predict_run.predict("x", tta="identity,hflip")
    under_two = bank.load("x:tta-identity-hflip", "oof", table, split)
    weights, scored = paths.fold_folder("x", 0, 1) / "weights.safetensors", split.split(1)[1]
    size = loss_knobs.metric_learning_loss(config(*run), table.heads).knobs["embedding"]  # type: ignore[union-attr]
    seen = [
        predict.forward(loading.load_context(config(*run, f"predict.tta=[{view}]")), weights, scored, "")[0][
            0, :, :size
        ]
        for view in ("identity", "hflip")
    ]
    assert all(np.linalg.norm(each, axis=1) == pytest.approx(np.ones(len(scored)), abs=1e-4) for each in seen)
    mean = (seen[0] + seen[1]) / np.linalg.norm(seen[0] + seen[1], axis=1, keepdims=True)
    gallery = knn.read(knn.gallery_file(weights))
    by_hand = knn.class_scores(mean, *gallery, head, loss_knobs.N_NEIGHBORS, torch.device("cpu"))
    assert under_two.heads["Id"][np.isin(under_two.row, scored)] == pytest.approx(by_hand, abs=1e-3)
    alone = bank.load("x", "oof", table, split).heads["Id"][np.isin(under_two.row, scored)]
    assert not np.allclose(alone, by_hand, atol=1e-3)
    # a blend, and a submission in the host's form
    (root / "configs/ensembles/b.yaml").write_text("members: [x, y]\nmethod: mean\n")
    blend("b")
    for name in ("x", "b"):
        dry_run.write(name)
        assert map_at_5(root / f"submissions/{name}.csv", answers) > 0.7
    # the same from what a kernel carries, with nothing of the project beside it
    monkeypatch.setattr(wheels, "of_imports", list)
    bundle = kernel.build("b") / "bundle"
    stored, submitted = bank.load("b", "test", table, split), (root / "submissions/b.csv").read_bytes()
    (root / "runs").rename(root / "gone")
    monkeypatch.setenv("COMP_ROOT", str(bundle))
    paths.root.cache_clear()
    about = artifacts.read_json(bundle / "bundle.json")
    home = cfg.competition.model_copy(update={"raw": str(root / "data/raw")})
    hidden = kernel_inputs.test_rows(
        cfg.model_copy(update={"competition": home}),
        (kernel_inputs.head_of(about["heads"][0]),),
        about["multi_image"],
    )
    rows = hidden.positions("test")
    predicted, damaged, _ = kernel_models.predict_runs(about, home, hidden, rows)
    assert not damaged
    there = kernel_predict.blend("b", predicted, hidden.frame.iloc[rows])
    assert there["Id"] == pytest.approx(stored.heads["Id"], abs=1e-4)
    at_home = cfg.model_copy(update={"competition": home})
    assert kernel_predict.write(at_home, hidden, "b", there, bundle / "working").read_bytes() == submitted


def test_rows_of_the_unknown_class_are_not_trained_on(tails: tuple[Path, dict[str, str]]) -> None:
    table = samples.load()
    rows = table.positions("train")
    rest = metric_learning.drop_unknown_class(config(*TINY), table, rows)
    assert len(rows) - len(rest) == 16
    assert len(
        metric_learning.drop_unknown_class(config(*TINY[:-1], "loss=cross_entropy"), table, rows)
    ) == len(rows)
