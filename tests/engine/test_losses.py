"""Every loss against an independent formula, torch, timm, scipy or scikit-learn; and the knobs of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm.loss
import torch
from conftest import HERE, config
from scipy.spatial.distance import jensenshannon
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from comp import losses
from comp.engine import pages
from comp.engine.data import class_balance
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.tasks import loss_knobs
from comp.engine.tasks.kinds import TASKS, Head, HeadLoss

BATCH, CLASSES = 7, 5
OUTPUT = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
CODES = torch.tensor([0, 1, 2, 3, 4, 1, 0])
ONE_HOT = F.one_hot(CODES, CLASSES).float()
SHARES = torch.softmax(OUTPUT.flip(0), 1)
LABELS = (torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(1)) > 0.5).float()
VALUES = torch.linspace(-3, 4, BATCH)
GRADES = CODES.float()
NEAR = torch.tensor(
    [[np.exp(-((k - g) ** 2) / 2) for k in range(CLASSES)] for g in CODES.tolist()], dtype=torch.float32
)
NEAR = NEAR / NEAR.sum(1, keepdim=True)


def knobs(name: str, **given: Any) -> dict[str, Any]:
    return {**loss_knobs.DEFAULTS[name], **given}


def loss_of(name: str, output: Tensor, target: Tensor, **given: Any) -> Tensor:
    return losses.LOSSES[name](output, target, **knobs(name.removesuffix("_multiclass"), **given))


def one_column(output: Tensor) -> Tensor:
    return output[:, :1]


COUNTERPARTS: dict[str, tuple[Tensor, Tensor]] = {
    "label_smoothing": (
        loss_of("cross_entropy", OUTPUT, CODES, label_smoothing=0.1),
        torch.stack([timm.loss.LabelSmoothingCrossEntropy(0.1)(o[None], t[None]) for o, t in zip(OUTPUT, CODES, strict=True)]),
    ),
    "soft targets": (
        loss_of("cross_entropy", OUTPUT, SHARES),
        torch.stack([timm.loss.SoftTargetCrossEntropy()(o[None], t[None]) for o, t in zip(OUTPUT, SHARES, strict=True)]),
    ),
    "kl": (loss_of("kl", OUTPUT, SHARES), torch.nn.KLDivLoss(reduction="none")(OUTPUT.log_softmax(1), SHARES).sum(1)),
    "bce": (
        loss_of("bce", OUTPUT, LABELS, label_smoothing=0.2),
        timm.loss.BinaryCrossEntropy(smoothing=0.2, smooth_dense=True, reduction="none")(OUTPUT, LABELS),
    ),
    "bce, threshold": (
        loss_of("bce", OUTPUT, SHARES, target_threshold=0.3),
        timm.loss.BinaryCrossEntropy(smoothing=0, target_threshold=0.3, reduction="none")(OUTPUT, SHARES),
    ),
    "bce of classes": (
        loss_of("bce_multiclass", OUTPUT, CODES, label_smoothing=0.1),
        timm.loss.BinaryCrossEntropy(smoothing=0.1, reduction="none")(OUTPUT, CODES).mean(1),
    ),
    "focal": (
        loss_of("focal", OUTPUT, LABELS, gamma=2.0, alpha=0.25),
        # hard labels: Lin et al. 2017, written out
        torch.where(LABELS == 1, 0.25, 0.75) * -torch.log(torch.where(LABELS == 1, OUTPUT.sigmoid(), 1 - OUTPUT.sigmoid()))
        * (1 - torch.where(LABELS == 1, OUTPUT.sigmoid(), 1 - OUTPUT.sigmoid())) ** 2,
    ),
    "focal, soft": (
        loss_of("focal", OUTPUT, SHARES, gamma=1.5, label_smoothing=0.1),
        timm.loss.PolyBinaryCrossEntropy(epsilon=0, gamma=1.5, smoothing=0.1, reduction="none")(OUTPUT, SHARES),
    ),
    "focal of classes": (
        loss_of("focal_multiclass", OUTPUT, CODES, gamma=2.0),
        -((1 - OUTPUT.softmax(1)) ** 2 * OUTPUT.log_softmax(1)).gather(1, CODES[:, None])[:, 0],
    ),
    "poly": (
        loss_of("poly", OUTPUT, LABELS, epsilon=2.0, label_smoothing=0.1),
        timm.loss.PolyBinaryCrossEntropy(epsilon=2.0, smoothing=0.1, reduction="none")(OUTPUT, LABELS),
    ),
    "poly of classes": (
        loss_of("poly_multiclass", OUTPUT, CODES, epsilon=2.0, label_smoothing=0.1),
        timm.loss.PolyCrossEntropy(epsilon=2.0, smoothing=0.1, reduction="none")(OUTPUT, CODES),
    ),
    "asymmetric": (
        loss_of("asymmetric", OUTPUT, LABELS, label_smoothing=0.1),
        timm.loss.AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05, smoothing=0.1, reduction="none")(OUTPUT, LABELS),
    ),
    "asymmetric, with other knobs": (
        loss_of("asymmetric", OUTPUT, LABELS, gamma=2.0, gamma_pos=0.5, clip=0.2),
        timm.loss.AsymmetricLossMultiLabel(gamma_neg=2, gamma_pos=0.5, clip=0.2, smoothing=0.0, reduction="none")(OUTPUT, LABELS),
    ),
    "jensen_shannon": (  # with equal shares it is scipy's distance squared, scaled by 1 / (0.5 log 2)
        loss_of("jensen_shannon", OUTPUT, SHARES, js_weight=0.5),
        torch.tensor([jensenshannon(t, p) ** 2 for t, p in zip(SHARES.numpy(), OUTPUT.softmax(1).numpy(), strict=True)])
        / (0.5 * np.log(2)),
    ),
    "jensen_shannon of a small share": (
        loss_of("jensen_shannon", OUTPUT.double(), CODES, js_weight=1e-8), F.cross_entropy(OUTPUT.double(), CODES, reduction="none"),
    ),
    "mse": (loss_of("mse", one_column(OUTPUT), VALUES), (one_column(OUTPUT) - VALUES[:, None]) ** 2),
    "l1": (loss_of("l1", one_column(OUTPUT), VALUES), (one_column(OUTPUT) - VALUES[:, None]).abs()),
    "huber": (
        loss_of("huber", one_column(OUTPUT), VALUES, delta=0.7),
        torch.nn.HuberLoss(reduction="none", delta=0.7)(one_column(OUTPUT), VALUES[:, None]),
    ),
    "log_cosh": (
        loss_of("log_cosh", one_column(OUTPUT).double(), VALUES.double()),
        (one_column(OUTPUT).double() - VALUES[:, None].double()).cosh().log(),
    ),
    "cumulative": (  # above 0 yes, above 1 no
        loss_of("cumulative", torch.tensor([[3.0, -3.0]]), torch.tensor([1.0])), torch.tensor([2 * np.log1p(np.exp(-3.0))]),
    ),
    "soft_labels": (loss_of("soft_labels", OUTPUT, GRADES, sigma=1.0), -(NEAR * OUTPUT.log_softmax(1)).sum(1)),
    "bins": (  # 1.25 lies a quarter of the way from 1 to 2
        loss_of("bins", OUTPUT[:1], torch.tensor([1.25]), bins=5, range=[0.0, 4.0]),
        -(0.75 * OUTPUT[:1].log_softmax(1)[:, 1:2] + 0.25 * OUTPUT[:1].log_softmax(1)[:, 2:3]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTERPARTS)
def test_a_loss_equals_its_counterpart(case: str) -> None:
    ours, theirs = COUNTERPARTS[case]
    assert ours.shape == theirs.shape
    assert ours.numpy() == pytest.approx(theirs.numpy(), rel=2e-5, abs=2e-6)


TARGETS: dict[str, list[Tensor]] = {
    "multiclass": [CODES, SHARES],
    "retrieval": [CODES, SHARES],
    "binary": [LABELS[:, 0], SHARES[:, 0]],
    "multilabel": [LABELS, SHARES],
    "regression": [VALUES],
    "ordinal": [GRADES],
}
FITTING = [(task, name) for task, row in TASKS.items() for name in row.losses]
NEEDED: dict[str, dict[str, Any]] = {
    "bins": {"loss.range": [-10, 10]},
    "contrastive": {"sampling.m_per_class": 2},
    "triplet": {"sampling.m_per_class": 2},
}
PAIRS = ("contrastive", "triplet")


def samples_of(task: str, targets: Tensor) -> Samples:
    columns = targets.reshape(len(targets), -1).double().numpy()
    names = tuple(f"target.{i}" for i in range(columns.shape[1]))
    classes = tuple("abcde") if task != "regression" else ()
    outputs = classes if task in ("multiclass", "retrieval", "multilabel") else ("x",)
    frame = pd.DataFrame(columns, columns=list(names)).assign(source="train", weight=1.0)
    return Samples(frame, (Head("x", task, outputs, names, classes),), "")


def cfg_of(empty: Path, **dotted: Any) -> Any:
    return config(*(f"{key}={value}" for key, value in dotted.items()))


@pytest.mark.parametrize(("task", "name"), FITTING)
def test_every_loss_of_every_task_has_one_value_per_sample_and_a_finite_gradient(
    empty: Path, task: str, name: str
) -> None:
    """Also for confident wrong predictions."""
    cfg = cfg_of(empty, **{"loss.name": name, "loss.class_weights": "none", **NEEDED.get(name, {})})
    for target in TARGETS[task][: 1 if name in PAIRS else 2]:
        table = samples_of(task, target if target.ndim == 1 else LABELS)
        head = table.heads[0]
        (chosen,) = loss_knobs.head_losses(cfg, table.heads)
        total = losses.build_loss(cfg, table, np.arange(BATCH))
        width = head.spec.num_outputs(head, chosen)
        for output in (
            torch.randn(BATCH, width),
            torch.full((BATCH, width), 120.0),
            torch.eye(BATCH, width) * -300,
        ):
            output = output.clone().requires_grad_()
            each = total(output, [target.long() if target is CODES else target])
            assert each.shape == (BATCH,)
            losses.reduce(each, 1.0).backward()
            assert (
                output.grad is not None and torch.isfinite(output.grad).all() and torch.isfinite(each).all()
            )
        stored = head.spec.decode(output.detach().double().numpy(), chosen)
        assert (
            stored.shape == (BATCH, 0 if name in PAIRS else len(head.outputs)) and np.isfinite(stored).all()
        )


def test_bins_decode_to_the_value_they_encode() -> None:
    chosen = HeadLoss("bins", knobs("bins", bins=9, range=[-2.0, 6.0]))
    output = torch.zeros(1, 9, requires_grad=True)
    walk = torch.optim.Adam([output], 0.05)
    for _ in range(400):
        walk.zero_grad()
        losses.bins(output, torch.tensor([3.3]), **chosen.knobs).sum().backward()
        walk.step()
    assert TASKS["regression"].decode(output.detach().numpy(), chosen) == pytest.approx(
        np.array([[3.3]]), abs=0.02
    )


def test_ordinal_outputs_decode_to_expected_grades() -> None:
    sure = np.log(np.array([[1e-9, 0.5, 0.5, 1e-9]]))
    assert TASKS["ordinal"].decode(sure, HeadLoss("soft_labels", {})) == pytest.approx(np.array([[1.5]]))


def test_ohem_uses_the_samples_with_the_highest_loss() -> None:
    each = torch.tensor([0.1, 3.0, 0.2, 2.0, 0.3, 0.4, 9.0, 0.5], requires_grad=True)
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1])
    for share, selected in ((0.25, {1, 3}), (0.5, {1, 3, 5, 7}), (0.01, {1})):
        (slope,) = torch.autograd.grad(losses.reduce(each * weight, share), each)
        assert set(slope.nonzero().flatten().tolist()) == selected
        assert slope[sorted(selected)].tolist() == pytest.approx([1 / len(selected)] * len(selected))
    assert float(losses.reduce(each * weight, 1.0)) == pytest.approx(float((each * weight).mean()))


# --- rare classes -------------------------------------------------------------------------------------------


def test_class_weights_equal_sklearns_and_the_papers(empty: Path) -> None:
    """Computed from the training rows alone."""
    codes = torch.tensor([0.0] * 60 + [1.0] * 30 + [2.0] * 10 + [4.0] * 500)
    table, train_rows = samples_of("multiclass", codes), np.arange(100)
    weigh = class_balance.class_weights(
        cfg_of(empty, **{"loss.class_weights": "balanced"}), table.heads[0], table, train_rows
    )
    assert weigh is not None
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=codes[:100].numpy())
    assert weigh(torch.arange(5)).tolist() == pytest.approx([*wanted, 1, 1])
    assert float(weigh(torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]))) == pytest.approx(wanted[:2].mean())
    weigh = class_balance.class_weights(
        cfg_of(empty, **{"loss.class_weights": "effective", "loss.beta": 0.9}),
        table.heads[0],
        table,
        train_rows,
    )
    assert weigh is not None
    raw = np.array([0.1 / (1 - 0.9**n) for n in (60, 30, 10)])
    assert weigh(torch.arange(3)).tolist() == pytest.approx(raw / (raw @ [0.6, 0.3, 0.1]))
    assert float(weigh(codes[:100].long()).mean()) == pytest.approx(1, abs=1e-6)


def test_multilabel_class_weights_are_per_label_and_sign(empty: Path) -> None:
    labels = torch.zeros(100, 5)
    labels[:20, 0], labels[:50, 1] = 1, 1
    table = samples_of("multilabel", labels)
    cfg = cfg_of(empty, **{"loss.class_weights": "balanced"})
    weigh = class_balance.class_weights(cfg, table.heads[0], table, np.arange(100))
    assert weigh is not None and weigh(torch.ones(1, 5))[0, :2].tolist() == pytest.approx([100 / 40, 1])
    assert weigh(torch.zeros(1, 5))[0, :2].tolist() == pytest.approx([100 / 160, 1])
    plain, output = cfg_of(empty), torch.randn(100, 5)
    each = [losses.build_loss(c, table, np.arange(100))(output, [labels]) for c in (cfg, plain)]
    element = F.binary_cross_entropy_with_logits(output, labels, reduction="none")
    assert each[0].numpy() == pytest.approx((element * weigh(labels)).mean(1).numpy(), rel=1e-5)
    assert each[1].numpy() == pytest.approx(element.mean(1).numpy(), rel=1e-5)


CODES_2000 = np.repeat([0, 1, 2, 3], [1400, 400, 190, 10])


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["weighted", "under", "over"])
def test_sampled_class_shares_follow_strength(kind: str, strength: float) -> None:
    rows = np.arange(2000) + 7
    count = np.bincount(CODES_2000)
    wanted = {
        "weighted": 2000 * count ** (1 - strength) / (count ** (1 - strength)).sum(),
        "under": np.rint(count ** (1 - strength) * 10**strength),
        "over": np.rint(count ** (1 - strength) * 1400**strength),
    }[kind]  # fmt: skip
    epochs = [
        class_balance.BALANCES[kind](rows, CODES_2000, strength, np.random.default_rng(e)) for e in range(20)
    ]
    drawn = np.stack([np.bincount(CODES_2000[listed - 7], minlength=4) for listed in epochs])
    assert len({len(listed) for listed in epochs}) == 1
    if kind == "weighted":
        share = wanted / 2000
        error = np.sqrt(2000 * share * (1 - share) / 20)
        assert (np.abs(drawn.mean(axis=0) - wanted) < 3 * error).all()
    else:
        assert (drawn == wanted).all()
    if kind == "under":
        assert all(len(set(listed.tolist())) == len(listed) for listed in epochs)
        assert len(set(np.concatenate(epochs).tolist())) > 2 * len(epochs[0]), "others in every epoch"
    if kind == "over":
        assert all(set(listed.tolist()) == set(rows.tolist()) for listed in epochs), "every row at least once"
        often = [np.bincount(listed - 7) for listed in epochs]
        assert all(np.ptp(each[code == CODES_2000]) <= 1 for each in often for code in range(4))
    assert not np.array_equal(epochs[0], epochs[1])


def test_m_per_class_puts_pairs_into_a_batch() -> None:
    rows, random = np.arange(2000), np.random.default_rng(0)
    listed = random.permutation(rows)
    listed = class_balance.m_per_class(listed, CODES_2000[listed], 4, random)
    assert sorted(listed.tolist()) == rows.tolist()
    full = CODES_2000[listed][: 2000 // 4 * 4 - 8].reshape(-1, 4)
    assert (full == full[:, :1]).all() and len(set(full[:50, 0].tolist())) > 1


def test_balance_of_multilabel_and_regression_targets(empty: Path) -> None:
    labels = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1.0]])
    table = samples_of("multilabel", labels)
    assert class_balance.class_codes(table.heads[0], table, np.arange(4)).tolist() == [1, 0, 5, 4]
    values = samples_of("regression", VALUES)
    with pytest.raises(UserError, match="regression, which has no classes"):
        class_balance.make_sampler(cfg_of(empty, **{"sampling.balance": "over"}), values, np.arange(BATCH))


# --- knobs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("multiclass", {"loss.gamma": 1}, "loss.gamma: 1.0 has no effect on loss cross_entropy; only focal and asymmetric use it"),
        ("multiclass", {"loss.name": "focul"}, "no 'focul'; the nearest is focal"),
        ("multiclass", {"loss.name": "focal", "loss.alpha": 0.3}, "loss.alpha"),
        ("regression", {"loss.delta": 0.5, "loss.name": "mse"}, "loss.delta: 0.5 has no effect on loss mse; only huber uses it"),
        ("regression", {"loss.label_smoothing": 0.1}, "loss.label_smoothing: 0.1 has no effect"),
        ("regression", {"loss.class_weights": "balanced"}, "loss.class_weights: balanced has no effect on regression"),
        ("regression", {"loss.name": "bins"}, r"loss.range: bins needs .*\[0, 100\]"),
        ("multilabel", {"loss.target_threshold": 0.2, "loss.label_smoothing": 0.1}, "undone by loss.target_threshold"),
        ("multiclass", {"loss.class_weights": "balanced", "loss.beta": 0.9}, "loss.beta"),
        ("retrieval", {"loss.name": "triplet"}, "set sampling.m_per_class"),
        ("retrieval", {"loss.name": "triplet", "sampling.m_per_class": 2, "select.name": "best"}, "nothing can be selected"),
        ("multiclass", {"model.embedding_size": 64}, "model.embedding_size: 64 has no effect on loss cross_entropy; only arcface, contrastive and triplet use it"),
        ("retrieval", {"loss.name": "focal", "predict.n_neighbors": 3}, "predict.n_neighbors: 3 has no effect"),
        ("multiclass", {"sampling.strength": 0.5}, "sampling.strength: 0.5 has no effect"),
        ("multiclass", {"sampling.balance": "over", "loss.class_weights": "balanced"}, "both compensate for rare classes"),
    ],
)  # fmt: skip
def test_a_knob_without_effect_is_an_error(empty: Path, task: str, given: dict[str, Any], words: str) -> None:
    target = TARGETS[task][0]
    with pytest.raises(UserError, match=words):
        loss_knobs.head_losses(cfg_of(empty, **given), samples_of(task, target).heads)


def test_every_knob_has_an_effect(empty: Path) -> None:
    """Changed from its default, each knob of each loss changes the value of the loss."""
    other: dict[str, Any] = {
        "range": [-20.0, 20.0],
        "bins": 16,
        "sub_centers": 3,
        "target_threshold": 0.4,
        "alpha": 0.3,
        "margin_rare": 0.5,
    }
    seen = 0
    for task, name in FITTING:
        table = samples_of(task, LABELS if task == "multilabel" else TARGETS[task][0])
        target = TARGETS[task][0 if name in PAIRS else -1]
        base: dict[str, Any] = {"loss.name": name, **NEEDED.get(name, {})}
        for knob, own in loss_knobs.DEFAULTS[name].items():
            if knob == "sub_centers" or (knob == "alpha" and task in ("multiclass", "retrieval")):
                continue
            value = other.get(knob, 0.3 if not own else own * 0.7)
            heard = []
            for given in (base, base | {f"loss.{knob}": value}):
                cfg = cfg_of(empty, **given)
                (chosen,) = loss_knobs.head_losses(cfg, table.heads)
                torch.manual_seed(0)
                output = torch.randn(BATCH, table.heads[0].spec.num_outputs(table.heads[0], chosen))
                heard.append(losses.build_loss(cfg, table, np.arange(BATCH))(output, [target]))
            assert not torch.allclose(heard[0], heard[1]), (task, name, knob)
            seen += 1
    assert seen > 15


def test_comments_of_base_yaml_give_the_default_of_each_knob() -> None:
    """null means the default of the loss, which the comment beside the knob names."""
    lines = (HERE / "configs/base.yaml").read_text()
    section = lines[lines.index("\nloss:") : lines.index("\noptim:")]
    for name, takes in loss_knobs.DEFAULTS.items():
        for knob, own in takes.items():
            comment = re.search(rf"^  {knob}: .*#(.*)$", section, re.M)
            assert comment, knob
            if knob != "label_smoothing":
                assert re.search(rf"{name}\b.*{'off|needs' if own is None else own}", comment[1]), (
                    name,
                    knob,
                )
        assert name in section


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_custom_loss_must_return_one_value_a_sample(
    monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction=reduction)

    monkeypatch.setattr(pages.competition, "loss", loss, raising=False)
    custom = losses._custom_loss()
    if reduction == "none":
        assert torch.equal(custom(OUTPUT, CODES), loss(OUTPUT, CODES))
        return
    with pytest.raises(UserError) as caught:
        custom(OUTPUT, CODES)
    error = caught.value
    assert (error.code, error.where, error.key) == ("loss-shape", "comp/competition.py", "loss")
    assert f"({BATCH},)" in error.what and 'reduction="none"' in error.remedy
