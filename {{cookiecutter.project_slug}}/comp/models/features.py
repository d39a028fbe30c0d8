"""comp features: a frozen backbone looks at every picture once, and heads are trained on what it saw, in seconds.

    runs/<run>/features.npy      (samples, features) float32, sealed with what they were made of; other weights, pictures,
                                 sizes or samples since are refused, not used
    runs/<run>/members/<head>/   each head as a member with OOF and test predictions: exp001:logistic

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

from comp import bank, config, identity, jobs, machine, own, predictions, score, store
from comp.config import Config, Refused, nearest
from comp.prepare import making
from comp.samples import Samples
from comp.tasks import Head
from comp.train import augment, model, normal, transfer
from comp.train.draws import mixed
from comp.train.evaluate import outputs_of
from comp.train.loop import Material

FILE = "features.npy"
NEIGHBOURS = 15
Array = NDArray[np.float64]
# (features, target) -> features -> (rows, outputs): probabilities, or values
Fit = Callable[[Array, NDArray[Any]], Callable[[Array], Array]]


def features(run: str, overrides: list[str], heads: str, fresh: bool = False) -> None:
    names = [name.strip() for name in heads.split(",")]
    for name in names:
        if name not in HEADS:
            raise Refused(
                f"--heads: there is no {name!r}; the nearest is {nearest(name, HEADS)[0]}, there are {', '.join(HEADS)}"
            )
    if changed := config.changes_results(overrides):
        raise Refused(
            f"{' '.join(changed)} changes results: write it into an experiment of its own, features are kept by name"
        )
    cfg = config.load(store.root(), run, overrides).config
    _refuse(cfg)
    machine.settle(cfg.train.threads)
    material = jobs.gather(cfg)
    identity.claim(run, cfg, material.folds, f"comp features {run}")
    with store.lock(store.run_folder(run), "features"):
        seen = of_run(material, run, fresh)
    for name in names:
        began = time.perf_counter()
        record = member(material, run, name, seen)
        print(f"{run}:{name}: {score.sentence(record)}, {time.perf_counter() - began:.1f} s")
    print(f"written: {store.shown(store.run_folder(run))}/members/{{{','.join(names)}}}")
    print(f"next: comp bank, or blend them: {', '.join(f'{run}:{name}' for name in names)}")


def _refuse(cfg: Config) -> None:
    if own.get("model") is not None:
        raise Refused(
            "comp features: model(cfg, outputs) of comp/competition.py does not say what its features are; timm's models do"
        )
    for key, value, good in (
        ("data.normalise", cfg.data.normalise == "data", "model"),
        ("data.pseudo", cfg.data.pseudo is not None, "null"),
        ("distill.teacher", cfg.distill.teacher is not None, "null"),
        ("data.whiten", cfg.data.whiten != "none", "none"),
        ("model.pretrained", bool(transfer.run_of(cfg)), "true, false or a file"),
        ("model.metadata", cfg.model.metadata, "false"),
        ("model.pool", cfg.model.pool == "attention", "mean"),
        ("model.global_pool", cfg.model.global_pool == "gem", "default"),
    ):
        if value:
            raise Refused(
                f"{key}: features are of pictures alone, the same for all folds, with nothing learned here; set it to {good}"
            )


def of_run(material: Material, run: str, fresh: bool) -> NDArray[np.float32]:
    """(samples, features): kept, if they are of these pictures and these weights; made otherwise."""
    cfg, file = material.cfg, store.run_folder(run) / FILE
    torch.manual_seed(mixed(cfg.train.seeds[0], 3))
    backbone = model.headless(cfg, cfg.model.pretrained is True, material.feed).to(material.device)
    transfer.begin(backbone, cfg, cfg.train.seeds[0], "full")  # weights of a file, where there is one
    now = made_of(cfg, material.samples, backbone)
    if not fresh and (entry := store.sealed(file)):
        changed = [what for what, value in now.items() if entry.get(what) != value]
        if changed:
            raise Refused(
                f"{store.shown(file)}: stale, made of other {' and other '.join(changed)}; comp features {run} --fresh makes them again"
            )
        kept: NDArray[np.float32] = np.load(store.verified(file))
        print(f"{store.shown(file)}: {len(kept):,} samples, {kept.shape[1]} features, kept from before")
        return kept
    rows = np.arange(len(material.samples.frame))
    seen = augment.Seen(normal.of(cfg, backbone, material.device))
    began = time.perf_counter()
    with tqdm(
        total=len(rows),
        desc="features",
        unit="image",
        leave=False,
        disable=None if cfg.machine.progress else True,
    ) as bar:
        raw, damaged = outputs_of(
            backbone, material.feed, rows, cfg.predict.batch_size, seen, cfg.train.amp, on_batch=bar.update
        )
    if damaged:
        names = material.samples.frame["id"]
        raise Refused(
            *(
                f"sample {names.iloc[i]}: {reason}; comp check lists every such file"
                for i, reason in damaged.items()
            )
        )
    made = raw[0]
    with store.writing(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, made)
    store.seal(file, **now)
    print(
        f"{store.shown(file)}: {len(made):,} samples, {made.shape[1]} features, {time.perf_counter() - began:.0f} s"
    )
    return made


def made_of(cfg: Config, samples: Samples, backbone: torch.nn.Module) -> dict[str, Any]:
    """What features depend on, in the words of the refusal."""
    weights = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    how = making.of(cfg)
    files = sorted({image for images in samples.frame["images"] for image in images[: cfg.data.images]})
    return {
        "weights": weights.hexdigest()[:16],
        "sizes or decoding": how.key,
        "pictures": store.digest([[name, *how.stamp(name)] for name in files]),
        "samples": samples.hash,
        "knobs": store.digest(
            [cfg.model.name, cfg.model.pool, cfg.data.images, cfg.data.normalise, cfg.train.amp]
        ),
    }


def member(material: Material, run: str, name: str, seen: NDArray[np.float32]) -> dict[str, Any]:
    """Fitted fold by fold; the test rows get the mean over folds, as from any run."""
    cfg, table, folds = material.cfg, material.samples, material.folds
    test = table.positions("test")
    facts = {
        "run": run,
        "member": name,
        "config": store.digest(config.identity(cfg)),
        "tta": ["identity"],
        "space": cfg.predict.space,
    }
    sets: dict[str, list[predictions.PredictionSet]] = {"oof": [], "test": []}
    for number in range(folds.count):
        taught, scored = folds.split(number)
        taught = np.unique(taught)
        middle, spread = seen[taught].mean(0), seen[taught].std(0) + 1e-6
        scaled = ((seen - middle) / spread).astype(np.float64)
        said: dict[str, dict[str, NDArray[np.float32]]] = {"oof": {}, "test": {}}
        for head in table.heads:
            ask = fitted(name, head, scaled[taught], table.targets(head)[taught])
            for kind, rows in (("oof", scored), ("test", test)):
                said[kind][head.name] = head.row.store(ask(scaled[rows])).astype(np.float32)
        for kind, rows in (("oof", scored), ("test", test)):
            fold = np.full(len(rows), number, np.int16) if kind == "oof" else None
            meta = predictions.meta(kind, table, folds, facts)
            sets[kind].append(predictions.PredictionSet(rows.astype(np.int32), fold, said[kind], meta))
    folder = store.member_folder(run, name)
    for kind, parts in sets.items():
        merged = predictions.merge(parts, table, folds, cfg.predict.space, facts=facts)
        bank.write(folder / f"{kind}.arrow", merged)
    return score.write(folder, cfg, table, folds, bank.read(folder / "oof.arrow", table, folds))


def fitted(name: str, head: Head, x: Array, target: Array) -> Callable[[Array], Array]:
    """(rows, features) -> (rows, outputs): what the task's `store` takes."""
    if head.row.space != "logit":
        return VALUES[name](x, target)
    if head.task in ("multilabel", "binary"):
        each = [_of_class(name, x, (target[:, k] >= 0.5).astype(np.int64), 2) for k in range(target.shape[1])]
        return lambda rows: np.column_stack([ask(rows)[:, 1] for ask in each])
    codes = target.argmax(1) if target.shape[1] > 1 else target[:, 0].astype(np.int64)
    return _of_class(name, x, codes, len(head.outputs))


