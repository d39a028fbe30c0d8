"""Features of images: those of a frozen backbone (comp features), and those that enter the last layer of a
trained fold (comp audit --drift)."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from comp import models, transforms
from comp.engine.data import image_reader
from comp.engine.data.seeding import derive_seed
from comp.engine.errors import UserError, joined
from comp.engine.run import frozen_heads, normalize, pretrained
from comp.engine.run.context import Context
from comp.engine.run.forward import forward_rows
from comp.engine.store import artifacts, paths

SPEED = "speed.json"
Features = NDArray[np.float32]  # (samples, features)


def of_backbone(context: Context, run: str, fresh: bool) -> Features:
    """Those on disk, if they were made of the same images and weights; otherwise they are computed, and the
    backbone is saved."""
    cfg, file = context.cfg, paths.run_folder(run) / frozen_heads.FILE
    torch.manual_seed(derive_seed(cfg.train.seeds[0], 3))
    backbone = models.headless(cfg, cfg.model.pretrained is True, context.loader).to(context.device)
    pretrained.load_pretrained(
        backbone, cfg, cfg.train.seeds[0], "full"
    )  # weights of a file, where there is one
    inputs = _inputs(context, backbone)
    if not fresh and (entry := artifacts.manifest_entry(file)):
        changed = [name for name, value in inputs.items() if entry.get(name) != value]
        if changed:
            raise UserError(
                "features-stale",
                where=paths.relative(file),
                what=f"made of other {' and other '.join(changed)}",
                remedy=f"comp features {run} --fresh",
            )
        features: Features = np.load(artifacts.verified(file))
        print(f"{paths.relative(file)}: {len(features):,} samples, {features.shape[1]} features, reused")
        return features
    began = time.perf_counter()
    features = _computed(context, backbone)
    models.save_weights(backbone, frozen_heads.backbone_of(run))
    took = time.perf_counter() - began
    speed = frozen_heads.backbone_of(run).with_name(SPEED)
    artifacts.write_json(speed, {"test": took / max(1, len(context.samples.frame))})
    with artifacts.atomic(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, features)
    artifacts.add_to_manifest(file, **inputs)
    print(
        f"{paths.relative(file)}: {len(features):,} samples, {features.shape[1]} features, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return features


def _computed(context: Context, backbone: nn.Module) -> Features:
    cfg = context.cfg
    rows = np.arange(len(context.samples.frame))
    preprocess = transforms.Preprocess(normalize.build(cfg, backbone, context.device))
    hidden = None if cfg.machine.progress else True
    with tqdm(total=len(rows), desc="features", unit="image", leave=False, disable=hidden) as bar:
        raw, damaged = forward_rows(
            backbone,
            context.loader,
            rows,
            cfg.predict.batch_size,
            preprocess,
            cfg.train.amp,
            on_batch=bar.update,
        )
    if damaged:
        names = context.samples.frame["id"]
        raise joined(
            [
                UserError(
                    "file-damaged",
                    where=f"sample {names.iloc[i]}",
                    what=reason,
                    remedy="comp check lists every such file",
                )
                for i, reason in damaged.items()
            ]
        )
    return raw[0]


def _inputs(context: Context, backbone: nn.Module) -> dict[str, Any]:
    """What the features depend on; the keys are printed when one changed."""
    cfg, samples = context.cfg, context.samples
    weights = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    loader = image_reader.from_config(cfg)
    files = sorted({image for images in samples.frame["images"] for image in images[: cfg.data.max_images]})
    knobs = [
        cfg.model.name,
        cfg.model.kwargs,
        cfg.model.image_pool,
        cfg.data.max_images,
        cfg.data.normalize,
        cfg.train.amp,
    ]
    return {
        "weights": weights.hexdigest()[:16],
        "sizes or decoding": loader.key,
        "images": artifacts.digest([[name, *loader.stamp(name)] for name in files]),
        "samples": samples.hash,
        "knobs": artifacts.digest(knobs),
    }


def seconds(run: str) -> float:
    """What the backbone took per image when the features were computed."""
    file = frozen_heads.backbone_of(run).with_name(SPEED)
    return float(artifacts.read_json(file)["test"]) if file.exists() else 0.0


def of_fold(context: Context, run: str, seed: int, fold: int, rows: NDArray[np.int64]) -> Features:
    """(rows, features): the input of the last linear layer of a trained fold."""
    cfg = context.cfg
    module = models.build(cfg, context.samples.heads, pretrained=False, loader=context.loader)
    weights = paths.fold_folder(run, seed, fold) / "weights.safetensors"
    module = models.load_weights(module, weights).to(context.device)
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UserError(
            "features-missing", where=run, what="its network has no linear layer to take features from"
        )
    inputs: list[torch.Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().float().cpu()))
    preprocess = transforms.Preprocess(normalize.build(cfg, module, context.device))
    # One batch at a time, or the hook would see them out of order.
    forward_rows(module, context.loader, rows, cfg.predict.batch_size, preprocess, cfg.train.amp, parallel=1)
    hook.remove()
    return np.asarray(torch.cat(inputs).flatten(1).numpy())
