"""comp features: a frozen backbone looks at every picture once, and heads are trained on what it saw, in seconds.

    runs/<run>/features.npy      (samples, features) float32, sealed with what they were made of; other weights, pictures,
                                 sizes or samples since are refused, not used
    runs/<run>/frozen/           the backbone's weights; seed0/fold3/<head>/ those of a head, as numbers: comp/engine/run/frozen_heads.py
    runs/<run>/members/<head>/   each head as a member with OOF and test predictions: exp001:logistic. Blends and kernels take it

Each head is fitted on the training part of a fold and predicts its validation rows, so its score is a CV like any other.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from tqdm import tqdm

from comp import models, transforms
from comp.engine import hardware, pages
from comp.engine.bank import bank, predictions, score
from comp.engine.config import experiments, resolve
from comp.engine.config.resolve import nearest
from comp.engine.config.schema import Config
from comp.engine.data import image_reader
from comp.engine.data.samples import Samples
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.run import fingerprint, frozen_heads, normalize, pretrained, runner
from comp.engine.run.context import Context
from comp.engine.run.evaluate import forward_rows
from comp.engine.store import artifacts, locks, paths
from comp.engine.tasks.kinds import Head

FILE = frozen_heads.FILE
SPEED = "speed.json"
Array = NDArray[np.float64]


def features(run: str, overrides: list[str], heads: str, fresh: bool = False) -> None:
    names = [name.strip() for name in heads.split(",")]
    for name in names:
        if name not in HEADS:
            raise Refused(
                f"--heads: there is no {name!r}; the nearest is {nearest(name, HEADS)[0]}, there are {', '.join(HEADS)}"
            )
    if changed := resolve.changes_results(overrides):
        raise Refused(
            f"{' '.join(changed)} changes results: write it into an experiment of its own, features are kept by name"
        )
    loaded = experiments.load(run, overrides, claimed=run)
    cfg = loaded.config
    _refuse(cfg)
    hardware.set_threads(cfg.train.threads)
    # Made anew, the features leave no head of the old ones behind.
    old = [paths.member_folder(run, name) for name in HEADS] if fresh else []
    fingerprint.validate_images(run, cfg, old)
    context = runner.gather(cfg, loaded=loaded)
    fingerprint.claim(run, cfg, context.folds, fingerprint.resume_command(run), old)
    with locks.lock(paths.run_folder(run), "features"):
        seen = of_run(context, run, fresh)
    for name in names:
        began = time.perf_counter()
        record = member(context, run, name, seen)
        print(f"{run}:{name}: {score.summary(record)}, {time.perf_counter() - began:.1f} s")
    print(f"written: {paths.relative(paths.run_folder(run))}/members/{{{','.join(names)}}}")
    print(f"next: comp bank, or blend them: {', '.join(f'{run}:{name}' for name in names)}")


def _refuse(cfg: Config) -> None:
    if pages.get("model") is not None:
        raise Refused(
            "comp features: model(cfg, outputs) of comp/competition.py does not say what its features are; timm's models do"
        )
    for key, value, good in (
        ("data.normalize", cfg.data.normalize == "data", "model"),
        ("data.pseudo", cfg.data.pseudo is not None, "null"),
        ("distill.teacher", cfg.distill.teacher is not None, "null"),
        ("data.whiten", cfg.data.whiten != "none", "none"),
        ("model.pretrained", bool(pretrained.source_run(cfg)), "true, false or a file"),
        ("model.metadata", cfg.model.metadata, "false"),
        ("model.pool", cfg.model.pool == "attention", "mean"),
        ("model.global_pool", cfg.model.global_pool == "gem", "default"),
    ):
        if value:
            raise Refused(
                f"{key}: features are of pictures alone, the same for all folds, with nothing learned here; set it to {good}"
            )


def of_run(context: Context, run: str, fresh: bool) -> NDArray[np.float32]:
    """(samples, features): kept, if they are of these pictures and these weights; made otherwise."""
    cfg, file = context.cfg, paths.run_folder(run) / FILE
    torch.manual_seed(fold_in(cfg.train.seeds[0], 3))
    backbone = models.headless(cfg, cfg.model.pretrained is True, context.loader).to(context.device)
    pretrained.begin(backbone, cfg, cfg.train.seeds[0], "full")  # weights of a file, where there is one
    now = made_of(cfg, context.samples, backbone)
    if not fresh and (entry := artifacts.manifest_entry(file)):
        changed = [what for what, value in now.items() if entry.get(what) != value]
        if changed:
            raise Refused(
                f"{paths.relative(file)}: stale, made of other {' and other '.join(changed)}; comp features {run} --fresh makes them again"
            )
        kept: NDArray[np.float32] = np.load(artifacts.verified(file))
        print(f"{paths.relative(file)}: {len(kept):,} samples, {kept.shape[1]} features, kept from before")
        return kept
    rows = np.arange(len(context.samples.frame))
    seen = transforms.Preprocess(normalize.build(cfg, backbone, context.device))
    began = time.perf_counter()
    with tqdm(
        total=len(rows),
        desc="features",
        unit="image",
        leave=False,
        disable=None if cfg.machine.progress else True,
    ) as bar:
        raw, damaged = forward_rows(
            backbone, context.loader, rows, cfg.predict.batch_size, seen, cfg.train.amp, on_batch=bar.update
        )
    if damaged:
        names = context.samples.frame["id"]
        raise Refused(
            *(
                f"sample {names.iloc[i]}: {reason}; comp check lists every such file"
                for i, reason in damaged.items()
            )
        )
    made = raw[0]
    models.save_weights(backbone, frozen_heads.backbone_of(run))
    took = time.perf_counter() - began
    artifacts.write_json(frozen_heads.backbone_of(run).with_name(SPEED), {"test": took / max(1, len(rows))})
    with artifacts.atomic(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, made)
    artifacts.add_to_manifest(file, **now)
    print(
        f"{paths.relative(file)}: {len(made):,} samples, {made.shape[1]} features, {time.perf_counter() - began:.0f} s"
    )
    return made


def made_of(cfg: Config, samples: Samples, backbone: torch.nn.Module) -> dict[str, Any]:
    """What features depend on, in the words of the refusal."""
    weights = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    reader = image_reader.from_config(cfg)
    files = sorted({image for images in samples.frame["images"] for image in images[: cfg.data.images]})
    return {
        "weights": weights.hexdigest()[:16],
        "sizes or decoding": reader.key,
        "pictures": artifacts.digest([[name, *reader.stamp(name)] for name in files]),
        "samples": samples.hash,
        "knobs": artifacts.digest(
            [
                cfg.model.name,
                cfg.model.options,
                cfg.model.pool,
                cfg.data.images,
                cfg.data.normalize,
                cfg.train.amp,
            ]
        ),
    }


def member(context: Context, run: str, name: str, seen: NDArray[np.float32]) -> dict[str, Any]:
    """Fitted fold by fold, each fold's head kept like a checkpoint; the test rows get the mean over folds, as from any run."""
    cfg, table, folds = context.cfg, context.samples, context.folds
    test, seed = table.positions("test"), cfg.train.seeds[0]
    backbone = artifacts.manifest_entry(frozen_heads.backbone_of(run))
    assert backbone is not None
    facts = {
        "run": run,
        "member": name,
        "config": artifacts.digest(resolve.identity(cfg)),
        "tta": ["identity"],
        "space": cfg.predict.space,
    }
    sets: dict[str, list[predictions.PredictionSet]] = {"oof": [], "test": []}
    looked = _seconds(run)
    for number in range(folds.count):
        taught, scored = folds.split(number)
        taught = np.unique(taught)
        place = paths.fold_folder(run, seed, number) / name
        numbers: dict[str, NDArray[Any]] = {
            "middle": seen[taught].mean(0),
            "spread": seen[taught].std(0) + 1e-6,
        }
        x = frozen_heads.standardized(numbers, seen[taught])
        for head in table.heads:
            numbers |= fit(name, head, x, table.targets(head)[taught])
        near = {"rows": taught.astype(np.int64)} if name == "knn" else {}
        frozen_heads.write(place / bank.WEIGHTS, name, numbers | near, backbone["sha256"])
        began = time.perf_counter()
        numbers |= {"near": seen[taught]} if near else {}
        for kind, rows in (("oof", scored), ("test", test)):
            said = {
                head.name: head.row.store(frozen_heads.outputs(head, numbers, seen[rows])).astype(np.float32)
                for head in table.heads
            }
            fold = np.full(len(rows), number, np.int16) if kind == "oof" else None
            own = facts | {"seed": seed, "weights": bank.weights_of(place), "damaged": 0}
            meta = predictions.build_meta(kind, table, folds, own)
            part = predictions.PredictionSet(rows.astype(np.int32), fold, said, meta)
            sets[kind].append(bank.read(bank.write(place / f"{kind}.arrow", part), table, folds))
        answered = (time.perf_counter() - began) / max(1, len(scored) + len(test))
        artifacts.write_json(place / SPEED, dict.fromkeys(("oof", "test"), looked + answered))
    folder = paths.member_folder(run, name)
    for kind, parts in sets.items():
        merged = predictions.merge(parts, table, folds, cfg.predict.space, facts=facts)
        bank.write(folder / f"{kind}.arrow", merged)
    return score.write(folder, cfg, table, folds, bank.read(folder / "oof.arrow", table, folds))


