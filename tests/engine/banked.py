"""A project with prediction files and no images: what the tests of bank, ensembles and overview stand on.

The members are made from a hidden truth with noise, so that averages really are better.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from comp.engine.bank import bank, predictions, score
from comp.engine.bank.predictions import PredictionSet
from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.data import folds, samples
from comp.engine.data.folds import Folds
from comp.engine.data.samples import Samples
from comp.engine.ensemble.context import Setup
from comp.engine.run import fingerprint
from comp.engine.store import artifacts, paths
from comp.engine.tasks.kinds import Head, log_softmax

TRAIN, TEST, K = 400, 150, 5
CLASSES = ("ant", "bee", "cat")
HEADS = {
    "binary": Head("label", "binary", ("label",), ("target.label",), ("0", "1")),
    "multiclass": Head("label", "multiclass", CLASSES, ("target.label",), CLASSES),
    "multilabel": Head("label", "multilabel", CLASSES, tuple(f"target.{each}" for each in CLASSES)),
    "regression": Head("label", "regression", ("label",), ("target.label",)),
    "ordinal": Head("label", "ordinal", ("label",), ("target.label",), ("0", "1", "2", "3")),
}
METRIC = {
    "binary": "roc_auc", "multiclass": "accuracy", "multilabel": "mean_column_auc", "regression": "rmse", "ordinal": "qwk",
}  # fmt: skip


class Project(NamedTuple):
    root: Path
    cfg: Config
    samples: Samples
    folds: Folds

    @property
    def head(self) -> Head:
        return self.samples.heads[0]

    @property
    def setup(self) -> Setup:
        return Setup(self.cfg, self.samples, self.folds)


def lay_out(
    root: Path,
    task: str = "multiclass",
    metric: str = "",
    seed: int = 0,
    shift: int = 0,
    rule: str = "others",
) -> Project:
    """Samples and folds of a task; `shift` gives other folds, the rule `earlier` folds by time."""
    file = root / "configs" / "competition.yaml"
    text = (
        file.read_text()
        .replace("task: multiclass", f"task: {task}")
        .replace("metric: accuracy", f"metric: {metric or METRIC[task]}")
    )
    file.write_text(text)
    head, random = HEADS[task], np.random.default_rng(seed)
    labels = max(len(head.classes), 2)
    target = (
        random.normal(size=TRAIN + TEST) if task == "regression" else random.integers(0, labels, TRAIN + TEST)
    )
    ids = [f"{i:05d}" for i in range(TRAIN + TEST)]
    frame = pd.DataFrame({
        "id": ids, "images": [[f"{i}.png"] for i in ids], "weight": 1.0, "source": ["train"] * TRAIN + ["test"] * TEST,
        "row": ids, "time": np.arange(TRAIN + TEST, dtype=float), "target.label": target.astype(float),
    })  # fmt: skip
    if task == "multilabel":
        frame = frame.drop(columns="target.label")
        frame[list(head.columns)] = random.integers(0, 2, (len(ids), len(CLASSES))).astype(float)
    samples.save(frame, (head,))
    table = samples.load()
    fold = np.arange(TRAIN) * K // TRAIN if rule == "earlier" else (np.arange(TRAIN) + shift) % K
    lines = pd.DataFrame({"id": ids[:TRAIN], "repeat": 0, "fold": fold})
    meta = {
        "scheme": "kfold",
        "k": K,
        "repeats": 1,
        "seed": 0,
        "rule": rule,
        "gap": 0.0,
        "samples": table.hash,
    }
    folds.save(lines, meta)
    return Project(root, resolve.load(root, "base").config, table, folds.load(table))


def values(project: Project, rows: Any, noise: float, seed: int) -> Any:
    """As a network would say it: the truth (of test rows too) under noise, as stored."""
    head, random = project.head, np.random.default_rng(seed)
    if head.task == "multilabel":
        both = 4 * project.samples.targets(head)[rows] - 2
        return (both + random.normal(0, noise, both.shape)).astype(np.float32)
    truth = project.samples.targets(head)[rows, 0]
    if head.task == "multiclass":
        hot = np.eye(len(head.outputs))[truth.astype(int)]
        return log_softmax(2 * hot + random.normal(0, noise, hot.shape)).astype(np.float32)
    scale = 4 * truth - 2 if head.task == "binary" else truth
    return (scale + random.normal(0, noise, len(truth)))[:, None].astype(np.float32)


def member(
    project: Project,
    address: str,
    noise: float = 1.5,
    seed: int = 1,
    kinds: tuple[str, ...] = bank.KINDS,
    **facts: Any,
) -> Path:
    """A finished run or member of one, with its score and config."""
    folder = bank.folder(address)
    run, _, name = address.partition(":")
    for kind in kinds:
        rows = predictions.rows_of(kind, project.samples, project.folds)
        fold = project.folds.assignment[0][rows].astype(np.int16) if kind == "oof" else None
        said = {project.head.name: values(project, rows, noise, seed)}
        meta = predictions.build_meta(
            kind, project.samples, project.folds, {"run": run, "member": name, "config": "c"} | facts
        )
        bank.write(
            folder / f"{kind}.arrow", predictions.PredictionSet(rows.astype(np.int32), fold, said, meta)
        )
    if "oof" in kinds:
        score.write(
            folder,
            project.cfg,
            project.samples,
            project.folds,
            bank.load(address, "oof", project.samples, project.folds),
        )
    if not name:
        artifacts.write_text(folder / "config.yaml", resolve.to_yaml(project.cfg))
        artifacts.add_to_manifest(folder / "config.yaml")
    return folder


def run(project: Project, name: str, seeds: int = 1, cfg: Config | None = None, **facts: Any) -> None:
    """The parts of a finished run that a teacher needs: its config and test predictions of each model."""
    folder, cfg = paths.run_folder(name), cfg or project.cfg
    artifacts.write_text(folder / "config.yaml", resolve.to_yaml(cfg))
    artifacts.write_json(folder / "inputs.json", fingerprint.input_hashes(cfg, project.folds) | facts)
    artifacts.add_to_manifest(folder / "config.yaml", folder / "inputs.json")
    for seed in range(seeds):
        for number in range(project.folds.count):
            said(project, name, seed, number, 100 * seed + number)


def said(project: Project, name: str, seed: int, number: int, noise: int) -> None:
    rows, place = project.samples.positions("test"), paths.fold_folder(name, seed, number)
    weights = (
        bank.weights_of(place)
        if (place / bank.WEIGHTS).exists()
        else {f"{name}/seed{seed}/fold{number}": "w"}
    )
    meta = predictions.build_meta(
        "test", project.samples, project.folds, {"run": name, "config": "c", "weights": weights}
    )
    heads = {project.head.name: values(project, rows, 1.5, noise)}
    bank.write(place / "test.arrow", predictions.PredictionSet(rows.astype(np.int32), None, heads, meta))


def digits(root: Path) -> Project:
    """The practice competition; its models, if any are made here, take test rows for a 3."""
    table = samples.load()
    cfg = resolve.load(root, "exp001").config
    filled = table.frame.assign(**{"target.label": table.frame["target.label"].fillna(3.0)})
    return Project(root, cfg, samples.Samples(filled, table.heads, table.hash), folds.load(table))


def teacher(root: Path) -> None:
    """runs/teacher with untrained weights of fold 1, which suffice as a teacher, and its labels."""
    import torch

    from comp import models
    from comp.engine.extras import pseudo_labels

    project = digits(root)
    torch.manual_seed(0)
    network = models.build(project.cfg, project.samples.heads, pretrained=False)
    models.save_weights(network, paths.fold_folder("teacher", 0, 1) / bank.WEIGHTS)
    run(project, "teacher")
    pseudo_labels.write("teacher", "teacher", pseudo_labels.Selection(None, 0.2, True, 1.0))


def declare(project: Project, name: str, text: str) -> None:
    (project.root / "configs" / "ensembles" / f"{name}.yaml").write_text(text)


def three(project: Project) -> Project:
    for i, noise in enumerate((1.2, 1.5, 2.0)):
        member(project, f"exp00{i + 1}", noise=noise, seed=10 + i)
    return project


def made(
    project: Project, text: str, members: str = "[exp001, exp002, exp003]", name: str = "blend001"
) -> dict[str, Any]:
    """An ensemble declared, and made."""
    from comp.engine.ensemble.blend import blend

    declare(project, name, f"members: {members}\n{text}")
    return blend(name)


def load(project: Project, address: str, kind: str = "oof") -> PredictionSet:
    return bank.load(address, kind, project.samples, project.folds)


def recipe_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = artifacts.read_json(paths.ensemble_folder(name) / "apply.json")
    return found
