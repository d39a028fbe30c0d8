"""comp export: a trained fold as torch.export and ONNX, int8 and pruned, with what each costs in score and saves in time and size.

    runs/<run>/export/model.pt2        torch.export; grey levels (batch, channels, size, size) in, raw outputs out, normalising inside
                      model.onnx       the same
                      int8.onnx        static, weights by channel, calibrated on training pictures, by onnxruntime
                      pruned30.safetensors …  the smallest 30 % of the weights are 0, over all layers together
                      table.json       what is printed

torch's own int8 (torch.ao.quantization) is deprecated, and torchao is not among our packages, so int8 is onnxruntime's.
"""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from comp import models
from comp.data import sequential_batches
from comp.engine import hardware, text_table
from comp.engine.bank import score
from comp.engine.config import experiments
from comp.engine.config.schema import Config
from comp.engine.data.samples import Positions
from comp.engine.errors import Refused
from comp.engine.extras import measure
from comp.engine.run import loading, normalize
from comp.engine.run.context import Context
from comp.engine.store import artifacts, locks, paths

NEAR = 1e-3  # of the largest output: further away an exported network is another one
CALIBRATION = 128  # training pictures that int8 takes its ranges from
CPU = torch.device("cpu")
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class Whole(nn.Module):
    """The network with its normalising: grey levels in."""

    def __init__(self, module: nn.Module, normal: normalize.Normalize):
        super().__init__()
        self.module, self.normal = module, normal

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.module(self.normal(images.float()))
        return out


def export(run: str, fold: int, rows: int, prune: str) -> Path:
    shares = _shares(prune)
    cfg = experiments.stored_config(run)
    hardware.set_threads(cfg.train.threads)
    place = {
        "device": "cpu",
        "gpu_cache_mb": 0,
    }  # where submissions without a GPU run, and where int8 is of use
    cfg = cfg.model_copy(update={"machine": cfg.machine.model_copy(update=place)})
    weights = next(iter(sorted(paths.run_folder(run).glob(f"seed*/fold{fold}/weights.safetensors"))), None)
    if weights is None:
        raise Refused(f"{run}: fold {fold} has no weights; comp train {run} --fold {fold} makes them")
    _needs_onnx()
    context = loading.load_context(cfg)
    if context.loader.multi_image or context.loader.metadata is not None:
        raise Refused(
            f"{run}: looks at several images or at metadata, and an exported network takes one picture"
        )
    heads = context.samples.heads
    module = models.load_weights(models.build(cfg, heads, pretrained=False), weights).eval()
    whole = Whole(module, normalize.build(cfg, module, CPU)).eval()
    taught, scored = context.folds.split(fold)
    scored = scored[:rows]
    images = _pictures(context, scored)
    folder = paths.run_folder(run) / "export"
    folder.mkdir(exist_ok=True)
    with locks.lock(folder, "exporting"):
        variants = [*_made(cfg, whole, folder, weights, _pictures(context, taught[:CALIBRATION]), shares)]
        lines = [_tried(cfg, context, scored, images, *variant) for variant in tqdm(
            variants, desc="scoring", unit="variant", leave=False, disable=None if cfg.machine.progress else True)]  # fmt: skip
    reference = lines[0].pop("raw")
    for line in lines[1:]:
        away = float(np.abs(line.pop("raw") - reference).max() / max(np.abs(reference).max(), 1e-6))
        line["away"] = away
        if line["exact"] and away > NEAR:
            raise Refused(
                f"{line['file']}: answers differ from torch by {away:.2g} of the largest; it is not to be used"
            )
    artifacts.write_json(folder / "table.json", {"fold": fold, "rows": len(scored), "variants": lines})
    artifacts.add_to_manifest(folder / "table.json")
    _tell(cfg, run, fold, len(scored), lines)
    return folder / "table.json"


def _shares(prune: str) -> list[float]:
    if prune == "none":
        return []
    try:
        shares = [float(part) for part in prune.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < 1 for share in shares):
        raise Refused(f"--prune {prune}: shares between 0 and 1, like 0.3,0.5, or none")
    return shares


def _needs_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise Refused(f"comp export: needs {', '.join(missing)}, an extra: make extras")


