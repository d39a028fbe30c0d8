"""comp model: parameters, multiply-adds, time and memory of an experiment's network, measured on this
machine. Nothing is trained or written."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from comp import models, optim
from comp.engine import hardware, pages, text_table
from comp.engine.config import experiments
from comp.engine.data import samples
from comp.engine.run import backbone, torch_compile
from comp.engine.run.device import AMP_DTYPES
from comp.engine.store import artifacts

SECONDS, REPEATS = 1.5, 5  # a measurement repeats for at least this long, and this often


def measure(experiment: str, overrides: list[str]) -> None:
    """A forward pass of one image and of a batch, and a training step."""
    loaded = experiments.load(experiment, overrides)
    cfg = loaded.config
    hardware.set_threads(cfg.train.threads)
    with loaded.locating():
        optim.validate(cfg)
        models.validate(cfg)
    device = hardware.device(cfg.machine.device)
    heads = samples.load().heads
    module = models.build(cfg, heads, pretrained=False).to(device)
    network = torch_compile.prepare(cfg, module)  # as the training loop runs it
    image = torch.rand(1, cfg.data.channels, cfg.data.size, cfg.data.size, device=device)
    half = AMP_DTYPES[cfg.train.amp]

    def forward(batch: Tensor) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode(), torch.autocast(device.type, half, enabled=half is not None):
                module(batch)

        return run

    def step() -> None:
        batch = image.expand(cfg.train.batch_size, -1, -1, -1)
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = network(batch).float().square().mean()
        loss.backward(create_graph=optim.second_order(optimizer))
        optimizer.step()
        optimizer.zero_grad()

    module.eval()
    lines = _size_lines(module, image)
    for count in dict.fromkeys((1, cfg.predict.batch_size)):
        run = forward(image.expand(count, -1, -1, -1).contiguous())
        took, peak = seconds(run, device), memory(run, device)
        lines.append(_time_line(f"forward of {count}", count, took, peak))
    module.train()
    optimizer = optim.optimizer(cfg, module)
    peak = memory(step, device)
    took = seconds(step, device)
    lines.append(_time_line(f"training step of {cfg.train.batch_size}", cfg.train.batch_size, took, peak))
    threads = f"{cfg.train.threads} thread{'s' * (cfg.train.threads != 1)}"
    print(
        f"{experiment}: {cfg.model.name} on {device}, {threads}, {cfg.train.amp}; "
        "medians, without loading images"
    )
    print(text_table.render(["quantity", "value", "details"], lines, ["value"]))
    if pages.get("model") is None:
        print(backbone.describe(cfg))
    print(f"next: comp train {experiment}")


def _size_lines(module: nn.Module, image: Tensor) -> list[list[str]]:
    parameters = sum(p.numel() for p in module.parameters())
    classifier = _classifier(module)
    last = 0 if classifier is None else sum(p.numel() for p in classifier.parameters())
    weights = f"{last:,} of them in the last layer; {artifacts.format_size(4 * parameters)} of weights"
    _, channels, height, width = image.shape
    operations = f"{multiply_adds(module, image) / 1e6:,.1f} M"
    return [
        ["parameters", f"{parameters:,}", weights],
        ["multiply-adds", operations, f"an image of {channels} x {height} x {width}"],
    ]


def _time_line(name: str, images: int, took: float, peak: float) -> list[str]:
    details = f"{1000 * took / images:.3f} ms per image, {artifacts.format_size(peak)} peak memory"
    return [name, f"{1000 * took:.2f} ms", details]


def _classifier(module: nn.Module) -> nn.Module | None:
    get = getattr(module, "get_classifier", None)  # timm's models have it
    classifier = get() if callable(get) else None
    return classifier if isinstance(classifier, nn.Module) else None


def multiply_adds(module: nn.Module, image: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops() / 2  # a multiply-add is two operations


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median, after a warm-up."""
    run()
    took: list[float] = []
    began = time.perf_counter()
    while len(took) < REPEATS or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return median(took)


def memory(run: Callable[[], object], device: torch.device) -> float:
    """Peak bytes: on a GPU everything torch has allocated, on a CPU what the process uses in addition to
    before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return float(torch.cuda.max_memory_allocated(device))
    try:  # Linux: writing 5 resets the peak
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return max(0.0, _resident("VmHWM") - before)
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(name)).split()[1])