def _of_class(name: str, x: Array, codes: NDArray[np.int64], classes: int) -> Callable[[Array], Array]:
    """Classes that a training part lacks get next to nothing."""
    floor = 1e-6
    present = np.unique(codes)
    if len(present) == 1:
        return lambda rows: (
            np.where(np.arange(classes) == present[0], 1 - floor, floor) * np.ones((len(rows), 1))
        )
    estimator = HEADS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is scored out of fold, converged or not
        estimator.fit(x, codes)

    def ask(rows: Array) -> Array:
        out = np.full((len(rows), classes), floor)
        out[:, present] = np.clip(estimator.predict_proba(rows), floor, 1 - floor)
        return np.asarray(out / out.sum(1, keepdims=True))

    return ask


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
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(NEIGHBOURS, weights="distance", metric="cosine")


HEADS: dict[str, Callable[[], Any]] = {"linear": _linear, "logistic": _logistic, "mlp": _mlp, "knn": _knn}


def _value(make: Callable[[], Any]) -> Fit:
    def fit(x: Array, target: Array) -> Callable[[Array], Array]:
        middle, spread = target.mean(0), target.std(0) + 1e-12
        estimator = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(x, (target - middle) / spread)
        return lambda rows: np.asarray(estimator.predict(rows)).reshape(len(rows), -1) * spread + middle

    return fit


def _ridge() -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-1, 4, 12))


def _mlp_value() -> Any:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(
        hidden_layer_sizes=(256,), alpha=1e-2, learning_rate_init=3e-3, max_iter=200, random_state=0
    )


def _knn_value() -> Any:
    from sklearn.neighbors import KNeighborsRegressor

    return KNeighborsRegressor(NEIGHBOURS, weights="distance", metric="cosine")


def _no_value(x: Array, target: Array) -> Callable[[Array], Array]:
    raise Refused(
        "--heads: logistic says probabilities, and the target is a value; leave it out: linear, mlp, knn"
    )


VALUES: dict[str, Fit] = {
    "linear": _value(_ridge), "logistic": _no_value, "mlp": _value(_mlp_value), "knn": _value(_knn_value),
}  # fmt: skip
