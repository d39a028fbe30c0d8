"""comp model, explain, export and features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import config
from PIL import Image
from torch import nn

from comp.engine.bank import bank
from comp.engine.data import folds, samples
from comp.engine.deliver import bundle, kernel, recheck
from comp.engine.errors import UserError
from comp.engine.extras import (
    explain,
    export,
    export_variants,
    extract_features,
    features,
    fit_heads,
    measure,
    saliency,
)
from comp.engine.run import frozen_heads, loading, runner
from comp.engine.run.normalize import Normalize
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

TINY = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "train.max_samples=96", "train.epochs=1", "schedule.warmup=0",
    "data.size=16", "model.pretrained=false",
]  # fmt: skip


# --- measured -----------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_on_paper() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    on_paper = 8 * 16 * 16 * 3 * 9 + 8 * 16 * 16 * 5
    assert measure.multiply_adds(network, torch.zeros(1, 3, 16, 16)) == on_paper


def test_comp_model_prints_what_it_measured(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    measure.measure("exp001", [*TINY, "predict.batch_size=4"])
    out = capsys.readouterr().out
    for word in (
        "parameters",
        "multiply-adds",
        "forward of 1 ",
        "forward of 4",
        "training step of 32",
        "peak memory",
        "next:",
    ):
        assert word in out, word
    step = [*TINY, "predict.batch_size=1", "optim.name=adahessian", "train.channels_last=true"]
    measure.measure("exp001", step)  # as the loop would do it: this one differentiates gradients
    assert "training step of 32" in capsys.readouterr().out


# --- explained ----------------------------------------------------------------------------------------------


def test_a_feature_map_with_enough_cells_is_chosen() -> None:
    """resnets end in a single cell for 32 px; then an earlier layer is chosen."""
    import timm

    for name in ("test_resnet", "test_vit"):
        network: Any = timm.create_model(name, num_classes=3).eval()
        side = int(network.pretrained_cfg["input_size"][1])
        for px in (32, side) if name == "test_resnet" else (side,):
            with saliency.spatial_features(network) as layers:
                output = network(torch.rand(1, 3, px, px))
            feature, gradient = saliency.choose_layer(layers, output[0, 0], network)
            assert min(saliency.to_nchw(feature, network).shape[2:]) >= saliency.MIN_SIDE
            assert saliency.to_nchw(gradient, network).abs().sum() > 0, (
                "the output does not depend on what is shown"
            )
        assert "forward_features" not in vars(network), "hooks are removed"


def test_grad_cam_is_the_positive_part_of_the_weighted_sum() -> None:
    feature = torch.zeros(1, 2, 4, 4)
    feature[0, 0, 1, 2], feature[0, 1, 3, 0] = 2.0, 5.0
    gradient = torch.ones_like(feature) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    cam = saliency.grad_cam(feature, gradient, torch.Size((4, 4)))[0]
    wanted = torch.zeros(4, 4)
    wanted[1, 2] = 1.0
    assert torch.allclose(cam, wanted), "evidence against the class is not shown"


def test_features_of_every_memory_layout_become_nchw() -> None:
    wanted = torch.arange(2 * 6 * 3 * 3.0).view(2, 6, 3, 3)
    network = nn.Module()
    network.num_features, network.num_prefix_tokens = 6, 2  # type: ignore[assignment]
    tokens = torch.cat([torch.zeros(2, 2, 6), wanted.flatten(2).transpose(1, 2)], 1)
    for order in (wanted, wanted.permute(0, 2, 3, 1), tokens):
        assert torch.equal(saliency.to_nchw(order, network), wanted)


def test_the_worst_and_chosen_rows_are_drawn_by_the_weights_of_their_fold(project: Path) -> None:
    runner.train("exp001", TINY, fold="0", name="x")
    table, ids = samples.load(), []
    file = explain.explain("x", [], 3)
    with Image.open(file) as drawn:
        pixels = np.asarray(drawn)
    assert pixels.shape == (
        explain.TITLE + 3 * (explain.SIDE + explain.TITLE),
        explain.GAP + 3 * (explain.SIDE + explain.GAP),
        3,
    )
    for column in range(3):
        left = explain.GAP + column * (explain.SIDE + explain.GAP)
        assert pixels[100:150, left : left + explain.SIDE].std() > 5, "no empty panel"
    rows = bank.read(paths.fold_folder("x", 0, 0) / "oof.arrow", table, folds.load(table)).row
    ids = table.frame["id"].iloc[rows[:2]].tolist()
    assert explain.explain("x", ids, 3) == file
    with pytest.raises(UserError, check=lambda error: error.code == "id-unknown"):
        explain.explain("x", ["nobody"], 3)


# --- exported -----------------------------------------------------------------------------------------------


def test_pruning_takes_exactly_the_smallest_share_and_leaves_the_original() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    whole = export_variants.ExportedNetwork(module, Normalize(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))
    before = torch.cat([module[0].weight.flatten(), module[2].weight.flatten()]).detach().clone()  # type: ignore[operator]
    cut: Any = export_variants.pruned(whole, 0.3).module
    after = torch.cat([cut[0].weight.flatten(), cut[2].weight.flatten()]).detach()
    gone = after == 0
    assert int(gone.sum()) == round(0.3 * len(before))
    assert before[gone].abs().max() <= before[~gone].abs().min() and torch.equal(after[~gone], before[~gone])
    assert not (before == 0).any() and "0.weight" in cut.state_dict()


def test_shares_to_prune_are_validated() -> None:
    assert export._shares("0.3,0.5") == [0.3, 0.5] and export._shares("none") == []
    for wrong in ("half", "0.3,1.0", "30"):
        with pytest.raises(UserError, match="--prune"):
            export._shares(wrong)


@pytest.mark.slow
def test_exported_outputs_equal_those_of_torch_or_are_an_error(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    runner.train("exp001", TINY, fold="0", name="x")
    made = artifacts.read_json(artifacts.verified(export.export("x", 0, 60, "0.5")))
    by_name = {line["name"]: line for line in made["variants"]}
    assert list(by_name) == ["torch", "torch.export", "onnx", "onnx int8", "pruned 50%"]
    assert max(by_name["torch.export"]["difference"], by_name["onnx"]["difference"]) < 1e-4
    assert by_name["torch"]["score"] == by_name["onnx"]["score"]
    assert by_name["onnx int8"]["bytes"] < 0.5 * by_name["onnx"]["bytes"]
    assert by_name["pruned 50%"]["bytes"] < by_name["torch"]["bytes"]
    assert "difference" in capsys.readouterr().out
    table = samples.load()
    stored = bank.read(paths.fold_folder("x", 0, 0) / "oof.arrow", table, folds.load(table))
    import onnxruntime

    context = loading.load_context(config(*TINY))
    images = export_variants.load_images(context, stored.row[:20].astype(np.int64))
    session = onnxruntime.InferenceSession(str(paths.run_folder("x") / "export" / "model.onnx"))
    raw = session.run(None, {"images": images})[0]
    assert np.allclose(torch.from_numpy(raw).log_softmax(1).numpy(), stored.heads["label"][:20], atol=1e-4)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, check=lambda error: error.code == "export-differs"):
        export.export("x", 0, 20, "none")


# --- frozen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(fit_heads.HEADS))
def test_each_kind_of_head_fits_separable_features(name: str) -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 3, 400)
    x = np.eye(3)[codes] @ draw.normal(0, 2, (3, 8)) + draw.normal(0, 0.7, (400, 8))
    many = Head("kind", "multiclass", ("a", "b", "c", "never"), ("target.kind",))
    predicted = fit_heads.predictor(name, many, x[:300], codes[:300, None].astype(float))(x[300:])
    assert (
        predicted.shape == (100, 4)
        and np.allclose(predicted.sum(1), 1)
        and (predicted.argmax(1) == codes[300:]).mean() > 0.9
    )
    two = Head("has", "multilabel", ("a", "b"), ("target.a", "target.b"))
    labels = np.column_stack([codes == 0, codes == 1]).astype(float)
    predicted = fit_heads.predictor(name, two, x[:300], labels[:300])(x[300:])
    assert predicted.shape == (100, 2) and ((predicted > 0.5) == labels[300:]).mean() > 0.9
    value = Head("age", "regression", ("age",), ("target.age",))
    truth = (x @ draw.normal(0, 1, 8))[:, None] + 30
    if name == "logistic":
        with pytest.raises(UserError, match="linear, mlp, knn"):
            fit_heads.predictor(name, value, x, truth)
        return
    guess = fit_heads.predictor(name, value, x[:300], truth[:300])(x[300:])
    assert guess.shape == (100, 1) and np.corrcoef(guess[:, 0], truth[300:, 0])[0, 1] > 0.8


def test_features_are_reused_and_stale_ones_are_an_error(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ["machine.num_workers=0", "machine.progress=false"]
    (project / "configs" / "exp003.yaml").write_text("base: exp001\ndata: {size: 16}\n")
    features.features("exp003", quiet, "knn")
    table = samples.load()
    split = folds.load(table)
    assert bank.members() == ["exp003:knn"]
    oof = bank.load("exp003:knn", "oof", table, split)
    assert oof.predicted.all() and bank.load("exp003:knn", "test", table, split).predicted.all()
    assert artifacts.read_json(paths.member_folder("exp003", "knn") / "score.json")["oof"] > 0.4, (
        "chance is 0.1"
    )
    before = artifacts.sha256(paths.run_folder("exp003") / frozen_heads.FILE)
    capsys.readouterr()
    features.features("exp003", quiet, "linear")
    assert "reused" in capsys.readouterr().out
    image = project / "data/raw" / table.frame["images"].iloc[0][0]
    cv2.imwrite(str(image), np.full((9, 9), 200, np.uint8))
    with pytest.raises(UserError, match=r"1 of its 1797 image files .*--fresh"):
        features.features("exp003", quiet, "linear")
    features.features("exp003", quiet, "linear", fresh=True)
    assert bank.members() == ["exp003:linear"], "heads on the old images are removed"
    assert artifacts.sha256(paths.run_folder("exp003") / frozen_heads.FILE) != before
    cfg = config(*quiet, experiment="exp003")
    context = loading.load_context(cfg)
    sized = cfg.model_copy(update={"data": cfg.data.model_copy(update={"size": 24})})
    reseeded = cfg.model_copy(update={"train": cfg.train.model_copy(update={"seeds": [7]})})
    for other, what in ((sized, "sizes or decoding"), (reseeded, "weights")):
        with pytest.raises(UserError, match=f"made of other {what}"):
            extract_features.of_backbone(replace(context, cfg=other), "exp003", False)
    with pytest.raises(UserError, match="did you mean linear"):
        features.features("exp003", quiet, "linaer")


@pytest.mark.parametrize("name", sorted(fit_heads.HEADS))
@pytest.mark.parametrize("classes", [2, 4])
def test_stored_heads_predict_what_scikit_learn_predicts(name: str, classes: int) -> None:
    """Kernels predict from arrays, without a pickle; a class without training rows gets nearly 0."""
    from sklearn.neighbors import KNeighborsClassifier

    draw = np.random.default_rng(1)
    codes = draw.integers(0, classes, 300)
    x = np.eye(classes)[codes] @ draw.normal(0, 1, (classes, 6)) + draw.normal(0, 1, (300, 6))
    head = Head("kind", "multiclass", tuple("abcde"), ("target.kind",), tuple("abcde"))
    predicted = fit_heads.predictor(name, head, x[:200], codes[:200, None].astype(float))(x[200:])
    knn = KNeighborsClassifier(frozen_heads.N_NEIGHBORS, weights="distance", metric="cosine")
    estimator = (knn if name == "knn" else fit_heads.HEADS[name]()).fit(x[:200], codes[:200])
    assert predicted[:, :classes] == pytest.approx(estimator.predict_proba(x[200:]), abs=1e-5)
    assert predicted[:, classes:].max() < 1e-5


@pytest.mark.parametrize("name", ["linear", "mlp", "knn"])
def test_stored_regression_heads_predict_what_scikit_learn_predicts(name: str) -> None:
    from sklearn.neighbors import KNeighborsRegressor

    draw = np.random.default_rng(1)
    x = draw.normal(size=(300, 6))
    y = x @ draw.normal(size=(6, 2)) + 30
    head = Head("v", "regression", ("a", "b"), ("target.a", "target.b"))
    predicted = fit_heads.predictor(name, head, x[:200], y[:200])(x[200:])
    knn = KNeighborsRegressor(frozen_heads.N_NEIGHBORS, weights="distance", metric="cosine")
    middle, spread = y[:200].mean(0), y[:200].std(0)
    estimator = (knn if name == "knn" else fit_heads.VALUES[name]()).fit(x[:200], (y[:200] - middle) / spread)
    assert predicted == pytest.approx(estimator.predict(x[200:]) * spread + middle, rel=1e-5)


def test_a_head_on_frozen_features_reproduces_its_stored_predictions(project: Path) -> None:
    """Blends, the recheck and kernels use it like a checkpoint."""
    (project / "configs" / "exp003.yaml").write_text("base: exp001\ndata: {size: 16}\n")
    features.features("exp003", ["machine.num_workers=0", "machine.progress=false"], "logistic")
    (run,) = kernel.member_runs("exp003:logistic")
    assert run["checkpoints"] == [(0, f"{fold}/logistic") for fold in range(5)] and run["tta"] == ["identity"]
    assert all(artifacts.manifest_entry(file) for file in bundle.weights_of(run))
    recheck.recheck("exp003:logistic")
