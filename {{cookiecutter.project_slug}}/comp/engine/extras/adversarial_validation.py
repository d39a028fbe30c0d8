"""comp audit --drift: can the test rows be told from the training rows by what the network sees in them?

Frozen features: what enters the last layer of each fold's network, of the rows that it did not learn from and of the test rows, so
that nothing is told apart because it was learned. A logistic regression then guesses which is which, on rows (and groups) it was
not fitted on. 0.5 is no drift at all. What it says of each training row can become weights and folds: competition.drift.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware, text_table
from comp.engine.config import experiments
from comp.engine.data import folds, image_reader, samples
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import Refused
from comp.engine.readers import arrays
from comp.engine.readers.arrays import DamagedImage
from comp.engine.report import plots
from comp.engine.run import runner
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

    from comp.engine.run.context import Context

COMPONENTS = 32  # of the features: more are told apart by chance
LIGHTEST, HEAVIEST = 0.2, 5.0  # weights of rows; beyond, a few rows would teach alone
SHOWN = 8  # rows of a kind


def drift(run: str) -> dict[str, Any]:
    cfg = runner.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    rows = samples.load()
    split = folds.load(rows)
    test = rows.positions("test")
    seeds = experiments.complete(run, split.count)
    if not seeds:
        raise experiments.refusal(run, "weights of every fold to look for drift with")
    if not len(test):
        raise Refused(
            f"{run}: there are no test rows; drift is looked for between held-out rows and test rows"
        )
    context = runner.gather(cfg)
    ours = np.full(len(rows.frame), np.nan)
    theirs, areas = np.zeros(len(test)), []
    for number in range(split.count):
        scored = split.split(number)[1]
        p, area = _told_apart(
            rows, scored, test, _features(context, run, seeds[0], number, np.concatenate([scored, test]))
        )
        ours[scored] = p[: len(scored)]
        theirs += p[len(scored) :] / split.count
        areas.append(area)
    ours[test] = theirs
    frame = _frame(rows, ours)
    artifacts.write_text(paths.path("data", "drift.csv"), frame.to_csv(index=False))
    record = {"auc": float(np.mean(areas)), "std": float(np.std(areas, ddof=1)), "folds": areas, "run": run}
    artifacts.write_json(paths.path("data", "drift.json"), record)
    _tell(context, frame, record)
    return record


def _features(context: Context, run: str, seed: int, number: int, rows: Positions) -> NDArray[np.float32]:
    """(rows, features) what enters the last linear layer."""
    import torch
    from torch import nn

    from comp import models, transforms
    from comp.engine.run import normalize
    from comp.engine.run.evaluate import forward_rows

    cfg = context.cfg
    module = models.build(cfg, context.samples.heads, pretrained=False, loader=context.loader)
    module = models.load_weights(module, paths.fold_folder(run, seed, number) / "weights.safetensors").to(
        context.device
    )
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise Refused(f"{run}: its network ends in no linear layer, so there are no features to look at")
    seen: list[torch.Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().cpu()))
    look = transforms.Preprocess(normalize.build(cfg, module, context.device))
    # One batch at a time, or the hook would meet them out of order.
    forward_rows(module, context.loader, rows, cfg.predict.batch_size, look, cfg.train.amp, parallel=1)
    hook.remove()
    return np.asarray(torch.cat(seen).flatten(1).numpy())


def _told_apart(
    rows: Samples, scored: Positions, test: Positions, features: NDArray[np.float32]
) -> tuple[NDArray[np.float64], float]:
    """How much each row looks like test, out of fold, and the area under the curve. Groups stay together."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_test = np.concatenate([np.zeros(len(scored), int), np.ones(len(test), int)])
    at = np.concatenate([scored, test])
    column = "group" if "group" in rows.frame else "id"
    group = rows.frame[column].fillna(rows.frame["id"]).astype(str).to_numpy()[at]
    parts = min(COMPONENTS, features.shape[1], len(at) // 4)
    guess = make_pipeline(
        StandardScaler(),
        PCA(parts, random_state=0),
        StandardScaler(),
        LogisticRegression(C=0.1, class_weight="balanced", max_iter=500),
    )
    cut = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    said = cross_val_predict(guess, features, is_test, groups=group, cv=cut, method="predict_proba")[:, 1]
    return said, float(roc_auc_score(is_test, said))


def _frame(rows: Samples, p: NDArray[np.float64]) -> pd.DataFrame:
    """id, source, like_test (0 to 1), weight: how much more often test has such rows than train, 1 on average."""
    import pandas as pd

    known = np.flatnonzero(np.isfinite(p))
    frame = pd.DataFrame(
        {
            "id": rows.frame["id"].iloc[known],
            "source": rows.frame["source"].iloc[known],
            "like_test": p[known],
            "image": [images[0] for images in rows.frame["images"].iloc[known]],
        }
    )
    ratio = (frame["like_test"] / (1 - frame["like_test"]).clip(lower=1e-6)).clip(LIGHTEST, HEAVIEST)
    train = frame["source"] == "train"
    frame["weight"] = (ratio / ratio[train].mean()).where(train)
    return frame.round({"like_test": 6, "weight": 6}).sort_values(
        "like_test", kind="stable", ignore_index=True
    )


def _tell(context: Context, frame: pd.DataFrame, record: dict[str, Any]) -> None:
    auc, spread = record["auc"], record["std"] / len(record["folds"]) ** 0.5
    verdict = (
        "strong drift"
        if auc > 0.8
        else "drift"
        if auc - 2 * spread > 0.5 and auc > 0.55
        else "no drift to speak of"
    )
    print(f"train against test on the features of {record['run']}: AUC {auc:.3f} ± {spread:.3f}, {verdict}")
    train, test = frame[frame["source"] == "train"], frame[frame["source"] == "test"]
    telling = {
        "training rows most like test": train.iloc[::-1].head(SHOWN),
        "training rows least like test": train.head(SHOWN),
        "test rows most unlike train": test.iloc[::-1].head(SHOWN),
        "test rows most like train": test.head(SHOWN),
    }
    for kind, some in telling.items():
        cells = [[str(row.id), f"{row.like_test:.3f}"] for row in some.itertuples()]
        print(f"\n{kind}\n" + text_table.render(["id", "like test"], cells, ["like test"]))
    reader = replace(image_reader.from_config(context.cfg), size=plots.TILE, resize="contain")
    tiles = []
    for some in telling.values():
        for row in some.itertuples():
            try:
                image = arrays.to_uint8(reader.image(str(row.image)))
            except DamagedImage:
                image = np.zeros((plots.TILE, plots.TILE, 3), np.uint8)
            tiles.append((image, f"{row.source} {row.like_test:.2f} {row.id}"))
        tiles += [(np.full((plots.TILE, plots.TILE, 3), 255, np.uint8), "")] * (SHOWN - len(some))
    sheet = paths.path("data", "drift.png")
    plots.image_grid(tiles, sheet, columns=SHOWN, title="; ".join(telling))
    print(f"\n{paths.relative(paths.path('data', 'drift.csv'))}: every row\n{paths.relative(sheet)}: these")
    if verdict == "no drift to speak of":
        print("next: comp runs")
    else:
        print(
            "next: drift: [weights, folds] in configs/competition.yaml, comp prepare, comp folds --remake, train again"
        )