def _made(
    cfg: Config,
    whole: Whole,
    folder: Path,
    weights: Path,
    calibration: NDArray[np.uint8],
    shares: list[float],
) -> Iterator[tuple[str, Path, int, bool, Run]]:
    """Name, file, bytes, whether it must say the same as torch, and how to ask it."""
    import onnxruntime
    from safetensors.torch import save

    def session(file: Path) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cfg.train.threads
        options.log_severity_level = 3
        ready = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda images: np.asarray(ready.run(None, {"pictures": images})[0])

    yield "torch", weights, weights.stat().st_size, True, _asked(whole)
    example = torch.from_numpy(calibration[:2])
    batch = {"pictures": {0: torch.export.Dim("batch", min=1, max=4096)}}
    program = torch.export.export(whole, (example,), dynamic_shapes=batch)
    with artifacts.atomic(folder / "model.pt2") as temporary, temporary.open("wb") as opened:
        torch.export.save(program, opened)
    back = torch.export.load(str(folder / "model.pt2")).module()
    yield "torch.export", folder / "model.pt2", (folder / "model.pt2").stat().st_size, True, _asked(back)
    with artifacts.atomic(folder / "model.onnx") as temporary:
        torch.onnx.export(
            whole, (example,), str(temporary), dynamo=True, dynamic_shapes=batch, input_names=["pictures"],
            output_names=["outputs"], external_data=False, verbose=False,
        )  # fmt: skip
    yield (
        "onnx",
        folder / "model.onnx",
        (folder / "model.onnx").stat().st_size,
        True,
        session(folder / "model.onnx"),
    )
    _quantised(folder, calibration)
    yield (
        "onnx int8",
        folder / "int8.onnx",
        (folder / "int8.onnx").stat().st_size,
        False,
        session(folder / "int8.onnx"),
    )
    artifacts.add_to_manifest(folder / "model.pt2", folder / "model.onnx", folder / "int8.onnx")
    for share in shares:
        cut = pruned(whole, share)
        file = folder / f"pruned{100 * share:g}.safetensors"
        packed = save({name: value.contiguous() for name, value in cut.module.state_dict().items()})
        with artifacts.atomic(file) as temporary:
            temporary.write_bytes(packed)
        artifacts.add_to_manifest(file, share=share)
        yield f"pruned {share:.0%}", file, len(gzip.compress(packed, 6)), False, _asked(cut)


def _asked(network: nn.Module) -> Run:
    @torch.no_grad()
    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(network(torch.from_numpy(images)).float())

    return run


def _quantised(folder: Path, calibration: NDArray[np.uint8]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        left = iter(np.array_split(calibration, max(1, len(calibration) // 16)))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {"pictures": part}

    prepared = folder / ".prepared.onnx"
    try:
        quant_pre_process(str(folder / "model.onnx"), str(prepared))
        with artifacts.atomic(folder / "int8.onnx") as temporary:
            quantize_static(
                str(prepared), str(temporary), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                weight_type=QuantType.QInt8, nodes_to_exclude=_into_units(prepared),
            )  # fmt: skip
    finally:
        prepared.unlink(missing_ok=True)


def _into_units(file: Path) -> list[str]:
    """Names of the last multiplication and addition, which turn values into the unit of their target (target_scaler.py): 8 bits from 0
    to a mean of 9,500 would leave nothing of a deviation of 30."""
    import onnx

    graph = onnx.load(str(file)).graph
    made_by = {output: node for node in graph.node for output in node.output}
    found, output = [], graph.output[0].name
    for kind in ("Add", "Mul"):
        node = made_by.get(output)
        if node is None or node.op_type != kind:
            return []
        found.append(node.name)
        output = next((each for each in node.input if each in made_by), "")
    return found


def pruned(whole: Whole, share: float) -> Whole:
    """A copy whose smallest weights of convolutions and linear layers are 0. The shapes stay, so a dense machine gains
    no time; what shrinks is the packed file."""
    from torch.nn.utils import prune

    cut = copy.deepcopy(whole)
    layers = [(part, "weight") for part in cut.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=share)
    for part, name in layers:
        prune.remove(part, name)
    return cut


def _pictures(context: Context, rows: Positions) -> NDArray[np.uint8]:
    """(rows, channels, size, size)"""
    batches = context.loader.batches(sequential_batches(rows, context.cfg.predict.batch_size))
    return np.concatenate([np.ascontiguousarray(b.images.numpy().transpose(0, 3, 1, 2)) for b in batches])


def _tried(
    cfg: Config, context: Context, rows: Positions, images: NDArray[np.uint8], name: str, file: Path, size: int,
    exact: bool, run: Run,
) -> dict[str, Any]:  # fmt: skip
    count = cfg.predict.batch_size
    raw = np.concatenate([run(images[at : at + count]) for at in range(0, len(images), count)])
    head = context.samples.heads[0]
    stored = models.decode(cfg, context.samples.heads, raw)[0]
    one = images[: min(16, len(images))]
    return {
        "name": name,
        "file": paths.relative(file),
        "score": score.validation_score(cfg, head, stored, context.samples, rows),
        "ms": 1000 * measure.seconds(lambda: run(one), CPU) / len(one),
        "bytes": size,
        "exact": exact,
        "raw": raw,
    }


def _tell(cfg: Config, run: str, fold: int, rows: int, lines: list[dict[str, Any]]) -> None:
    metric = score.metric_of(cfg)
    body = [
        [line["name"], f"{line['score']:.4f}", f"{line['score'] - lines[0]['score']:+.4f}", f"{line['ms']:.3f}",
         artifacts.format_size(line["bytes"]), f"{line.get('away', 0):.1e}", line["file"]]
        for line in lines
    ]  # fmt: skip
    print(f"{run}, fold {fold}: {metric.name} of {rows} out-of-fold rows, on {cfg.train.threads} CPU threads")
    print(text_table.render(
        ["variant", metric.name, "change", "ms a picture", "size", "away", "file"], body,
        [metric.name, "change", "ms a picture", "size", "away"],
    ))  # fmt: skip
    print(
        "away: largest difference from torch, as a share of the largest output; pruned sizes are packed (gzip), their shapes stay"
    )
    print(
        "int8 is onnxruntime's: torch.ao.quantization is deprecated, and torchao is no package of this project"
    )
    print(f"written: {paths.relative(paths.run_folder(run) / 'export')}\nnext: comp kernel {run}")