def _seconds(run: str) -> float:
    """What the backbone took for a picture when the features were made."""
    file = frozen_heads.backbone_of(run).with_name(SPEED)
    return float(artifacts.read_json(file)["test"]) if file.exists() else 0.0


def fitted(name: str, head: Head, x: Array, target: Array) -> Callable[[Array], Array]:
    """(rows, features) -> (rows, outputs): what the task's `store` takes."""
    numbers = fit(name, head, x, target) | {"middle": np.zeros(1), "spread": np.ones(1)}
    numbers |= {"near": x} if name == "knn" else {}
    return lambda rows: frozen_heads.outputs(head, numbers, rows)


def fit(name: str, head: Head, x: Array, target: Array) -> dict[str, NDArray[Any]]:
    """The numbers that comp/engine/run/frozen_heads.py asks, each under the name of its head."""
    if head.row.space != "logit":
        middle, spread = target.mean(0), target.std(0) + 1e-12
        found = {"shift": middle, "scale": spread}
        y = (target - middle) / spread
        found |= {"y": y.astype(np.float32)} if name == "knn" else _layers(VALUES[name](), x, y)
        return _under(head.name, found)
    if head.task in ("multilabel", "binary"):
        columns = [(target[:, k] >= 0.5).astype(np.int64) for k in range(target.shape[1])]
        each = [_under(f"{head.name}/{k}", _of_class(name, x, codes)) for k, codes in enumerate(columns)]
        return {key: value for numbers in each for key, value in numbers.items()}
    codes = target.argmax(1) if target.shape[1] > 1 else target[:, 0].astype(np.int64)
    return _under(head.name, _of_class(name, x, codes))


