"""comp audit --drift: adversarial validation. Can a classifier tell test rows from training rows by the
features of a run?

Features are what enters the last layer of each fold's network, for its validation rows and the test rows, so
that memorised training rows do not count. A logistic regression then separates the two, scored on rows (and
groups) it was not fitted on: AUC 0.5 is no difference. Its prediction for each training row can become
weights and folds: `drift` in configs/competition.yaml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comp.engine import hardware, text_table
from comp.engine.config import experiments
from comp.engine.data import folds, samples
from comp.engine.data.samples import Positions, Samples
from comp.engine.errors import UserError
from comp.engine.extras import contact_sheet
from comp.engine.run import loading
from comp.engine.store import artifacts, paths

if TYPE_CHECKING:
    import pandas as pd

    from comp.engine.run.context import Context

COMPONENTS = 32  # of the features: with more, rows are separated by chance
MIN_WEIGHT, MAX_WEIGHT = 0.2, 5.0  # of rows; beyond, a few rows would dominate the training
SHOWN = 8  # rows of a kind
STRONG, NONE = "strong drift", "no significant drift"


def adversarial_validation(run: str) -> dict[str, Any]:
    """Write data/adversarial_validation.csv (every row), .json (AUC) and .png (the most and least similar
    rows)."""
    from comp.engine.extras import extract_features

    cfg = experiments.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    rows = samples.load()
    split = folds.load(rows)
    test_rows = rows.positions("test")
    seeds = experiments.complete_seeds(run, split.count)
    if not seeds:
        raise experiments.missing_predictions(run, "weights of every fold for adversarial validation")
    if not len(test_rows):
        raise UserError(
            "test-rows-missing", where=run, what="there are no test rows to compare training rows with"
        )
    context = loading.load_context(cfg)
    probability = np.full(len(rows.frame), np.nan)
    of_test, aucs = np.zeros(len(test_rows)), []
    for fold in range(split.count):
        valid_rows = split.split(fold)[1]
        both = np.concatenate([valid_rows, test_rows])
        features = extract_features.of_fold(context, run, seeds[0], fold, both)
        p, auc = _classify(rows, valid_rows, test_rows, features)
        probability[valid_rows] = p[: len(valid_rows)]
        of_test += p[len(valid_rows) :] / split.count
        aucs.append(auc)
    probability[test_rows] = of_test
    frame = _frame(rows, probability)
    artifacts.write_text(paths.path("data", "adversarial_validation.csv"), frame.to_csv(index=False))
    record = {"auc": float(np.mean(aucs)), "std": float(np.std(aucs, ddof=1)), "folds": aucs, "run": run}
    artifacts.write_json(paths.path("data", "adversarial_validation.json"), record)
    _report(context, frame, record)
    return record


def _classify(
    rows: Samples, valid_rows: Positions, test_rows: Positions, features: NDArray[np.float32]
) -> tuple[NDArray[np.float64], float]:
    """Probability of each row to be a test row, out of fold, and the AUC. Groups stay together."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_test = np.concatenate([np.zeros(len(valid_rows), int), np.ones(len(test_rows), int)])
    at = np.concatenate([valid_rows, test_rows])
    column = "group" if "group" in rows.frame else "id"
    group = rows.frame[column].fillna(rows.frame["id"]).astype(str).to_numpy()[at]
    components = min(COMPONENTS, features.shape[1], len(at) // 4)
    model = make_pipeline(
        StandardScaler(),
        PCA(components, random_state=0),
        StandardScaler(),
        LogisticRegression(C=0.1, class_weight="balanced", max_iter=500),
    )
    cv = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    p = cross_val_predict(model, features, is_test, groups=group, cv=cv, method="predict_proba")[:, 1]
    return p, float(roc_auc_score(is_test, p))


def _frame(rows: Samples, p: NDArray[np.float64]) -> pd.DataFrame:
    """id, source, like_test (0 to 1), weight: density ratio of test to train, 1 on average over training
    rows."""
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
    ratio = (frame["like_test"] / (1 - frame["like_test"]).clip(lower=1e-6)).clip(MIN_WEIGHT, MAX_WEIGHT)
    train = frame["source"] == "train"
    frame["weight"] = (ratio / ratio[train].mean()).where(train)
    return frame.round({"like_test": 6, "weight": 6}).sort_values(
        "like_test", kind="stable", ignore_index=True
    )


def _report(context: Context, frame: pd.DataFrame, record: dict[str, Any]) -> None:
    auc, error = record["auc"], record["std"] / len(record["folds"]) ** 0.5
    verdict = STRONG if auc > 0.8 else "drift" if auc - 2 * error > 0.5 and auc > 0.55 else NONE
    print(f"train against test on the features of {record['run']}: AUC {auc:.3f} ± {error:.3f}, {verdict}")
    train, test = frame[frame["source"] == "train"], frame[frame["source"] == "test"]
    extremes = {
        "training rows most like test": train.iloc[::-1].head(SHOWN),
        "training rows least like test": train.head(SHOWN),
        "test rows most unlike train": test.iloc[::-1].head(SHOWN),
        "test rows most like train": test.head(SHOWN),
    }
    for kind, some in extremes.items():
        cells = [[str(row.id), f"{row.like_test:.3f}"] for row in some.itertuples()]
        print(f"\n{kind}\n" + text_table.render(["id", "like test"], cells, ["like test"]))
    images = []
    for some in extremes.values():
        images += [
            (str(row.image), f"{row.source} {row.like_test:.2f} {row.id}") for row in some.itertuples()
        ]
        images += [contact_sheet.EMPTY] * (SHOWN - len(some))
    table, sheet = (paths.path("data", f"adversarial_validation.{suffix}") for suffix in ("csv", "png"))
    contact_sheet.write(context.cfg, images, sheet, "; ".join(extremes), columns=SHOWN)
    print(f"\n{paths.relative(table)}: every row\n{paths.relative(sheet)}: these")
    if verdict == NONE:
        print("next: comp runs")
    else:
        print(
            "next: drift: [weights, folds] in configs/competition.yaml, comp prepare, comp folds --remake, "
            "train again"
        )
