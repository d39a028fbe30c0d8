"""Recipes, policies, random erasing, mixup, cutmix, mosaic, progressive sizes and disable_last_epochs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config

from comp import data, losses, transforms
from comp.engine.data import samples
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError
from comp.engine.run import augment_grid, data_loader, gpu_augment, policies, previews, runner
from comp.engine.run import mixup as mixing
from comp.engine.tasks.kinds import Head

SEEDS = derive_seed(1, spread=np.arange(400))
TINY = ["track=none", "machine.num_workers=0", "machine.progress=false", "train.max_samples=48"]


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        config(*TINY, *overrides)
    return str(raised.value)


def images(count: int = 16, side: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [64, 224])
def test_no_recipe_turns_an_image_into_noise_or_outlines(size: int, channels: int) -> None:
    """An image of one grey stays so, except for black holes and edges and noise below a tenth of the
    range."""
    grey = np.full((size, size, channels), 128, np.uint8)
    noisy = 0
    for name in transforms.RECIPES:
        change = transforms.Augment(transforms.by_name(name, size), size)
        for seed in derive_seed(3, spread=np.arange(150)).tolist():
            drawn = change(grey, int(seed)).astype(float)[:, :, 0]
            steps = np.abs(np.diff(drawn, axis=1))
            deviation = 1.4826 * np.median(steps) / np.sqrt(2)  # holes are a small part of it
            assert deviation < 0.12 * 255, name
            noisy += deviation > 0
            if deviation == 0:
                assert drawn.max() - np.median(drawn) < 8, f"{name}: a light line next to a dark edge"
                assert (drawn > 0).mean() > 0.6, f"{name}: holes"
    assert noisy > 5, "there is noise, mild"


# --- policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trivial", "rand-m9-n2-mstd0.5-inc1", "augmix-m3-w2", "original-mstd0.5"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_is_a_function_of_the_seed_and_restores_the_global_generators(
    name: str, channels: int
) -> None:
    policy = policies.create(name, channels)
    image = np.random.default_rng(0).integers(0, 256, (24, 24, channels)).astype(np.uint8)
    before = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    drawn = [policy(image, seed) for seed in range(40)]
    after = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    assert after == (random.random(), torch.rand(1)) != before
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in drawn)
    assert all((policy(image, seed) == each).all() for seed, each in enumerate(drawn))
    assert len({each.tobytes() for each in drawn}) > 15
    assert policies.op_names(policy)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rnad-m9", "rand-m9-n2-mstd0.5"),
        ("rand-m9-x3", "no policy"),
        ("rand-mx", "no number"),
        ("trivial-m3", "trivial"),
    ],
)
def test_a_policy_that_timm_would_ignore_in_part_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        policies.create(name, 3)
    assert (caught.value.code, caught.value.key) == ("policy-unknown", "augment.auto_augment")


def test_a_policy_draws_the_same_in_this_process_and_in_a_loader_process(project: Path) -> None:
    rows = samples.load().positions("train")[:16]

    def drawn(*overrides: str) -> list[bytes]:
        cfg = config(
            *TINY[2:],
            "augment.auto_augment=rand-m9-n2",
            "train.epochs=3",
            "augment.disable_last_epochs=1",
            *overrides,
        )
        loader = data_loader.Loader(cfg, samples.load(), torch.device("cpu"))
        return [
            p.numpy().tobytes()
            for epoch in (1, 2)
            for batch in loader.batches(
                data.training_batches(rows, 8, 7, epoch, 0), transforms.epoch_augment(cfg, epoch)
            )
            for p in batch.images
        ]

    alone = drawn("machine.num_workers=0")
    assert drawn("machine.num_workers=1") == alone
    plain = drawn("machine.num_workers=0", "augment.auto_augment=null", "augment.disable_last_epochs=0")
    assert sum(a != b for a, b in zip(alone[:16], plain[:16], strict=True)) > 4
    assert alone[16:] == plain[16:], "the last epoch is without it"


# --- erasing ------------------------------------------------------------------------------------------------


def test_random_erasing_has_its_share_and_does_not_depend_on_micro_batches() -> None:
    op = gpu_augment.random_erasing(0.3)
    whole = torch.full((400, 1, 20, 20), 9.0)
    out = op(whole, SEEDS)
    changed = (out != 9).flatten(1).float().mean(1).numpy()
    hit = changed > 0
    assert abs(hit.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 400)
    assert changed[hit].min() > 0.01 and changed[hit].max() < 0.4
    assert abs(float(out[out != 9].mean())) < 0.05 and abs(float(out[out != 9].std()) - 1) < 0.05
    assert torch.equal(torch.cat([op(whole[i : i + 7], SEEDS[i : i + 7]) for i in range(0, 400, 7)]), out)
    assert (whole == 9).all()


# --- pairs and fours ----------------------------------------------------------------------------------------


def mix(x: torch.Tensor, mixup: float = 0, cutmix: float = 0, share: float = 1, mosaic: float = 0) -> Any:
    return mixing.mix_images(x, SEEDS[: len(x)], mixup, cutmix, share, mosaic)


def test_mixup_blends_neighbors_by_the_weights_of_their_targets() -> None:
    x = images(400, 4)
    out, [(own, first), (mate, second)] = mix(x, mixup=0.4)
    assert own.tolist() == list(range(400)) and mate.tolist() == [i ^ 1 for i in range(400)]
    assert torch.allclose(first + second, torch.ones(400))
    shares = first.view(-1, 1, 1, 1)
    assert torch.allclose(out, shares * x + (1 - shares) * x[mate], atol=1e-6)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); both within three standard errors
    assert abs(float(first.mean()) - 0.5) < 3 * np.sqrt(1 / (4 * 1.8) / 400)
    assert abs(float(first.var()) - 1 / (4 * 1.8)) < 0.02


def test_cutmix_pastes_the_area_of_the_target_weights() -> None:
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 16, 16)
    out, [_, (mate, second)] = mix(x, cutmix=1.0)
    taken = (out[:, 0] == mate.view(-1, 1, 1)).float().mean((1, 2))
    assert torch.allclose(taken, second) and len(set(taken.tolist())) > 10
    assert ((out[:, 0] == mate.view(-1, 1, 1)) | (out[:, 0] == torch.arange(64).view(-1, 1, 1))).all()
    mask = (out[:, 0] == mate.view(-1, 1, 1)).numpy()
    for each in mask:
        rows, columns = np.flatnonzero(each.any(1)), np.flatnonzero(each.any(0))
        assert each.sum() == len(rows) * len(columns) and (np.diff(rows) == 1).all(), "one rectangle"


def test_a_mosaic_holds_four_whole_images_weighted_by_area() -> None:
    x = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 3, 16, 16).contiguous()
    out, parts = mix(x, mosaic=1.0)
    assert len(parts) == 4 and torch.allclose(sum(share for _, share in parts), torch.ones(32))
    for who, share in parts:
        assert (who // 4 == torch.arange(32) // 4).all(), "of the same four"
        assert torch.allclose(((out[:, 0] - who.view(-1, 1, 1)).abs() < 1e-3).float().mean((1, 2)), share)
    _, parts = mix(images(400, 4), mosaic=0.25)
    assert abs(float((parts[0][1] < 1).float().mean()) - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 400)


def test_shares_of_mixed_images_and_mixup_with_cutmix() -> None:
    x = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 1, 8, 8).contiguous()
    out, _ = mix(x, mixup=0.8, cutmix=1.0, share=0.5)
    alone = (out == x).flatten(1).all(1)
    blended = torch.tensor([len(each.unique()) == 1 for each in out]) & ~alone
    assert (
        abs(float(alone.float().mean()) - 0.5) < 3 * np.sqrt(0.25 / 400) + 0.02
    )  # some rectangles are empty
    assert abs(float(blended.float().sum() / (~alone).float().sum()) - 0.5) < 3 * np.sqrt(0.25 / 200) + 0.02


@pytest.mark.parametrize(
    "kind", [{"mixup": 0.4}, {"cutmix": 1.0, "share": 0.7}, {"mosaic": 0.5, "mixup": 1.0}]
)
def test_micro_batches_of_whole_pairs_are_mixed_like_the_batch(kind: dict[str, float]) -> None:
    x = images(32)
    whole, parts = mix(x, **kind)
    for start in range(0, 32, 8):
        part = slice(start, start + 8)
        out, mine = mixing.mix_images(
            x[part],
            SEEDS[part],
            kind.get("mixup", 0),
            kind.get("cutmix", 0),
            kind.get("share", 1),
            kind.get("mosaic", 0),
        )
        assert torch.equal(out, whole[part])
        for (who, share), (all_who, all_share) in zip(mine, parts, strict=False):
            assert torch.equal(who + start, all_who[part]) and torch.equal(share, all_share[part])


def test_the_loss_of_a_mixture_is_the_loss_against_the_soft_target(empty: Path) -> None:
    heads = (Head("digit", "multiclass", tuple("abcde"), ("target.digit",)),)
    output = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    codes, weight = torch.arange(16) % 5, torch.ones(16)
    _, parts = mix(images(), mosaic=0.4, mixup=0.4)
    soft = sum(share[:, None] * torch.eye(5)[codes[who]] for who, share in parts)
    assert isinstance(soft, torch.Tensor)

    def by(cfg: Any, function: Any, *knobs: Any) -> Any:
        return mixing.mixed_loss(
            cfg, heads, lambda out, truth: function(out, truth[0], *knobs).view(16, -1).mean(1)
        )

    criterion = by(config(), losses.cross_entropy, 0.1)
    assert torch.allclose(
        criterion(output, [codes], weight, parts), losses.cross_entropy(output, soft, 0.1), atol=1e-6
    )
    # a threshold looks at the mixture, as in timm: whatever has a fifth of it is a yes
    firm = by(config("loss.name=bce", "loss.target_threshold=0.2"), losses.bce_multiclass, 0.0, 0.2)
    wanted = losses.bce_multiclass(output, (soft > 0.2).float(), 0.0, None)
    assert torch.allclose(firm(output, [codes], weight, parts), wanted, atol=1e-6)
    # squared errors: the same gradient as against the mixed value
    value, out = torch.rand(16), torch.rand(16, 1, requires_grad=True)
    by(config(), losses.mse)(out, [value], weight, parts).sum().backward()
    target = sum(share * value[who] for who, share in parts)
    assert out.grad is not None and torch.allclose(
        out.grad[:, 0], 2 * (out.detach()[:, 0] - target), atol=1e-6
    )
    # weights belong to whose target it is
    heavy = torch.where(torch.arange(16) == 1, 3.0, 0.0)
    only = criterion(output, [codes], heavy, mix(images(), mixup=1.0)[1])
    assert (only[:2] > 0).all() and (only[2:] == 0).all()


def test_mixing_is_refused_where_it_has_no_meaning(project: Path) -> None:
    cfg = config("augment.mosaic=0.5")
    retrieval = (Head("whale", "retrieval", ("a", "b"), ("target.whale",)),)
    for heads, several, words in (
        (retrieval, False, "whale is a retrieval target"),
        (samples.load().heads, True, "several"),
    ):
        with pytest.raises(UserError, match=f"augment.mosaic.*{words}"):
            mixing.validate(cfg, heads, several)
    with pytest.raises(UserError, match="metadata"):
        mixing.validate(config("augment.mixup=0.2", "model.metadata=true"), samples.load().heads, False)
    assert "train.batch_size" in refusal("augment.mosaic=0.5", "train.batch_size=6")
    assert "train.batch_size" in refusal("augment.cutmix=1.0", "train.batch_size=7")


def test_knobs_without_effect_are_refused(empty: Path) -> None:
    assert "augment.disable_last_epochs" in refusal("augment.disable_last_epochs=2")
    assert "leaves no epoch" in refusal("augment.disable_last_epochs=15", "augment.random_erasing=0.5")
    assert "augment.mixup_prob" in refusal("augment.mixup_prob=0.5", "augment.mosaic=0.5")
    assert "augment.progressive_sizes" in refusal(
        "augment.progressive_sizes=[16,24,32]", "train.epochs=2", "schedule.warmup=0"
    )
    long = (
        "base: exp001\naugment: {disable_last_epochs: 2, progressive_sizes: [16, 32], random_erasing: 1.0}\n"
    )
    (empty / "configs" / "exp003.yaml").write_text(long)
    assert config(experiment="exp003", debug=True).augment.disable_last_epochs == 0, (
        "a debug run has one epoch"
    )


# --- sizes --------------------------------------------------------------------------------------------------


def test_progressive_sizes_resize_and_do_not_crop(project: Path) -> None:
    cfg = config(*TINY, "augment.recipe=light", "augment.progressive_sizes=[16,24,32]", "train.epochs=7")
    assert [transforms.epoch_augment(cfg, epoch).size for epoch in range(7)] == [16, 16, 16, 24, 24, 32, 32]
    table = samples.load()
    loader = data_loader.Loader(cfg, table, torch.device("cpu"))
    rows = table.positions("train")[:64]
    ink = []
    for epoch in (0, 4, 6):
        batches = list(
            loader.batches(data.training_batches(rows, 32, 0, epoch, 0), transforms.epoch_augment(cfg, epoch))
        )
        assert {b.images.shape[1:3] for b in batches} == {(transforms.epoch_augment(cfg, epoch).size,) * 2}
        ink.append(float(torch.cat([b.images for b in batches]).float().mean()))
    assert max(ink) < 1.1 * min(ink), "shrunk, not cut out"
    assert next(iter(loader.batches(data.sequential_batches(rows, 8)))).images.shape[1] == 32


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_with_every_augmentation_trains_and_prints_its_ops(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [
        "augment.auto_augment=trivial", "augment.random_erasing=0.5", "augment.mixup=0.2", "augment.cutmix=1.0", "augment.mosaic=0.3",
        "augment.disable_last_epochs=1", "augment.progressive_sizes=[24,32]", "train.epochs=3", "train.grad_accum_steps=2", "train.batch_size=8",
    ]  # fmt: skip
    previews.augment("exp001", every)
    printed = capsys.readouterr().out
    for word in (
        "Affine",
        "trivial",
        "ShearX",
        "random_erasing(0.5)",
        "mixup",
        "cutmix",
        "mosaic",
        "24, 32 px",
        "next:",
    ):
        assert word in printed, word
    assert augment_grid.ops(config("augment.recipe=none")) == ["no augmentation"]
    runner.train("exp001", [*TINY, *every], fold="0", name="x")
    assert (project / "runs/x/seed0/fold0/oof.arrow").exists()
