"""Variants of a trained network for comp export: torch.export, ONNX, ONNX int8, and pruned weights.

All of them take images as uint8 gray levels, (batch, channels, height, width), normalize inside, and return
raw outputs.
"""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comp import models
from comp.data import sequential_batches
from comp.engine.errors import UserError
from comp.engine.run import normalize
from comp.engine.run.context import Context
from comp.engine.store import artifacts

CPU = torch.device("cpu")
INPUT, OUTPUT = "images", "outputs"
Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class ExportedNetwork(nn.Module):
    """The network with its normalization."""

    def __init__(self, module: nn.Module, normal: normalize.Normalize):
        super().__init__()
        self.module, self.normal = module, normal

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.module(self.normal(images.float()))
        return out


def load_network(context: Context, weights: Path) -> ExportedNetwork:
    module = models.build(context.cfg, context.samples.heads, pretrained=False)
    module = models.load_weights(module, weights).eval()
    return ExportedNetwork(module, normalize.build(context.cfg, module, CPU)).eval()


class Variant(NamedTuple):
    name: str
    file: Path
    bytes: int
    exact: bool  # whether its outputs must be those of torch
    forward: Forward


def require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(
            "package-missing", where="comp export", what=f"needs {', '.join(missing)}", remedy="make extras"
        )


def load_images(context: Context, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(rows, channels, height, width)"""
    batches = context.loader.batches(sequential_batches(rows, context.cfg.predict.batch_size))
    return np.concatenate([np.ascontiguousarray(b.images.numpy().transpose(0, 3, 1, 2)) for b in batches])


def predict(
    context: Context, variant: Variant, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """(rows, outputs) raw, and decoded predictions of the first head."""
    size = context.cfg.predict.batch_size
    raw = np.concatenate([variant.forward(images[at : at + size]) for at in range(0, len(images), size)])
    return raw, models.decode(context.cfg, context.samples.heads, raw)[0]


def variants(
    network: ExportedNetwork,
    folder: Path,
    weights: Path,
    calibration: NDArray[np.uint8],
    shares: list[float],
    threads: int,
) -> Iterator[Variant]:
    """Writes each variant into `folder`. `calibration`: training images, from which int8 takes its ranges."""
    yield Variant("torch", weights, weights.stat().st_size, True, _torch_forward(network))
    yield _torch_export(network, folder / "model.pt2", calibration[:2])
    yield _onnx(network, folder / "model.onnx", calibration[:2], threads)
    yield _int8(folder / "model.onnx", folder / "int8.onnx", calibration, threads)
    artifacts.add_to_manifest(folder / "model.pt2", folder / "model.onnx", folder / "int8.onnx")
    for share in shares:
        yield _pruned_variant(network, share, folder / f"pruned{100 * share:g}.safetensors")


def _dynamic_batch() -> dict[str, Any]:
    return {INPUT: {0: torch.export.Dim("batch", min=1, max=4096)}}


def _torch_forward(network: nn.Module) -> Forward:
    @torch.no_grad()
    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(network(torch.from_numpy(images)).float())

    return run


def _torch_export(network: ExportedNetwork, file: Path, example: NDArray[np.uint8]) -> Variant:
    program = torch.export.export(network, (torch.from_numpy(example),), dynamic_shapes=_dynamic_batch())
    with artifacts.atomic(file) as temporary, temporary.open("wb") as opened:
        torch.export.save(program, opened)
    loaded = torch.export.load(str(file)).module()
    return Variant("torch.export", file, file.stat().st_size, True, _torch_forward(loaded))


def _onnx(network: ExportedNetwork, file: Path, example: NDArray[np.uint8], threads: int) -> Variant:
    with artifacts.atomic(file) as temporary:
        torch.onnx.export(
            network,
            (torch.from_numpy(example),),
            str(temporary),
            dynamo=True,
            dynamic_shapes=_dynamic_batch(),
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    return Variant("onnx", file, file.stat().st_size, True, _onnx_forward(file, threads))


def _onnx_forward(file: Path, threads: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {INPUT: images})[0])


def _int8(model: Path, file: Path, calibration: NDArray[np.uint8], threads: int) -> Variant:
    """Static quantization of an ONNX file, weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        left = iter(np.array_split(calibration, max(1, len(calibration) // 16)))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {INPUT: part}

    prepared = file.with_name(".prepared.onnx")
    try:
        quant_pre_process(str(model), str(prepared))
        with artifacts.atomic(file) as temporary:
            quantize_static(
                str(prepared),
                str(temporary),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_target_scaler_nodes(prepared),
            )
    finally:
        prepared.unlink(missing_ok=True)
    return Variant("onnx int8", file, file.stat().st_size, False, _onnx_forward(file, threads))


def _target_scaler_nodes(file: Path) -> list[str]:
    """Names of the last multiplication and addition, which scale values to the unit of their target
    (target_scaler.py). They stay in float: 8 bits from 0 to a mean of 9,500 would have no resolution left for
    a deviation of 30."""
    import onnx

    graph = onnx.load(str(file)).graph
    made_by = {output: node for node in graph.node for output in node.output}
    names, output = [], graph.output[0].name
    for kind in ("Add", "Mul"):
        node = made_by.get(output)
        if node is None or node.op_type != kind:
            return []
        names.append(node.name)
        output = next((name for name in node.input if name in made_by), "")
    return names


def _pruned_variant(network: ExportedNetwork, share: float, file: Path) -> Variant:
    from safetensors.torch import save

    cut = pruned(network, share)
    packed = save({name: value.contiguous() for name, value in cut.module.state_dict().items()})
    with artifacts.atomic(file) as temporary:
        temporary.write_bytes(packed)
    artifacts.add_to_manifest(file, share=share)
    return Variant(f"pruned {share:.0%}", file, len(gzip.compress(packed, 6)), False, _torch_forward(cut))


def pruned(network: ExportedNetwork, share: float) -> ExportedNetwork:
    """A copy with the smallest weights of convolutions and linear layers set to 0. Shapes stay, so dense
    hardware is not faster; the compressed file is smaller."""
    from torch.nn.utils import prune

    cut = copy.deepcopy(network)
    layers = [(part, "weight") for part in cut.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=share)
    for part, name in layers:
        prune.remove(part, name)
    return cut
