"""Any of timm's models at any image size: built, or refused in one line before an image is decoded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import config
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from comp import models
from comp.engine import cli
from comp.engine.config import experiments
from comp.engine.data import samples
from comp.engine.deliver import bundle as bundle_module
from comp.engine.deliver import kernel_models
from comp.engine.errors import UserError
from comp.engine.extras import explain, features, measure, saliency
from comp.engine.run import backbone, pretrained, runner, tracking
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
TINY = [
    "track=none", "machine.num_workers=0", "machine.progress=false", "schedule.warmup=0", "model.pretrained=false", "train.ema_decay=null",
    "train.epochs=1", "train.max_samples=16", "train.batch_size=8",
]  # fmt: skip
HEAD = Head("label", "multiclass", ("a", "b", "c"), ("target.label",), ("a", "b", "c"))
FAMILIES = {
    "vit": VIT, "dinov2": "vit_small_patch14_dinov2", "dinov3": "vit_small_patch16_dinov3", "eva02": "eva02_tiny_patch14_224",
    "swin": SWIN, "swinv2": "swinv2_tiny_window8_256", "siglip": "vit_base_patch16_siglip_224", "beit": "beit_base_patch16_224",
    "deit3": "deit3_small_patch16_224", "maxvit": "maxvit_pico_rw_256", "coatnet": "coatnet_nano_rw_224", "gcvit": "gcvit_xxtiny",
    "convnext": "convnext_atto", "efficientnet": "efficientnet_b0", "mobilenetv4": "mobilenetv4_conv_small_035",
    "tinyvit": "tiny_vit_5m_224", "caformer": "caformer_s18", "nextvit": "nextvit_small",
}  # fmt: skip


def checked(name: str, size: int, *more: str) -> None:
    models.validate(config(f"model.name={name}", "data.channels=3", f"data.size={size}", *more))


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        models.validate(config(*overrides))
    (line,) = caught.value.lines
    return line


def built(*overrides: str) -> Any:
    return models.build(config("data.channels=3", *overrides), (HEAD,), pretrained=False)


# --- sizes --------------------------------------------------------------------------------------------------


def test_a_transformer_learns_at_any_size(project: Path) -> None:
    """timm's test_vit takes any size; this model, like most, only the one it is built for."""
    runner.train("exp001", [*TINY, f"model.name={VIT}"], fold="0", name="x")
    weights = pretrained.read(paths.fold_folder("x", 0, 0) / "weights.safetensors")
    assert weights["pos_embed"].shape == (1, 1 + (32 // 16) ** 2, 192)


@pytest.mark.parametrize("name", [VIT, FAMILIES["dinov2"], FAMILIES["maxvit"], FAMILIES["convnext"]])
def test_every_size_that_a_family_can_be_built_for(empty: Path, name: str) -> None:
    for size in (96, 256):
        checked(name, size)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_of_each_family_at_four_sizes(empty: Path, family: str) -> None:
    for size in (96, 224, 256, 384):
        checked(FAMILIES[family], size)


@pytest.mark.parametrize(("name", "size", "near"), [("maxvit_pico_rw_256", 100, "96 px and 128 px"), ("inception_v3", 32, "80 px")])  # fmt: skip
def test_a_size_that_does_not_work_is_refused_with_the_nearest_that_do(
    project: Path, capsys: pytest.CaptureFixture[str], name: str, size: int, near: str
) -> None:
    (project / "configs/exp003.yaml").write_text(
        f"base: exp001\nmodel: {{name: {name}}}\ndata: {{size: {size}, channels: 3}}\n"
    )
    before = sorted((project / "data" / "cache").rglob("*"))
    assert cli.main(["train", "exp003"]) == 2
    printed = capsys.readouterr().err.strip()
    assert (
        "\n" not in printed
        and f"data.size: {name}" in printed
        and f"{size} px" in printed
        and near in printed
    )
    assert sorted((project / "data" / "cache").rglob("*")) == before
    for each in near.replace(" px", "").split(" and "):
        checked(name, int(each))


@pytest.mark.slow
@pytest.mark.parametrize("name", [VIT, SWIN])
def test_training_goes_through_progressive_sizes(project: Path, name: str) -> None:
    sizes = ["data.size=64", "augment.progressive_sizes=[32,64]", "train.epochs=2"]
    runner.train("exp001", [*TINY, f"model.name={name}", *sizes], fold="0", name="x")
    assert [
        line["epoch"] for line in tracking.read(paths.fold_folder("x", 0, 0) / "log.jsonl") if "epoch" in line
    ] == [1, 2]
    if name == VIT:
        weights = pretrained.read(paths.fold_folder("x", 0, 0) / "weights.safetensors")
        assert weights["pos_embed"].shape == (1, 17, 192), "of data.size"


def test_progressive_sizes(empty: Path) -> None:
    """Position embeddings are interpolated and windows rebuilt; the error for other models has valid
    sizes."""
    checked(VIT, 96, "augment.progressive_sizes=[64,96]", "train.epochs=2")
    checked(SWIN, 96, "augment.progressive_sizes=[64,96]", "train.epochs=2")
    name = FAMILIES["coatnet"]
    line = refusal(
        f"model.name={name}", "data.size=96", "augment.progressive_sizes=[64,96]", "train.epochs=2"
    )
    assert line.startswith("augment.progressive_sizes:") and "64 px" in line and line.endswith("96 px")
    line = refusal(f"model.name={VIT}", "data.size=64", "augment.progressive_sizes=[40,64]", "train.epochs=2")
    assert line.startswith("augment.progressive_sizes:") and "32 px and 48 px" in line


def test_one_image_is_too_few_for_batch_norm_of_a_single_pixel(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "configs/exp003.yaml").write_text("base: exp001\ndata: {size: 16}\ntrain: {batch_size: 1}\n")
    assert cli.main(["train", "exp003"]) == 2
    printed = capsys.readouterr().err.strip()
    assert (
        "\n" not in printed
        and "train.batch_size: 1" in printed
        and "16 px" in printed
        and "freeze_norm" in printed
    )
    for works in (["train.batch_size=2"], ["model.freeze_norm=true"], ["data.size=96"]):
        models.validate(config("data.size=16", "train.batch_size=1", *works))


def test_weights_of_another_model_are_refused_with_the_first_difference(empty: Path) -> None:
    file = paths.path("runs", "x", "weights.safetensors")
    models.save_weights(nn.Sequential(nn.Linear(3, 2)), file)
    for other, difference in (
        (nn.Linear(3, 2), "weight is not in it"),
        (nn.Sequential(nn.Linear(4, 2)), "(2, 3)"),
    ):
        with pytest.raises(UserError) as caught:
            models.load_weights(other, file)
        error = caught.value
        assert (error.code, error.where) == ("weights-differ", "runs/x/weights.safetensors")
        assert difference in error.what and "comp/competition.py" in error.remedy


def test_a_model_that_is_no_classifier_is_refused(empty: Path) -> None:
    line = refusal("model.name=gemma4_vit_167m_enc", "data.channels=3", "data.size=96")
    assert line.startswith("model.name:") and "no classifier" in line


# --- names and arguments ------------------------------------------------------------------------------------


def test_other_arguments_of_create_model_reach_it(empty: Path) -> None:
    assert built(f"model.name={VIT}", "data.size=32", "model.kwargs={depth: 3}").blocks.__len__() == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.kwargs={patch_dropp_rate: 0.3}"], ("model.kwargs.patch_dropp_rate:", "nearest is patch_drop_rate")),
        (["model.kwargs={depth: lots}"], ("model.kwargs.depth:", "'lots'")),
        (["model.kwargs={img_size: 64}"], ("model.kwargs.img_size:", "data.size")),
        (["model.kwargs={num_classes: 4}"], ("model.kwargs.num_classes:",)),
        (["model.name=resnet18", "model.kwargs={patch_size: 8}"], ("model.kwargs.patch_size:", "has no such argument")),
        (["model.name=vgg11", "model.drop_path_rate=0.1"], ("model.drop_path_rate:", "set it to 0")),
        ([f"model.name={VIT}.augreg_in21"], ("model.name:", f"nearest is {VIT}.augreg_in21k")),
        (["model.name=vit_tinny_patch16_224"], ("model.name:", VIT)),
        (["model.name=timm/resnet18"], ("model.name:", "hf-hub:timm/resnet18")),
        (["model.name=local-dir:weights/nowhere"], ("model.name: local-dir:weights/nowhere:", "config.json")),
        (["model.name=test_vit", "model.global_pool=gem"], ("model.global_pool:", "test_vit")),
    ],
)  # fmt: skip
def test_wrong_names_and_arguments_are_refused_in_one_line(
    empty: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    line = refusal(f"model.name={VIT}", "data.size=64", *overrides)
    assert all(word in line for word in words), line


@pytest.fixture
def folder(project: Path) -> Path:
    """A model as timm saves it for the hub: another mean, fewer blocks, and weights."""
    torch.manual_seed(0)
    module = timm.create_model(VIT, depth=2, num_classes=5)
    place = project / "weights" / "mine"
    place.mkdir(parents=True)
    about = dict(backbone.pretrained_cfg(VIT), mean=[0.1, 0.2, 0.3], num_classes=5, license="mit", custom_load=False)  # fmt: skip
    printed = {"architecture": VIT, "pretrained_cfg": about, "model_args": {"depth": 2}}
    (place / "config.json").write_text(json.dumps(printed))
    save_file(module.state_dict(), place / "model.safetensors")
    return place


def test_a_folder_is_a_model(folder: Path) -> None:
    cfg = config("model.name=local-dir:weights/mine", "data.size=96", "data.channels=3")
    models.validate(cfg)
    module: Any = models.build(cfg, (HEAD,), pretrained=True)
    tensors = pretrained.read(folder / "model.safetensors")
    assert len(module.blocks) == 2 and torch.equal(
        module.blocks[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"]
    )
    assert module.pos_embed.shape == (1, 37, 192) and module.head.out_features == 3
    assert tuple(module.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3) and "license mit" in backbone.describe(cfg)


def test_a_repository_of_the_hub_is_a_model_and_needs_no_hub_on_kaggle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants as hub

    place = tmp_path / "hub" / "models--me--mine"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    for file in folder.iterdir():
        (place / "snapshots" / "abc" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    network = "model.name=hf-hub:me/mine"
    cfg = config(network, "data.size=32", "data.channels=3")
    module: Any = models.build(cfg, (HEAD,), pretrained=True)
    tensors = pretrained.read(folder / "model.safetensors")
    assert torch.equal(module.blocks[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"])
    assert "no/where" in refusal("model.name=hf-hub:no/where", "data.size=32")
    # What the bundle holds of it is enough.
    runner.train("exp001", [*TINY, network], fold="0", name="x")
    bundle = tmp_path / "bundle"
    network_folder = bundle_module._write_backbone(bundle, "x")
    (bundle / "configs").mkdir()
    (bundle / "configs" / "base.yaml").write_bytes((paths.root() / "configs" / "base.yaml").read_bytes())
    backbone._described.cache_clear()
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    stored = experiments.stored_config("x")
    weights = paths.fold_folder("x", 0, 0) / "weights.safetensors"
    monkeypatch.setenv("COMP_ROOT", str(bundle))
    paths.root.cache_clear()
    there = kernel_models.config_here(
        stored,
        stored.competition,
        {"run": "x", "tta": ["identity"], "space": "probability", "backbone": network_folder},
    )
    assert there.model.name == "local-dir:backbones/x"
    module = models.build(there, (HEAD,) * 1, pretrained=False)
    assert {k: v.shape for k, v in module.state_dict().items() if not k.startswith("head")} == {
        k: v.shape for k, v in pretrained.read(weights).items() if not k.startswith("head")
    }
    assert tuple(module.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)


def test_the_input_of_the_pretrained_weights_is_printed(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "REPEATS", 1)
    overrides = [*TINY, f"model.name={VIT}", "data.size=40", "predict.batch_size=1"]
    measure.measure("exp001", overrides)
    printed = capsys.readouterr().out
    for word in (VIT, "224 px", "crop_pct 0.9", "bicubic", "license apache-2.0", "here 40 px", "cover 32"):
        assert word in printed, word


def test_comp_check_validates_the_model_of_an_experiment(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "configs/exp003.yaml").write_text(
        f"base: exp001\nmodel: {{name: {VIT}}}\ndata: {{size: 40}}\n"
    )
    assert cli.main(["check", "exp003"]) == 0
    assert "license apache-2.0" in capsys.readouterr().out
    (project / "configs/exp003.yaml").write_text("base: exp001\ndata: {size: 16}\ntrain: {batch_size: 1}\n")
    assert cli.main(["check", "exp003"]) == 2
    assert "train.batch_size: 1" in capsys.readouterr().out


# --- files of weights ---------------------------------------------------------------------------------------


def as_pth(module: nn.Module, file: Path) -> None:
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, file)


def as_bin(module: nn.Module, file: Path) -> None:
    torch.save(module.state_dict(), file)


def as_safetensors(module: nn.Module, file: Path) -> None:
    save_file(module.state_dict(), file)


@pytest.mark.parametrize(
    ("end", "write"), [("pth", as_pth), ("bin", as_bin), ("safetensors", as_safetensors)]
)
def test_a_file_of_another_size_and_other_classes(
    empty: Path, capsys: pytest.CaptureFixture[str], end: str, write: Callable[[nn.Module, Path], None]
) -> None:
    torch.manual_seed(0)
    theirs: Any = timm.create_model("test_vit", num_classes=7)  # 160 px
    write(theirs, empty / f"theirs.{end}")
    cfg = config("model.name=test_vit", "data.size=64", "data.channels=1", f"model.pretrained=theirs.{end}")
    ours: Any = models.build(cfg, (HEAD,), pretrained=False)
    pretrained.load_pretrained(ours, cfg, 0, 0)
    assert torch.equal(ours.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)
    assert torch.allclose(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight.sum(1, keepdim=True))
    resized = timm.layers.resample_abs_pos_embed(theirs.pos_embed, [4, 4], num_prefix_tokens=1)
    assert torch.allclose(ours.pos_embed, resized, atol=1e-6)
    assert "not in it: head.weight, head.bias" in capsys.readouterr().out


AUTHORS = (
    (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"), (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".dwconv."), (r"\.mlp\.fc1\.", ".pwconv1."), (r"\.mlp\.fc2\.", ".pwconv2."), (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)  # fmt: skip


def test_names_of_the_authors_are_mapped(empty: Path) -> None:
    """ConvNeXt as its authors publish it."""
    theirs: Any = timm.create_model("test_convnext", num_classes=4)
    mapped: dict[str, torch.Tensor] = {}
    for key, tensor in theirs.state_dict().items():
        for pattern, name in AUTHORS:
            key = re.sub(pattern, name, key)
        mapped[key] = tensor
    torch.save({"model": mapped}, empty / "theirs.pth")
    cfg = config("model.name=test_convnext", "data.size=32", "data.channels=3", "model.pretrained=theirs.pth")
    ours = models.build(cfg, (HEAD,), pretrained=False)
    pretrained.load_pretrained(ours, cfg, 0, 0)
    want = theirs.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in ours.state_dict().items() if not k.startswith("head.fc"))


@pytest.mark.parametrize("kind", ["other network", "text", "list", "unsafe"])
def test_a_file_without_weights_is_refused_before_the_cache(
    project: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    file = project / "theirs.pth"
    if kind == "other network":
        torch.save(timm.create_model("test_resnet").state_dict(), file)
    elif kind == "text":
        file.write_text("no weights")
    else:
        torch.save({"list": [1, 2], "unsafe": np.random.default_rng(0)}[kind], file)
    (project / "configs/exp003.yaml").write_text(
        "base: exp001\ndata: {size: 48}\nmodel: {name: test_vit, pretrained: theirs.pth}\n"
    )
    before = sorted((project / "data" / "cache").rglob("*"))
    assert cli.main(["train", "exp003"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert "theirs.pth: model.pretrained:" in printed
    assert sorted((project / "data" / "cache").rglob("*")) == before


def test_a_larger_size_starts_from_a_run_of_a_smaller_one(project: Path) -> None:
    runner.train("exp001", [*TINY, f"model.name={VIT}", "data.size=32"], fold="0", name="small")
    printed = [*TINY, f"model.name={VIT}", "data.size=64", "model.pretrained=run:small", "optim.lr=1e-20"]
    runner.train("exp001", printed, fold="0", name="large")
    small, large = (
        pretrained.read(paths.fold_folder(n, 0, 0) / "weights.safetensors") for n in ("small", "large")
    )
    assert torch.equal(small["blocks.3.attn.qkv.weight"], large["blocks.3.attn.qkv.weight"])
    assert torch.equal(small["head.weight"], large["head.weight"])
    resized = timm.layers.resample_abs_pos_embed(small["pos_embed"], [4, 4], num_prefix_tokens=1)
    assert torch.allclose(large["pos_embed"], resized, atol=1e-6)


# --- what is done with it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_saliency_is_a_map(empty: Path, name: str) -> None:
    """A class token is read alone behind the last attention, and Swin keeps channels last at every width."""
    torch.manual_seed(0)
    network = built(f"model.name={name}", "data.size=96").eval()
    with saliency.spatial_features(network) as layers:
        output = network(torch.rand(1, 3, 96, 96))
    feature, gradient = saliency.choose_layer(layers, output[0, 0], network)
    feature, gradient = saliency.to_nchw(feature, network), saliency.to_nchw(gradient, network)
    assert feature.shape[2:] == (6, 6) and gradient.abs().amax((0, 1)).min() > 0
    cam = saliency.grad_cam(feature, gradient, torch.Size((96, 96)))
    assert cam.shape == (1, 96, 96) and cam.max() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [VIT, SWIN, "maxvit_pico_rw_256", "convnext_atto", "tiny_vit_5m_224", "mobilenetv4_conv_small_035"])  # fmt: skip
def test_two_steps_predictions_saliency_and_an_export(project: Path, name: str) -> None:
    run = [*TINY, f"model.name={name}", "data.size=96", "data.channels=3"]
    runner.train("exp001", run, fold="0", name="x")
    with Image.open(explain.explain("x", [], 2)) as drawn:
        assert np.asarray(drawn)[60:150, 250:350].std() > 5
    if name == VIT:
        from comp.engine.extras import export

        pytest.importorskip("onnxscript")
        made = artifacts.read_json(artifacts.verified(export.export("x", 0, 8, "none")))
        assert max(line.get("away", 0) for line in made["variants"] if line["exact"]) < 1e-3
    if name == VIT:
        (project / "configs/frozen.yaml").write_text(
            f"base: exp001\nmodel: {{name: {name}, pretrained: false}}\ndata: {{size: 96}}\n"
        )
        features.features("frozen", ["track=none", "machine.progress=false"], "linear")
        assert np.load(paths.run_folder("frozen") / "features.npy").shape == (len(samples.load().frame), 192)