def _under(name: str, numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"{name}/{key}": value for key, value in numbers.items()}


def _of_class(name: str, x: Array, codes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Of the classes that the training part has."""
    present, place = np.unique(codes, return_inverse=True)
    found: dict[str, NDArray[Any]] = {"present": present.astype(np.int64)}
    if len(present) == 1:
        return found
    if name == "knn":
        return found | {"y": np.eye(len(present), dtype=np.float32)[place]}
    return found | _layers(HEADS[name](), x, codes)


def _layers(estimator: Any, x: Array, y: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Matrices and biases, from features to decisions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is scored out of fold, converged or not
        estimator.fit(x, y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)
    weights = getattr(estimator, "coefs_", None) or [np.atleast_2d(estimator.coef_).T]
    biases = getattr(estimator, "intercepts_", None) or [np.atleast_1d(estimator.intercept_)]
    numbers: dict[str, NDArray[Any]] = {}
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        numbers |= {f"weight{layer}": np.asarray(weight), f"bias{layer}": np.asarray(bias)}
    return numbers


def _linear() -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, max_iter=500)


def _mlp() -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(
        hidden_layer_sizes=(256,), alpha=1e-2, learning_rate_init=3e-3, max_iter=200, random_state=0
    )


def _knn() -> Any:
    raise AssertionError("its numbers are the training rows")


HEADS: dict[str, Callable[[], Any]] = {"linear": _linear, "logistic": _logistic, "mlp": _mlp, "knn": _knn}


def _ridge() -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-1, 4, 12))


def _mlp_value() -> Any:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(
        hidden_layer_sizes=(256,), alpha=1e-2, learning_rate_init=3e-3, max_iter=200, random_state=0
    )


def _no_value() -> Any:
    raise Refused(
        "--heads: logistic says probabilities, and the target is a value; leave it out: linear, mlp, knn"
    )


VALUES: dict[str, Callable[[], Any]] = {
    "linear": _ridge,
    "logistic": _no_value,
    "mlp": _mlp_value,
    "knn": _knn,
}
