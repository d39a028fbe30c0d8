"""comp export: a trained fold as torch.export and ONNX, int8 and pruned, with the score, time and size of
each.

    runs/<run>/export/model.pt2        torch.export
                      model.onnx       ONNX
                      int8.onnx        ONNX, static int8 per channel, calibrated on training images
                      pruned30.safetensors …  the smallest 30 % of all weights are 0
                      table.json       what is printed

torch's own int8 (torch.ao.quantization) is deprecated, and torchao is not a dependency, so int8 is
onnxruntime's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from comp.engine import hardware, text_table
from comp.engine.bank import score
from comp.engine.config import experiments
from comp.engine.errors import UserError
from comp.engine.extras import export_variants, measure
from comp.engine.extras.export_variants import CPU, Variant
from comp.engine.run import loading
from comp.engine.run.context import Context
from comp.engine.store import artifacts, locks, paths

TOLERANCE = 1e-3  # of the largest output; an exact variant must not differ by more
CALIBRATION = 128  # training images that int8 takes its ranges from


def export(run: str, fold: int, rows: int, prune: str) -> Path:
    shares = _shares(prune)
    cfg = experiments.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    # A CPU is where submissions without a GPU run, and where int8 helps.
    machine = cfg.machine.model_copy(update={"device": "cpu", "gpu_cache_mb": 0})
    cfg = cfg.model_copy(update={"machine": machine})
    weights = next(iter(sorted(paths.run_folder(run).glob(f"seed*/fold{fold}/weights.safetensors"))), None)
    if weights is None:
        raise UserError(
            "weights-missing",
            where=run,
            what=f"fold {fold} has no weights",
            remedy=f"comp train {run} --fold {fold}",
        )
    export_variants.require_onnx()
    context = loading.load_context(cfg)
    if context.loader.multi_image or context.loader.metadata is not None:
        raise UserError(
            "export-unsupported",
            where=run,
            what="takes several images or metadata, and an exported network takes one image",
        )
    network = export_variants.load_network(context, weights)
    train_rows, valid_rows = context.folds.split(fold)
    valid_rows = valid_rows[:rows]
    images = export_variants.load_images(context, valid_rows)
    calibration = export_variants.load_images(context, train_rows[:CALIBRATION])
    folder = paths.run_folder(run) / "export"
    folder.mkdir(exist_ok=True)
    with locks.lock(folder, "exporting"):
        made = [*export_variants.variants(network, folder, weights, calibration, shares, cfg.train.threads)]
        hidden = None if cfg.machine.progress else True
        bar = tqdm(made, desc="scoring", unit="variant", leave=False, disable=hidden)
        lines = [_evaluate(context, valid_rows, images, variant) for variant in bar]
    _compare_outputs(lines)
    artifacts.write_json(folder / "table.json", {"fold": fold, "rows": len(valid_rows), "variants": lines})
    artifacts.add_to_manifest(folder / "table.json")
    _report(context, run, fold, len(valid_rows), lines)
    return folder / "table.json"


def _shares(prune: str) -> list[float]:
    if prune == "none":
        return []
    try:
        shares = [float(part) for part in prune.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < 1 for share in shares):
        raise UserError(
            "option-out-of-range",
            where=f"--prune {prune}",
            what="must be shares between 0 and 1",
            remedy="--prune 0.3,0.5, or none",
        )
    return shares


def _evaluate(
    context: Context, rows: NDArray[np.int64], images: NDArray[np.uint8], variant: Variant
) -> dict[str, Any]:
    """Score of the first head, and milliseconds per image in batches of 16."""
    raw, stored = export_variants.predict(context, variant, images)
    head = context.samples.heads[0]
    batch = images[: min(16, len(images))]
    return {
        "name": variant.name,
        "file": paths.relative(variant.file),
        "score": score.validation_score(context.cfg, head, stored, context.samples, rows),
        "ms": 1000 * measure.seconds(lambda: variant.forward(batch), CPU) / len(batch),
        "bytes": variant.bytes,
        "exact": variant.exact,
        "raw": raw,
    }


def _compare_outputs(lines: list[dict[str, Any]]) -> None:
    """Replaces `raw` by `difference`, the largest one from torch as a share of the largest output."""
    reference = lines[0].pop("raw")
    for line in lines[1:]:
        difference = float(np.abs(line.pop("raw") - reference).max() / max(np.abs(reference).max(), 1e-6))
        line["difference"] = difference
        if line["exact"] and difference > TOLERANCE:
            raise UserError(
                "export-differs",
                where=line["file"],
                what=f"outputs differ from torch by {difference:.2g} of the largest one",
                remedy="do not use this file",
            )


def _report(context: Context, run: str, fold: int, rows: int, lines: list[dict[str, Any]]) -> None:
    metric, threads = score.metric_of(context.cfg), context.cfg.train.threads
    body = [
        [
            line["name"],
            f"{line['score']:.4f}",
            f"{line['score'] - lines[0]['score']:+.4f}",
            f"{line['ms']:.3f}",
            artifacts.format_size(line["bytes"]),
            f"{line.get('difference', 0):.1e}",
            line["file"],
        ]
        for line in lines
    ]
    print(f"{run}, fold {fold}: {metric.name} of {rows} out-of-fold rows, on {threads} CPU threads")
    numbers = [metric.name, "change", "ms per image", "size", "difference"]
    print(text_table.render(["variant", *numbers, "file"], body, numbers))
    print(
        "difference: the largest one from torch, as a share of the largest output; sizes of pruned variants "
        "are gzipped, "
        "their shapes are unchanged"
    )
    print("int8 is onnxruntime's; torch.ao.quantization is deprecated")
    print(f"written: {paths.relative(paths.run_folder(run) / 'export')}\nnext: comp kernel {run}")
