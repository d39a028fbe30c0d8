"""One fold of one seed, from the first draw to the last weights. Nothing owns this loop but this page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from comp import losses, models, optim, transforms
from comp.data import Batch, epoch_rows, training_batches
from comp.engine.bank import score
from comp.engine.config.schema import Config
from comp.engine.data import class_balance
from comp.engine.data.samples import Positions
from comp.engine.data.seeding import fold_in
from comp.engine.errors import Refused
from comp.engine.hardware import Stop, Stopped
from comp.engine.run import (  # fmt: skip
    checkpoint,
    consistency,
    distillation,
    distributed,
    metric_learning,
    mixup,
    model_selection,
    normalize,
    pixel_stats,
    pretrained,
    pseudo_rows,
    schedule,
    target_scaler,
    torch_compile,
    tracking,
)
from comp.engine.run.averaging import WeightSets, bn_updater
from comp.engine.run.context import Context
from comp.engine.run.evaluate import HALF, forward_rows, raise_damaged
from comp.engine.run.freezing import Stages
from comp.engine.run.gpu_augment import to_device
from comp.engine.run.microbatch import MicroBatches
from comp.engine.run.nan_guard import REMEDY, NanGuard, list_samples
from comp.engine.run.profiler import Profiler

PULSE = 10  # seconds between two lines where nobody sees a progress bar: under nohup, in a notebook's log


def fold(
    context: Context,
    seed: int,
    number: int | str,
    folder: Path,
    log: tracking.RunLogger,
    *,
    stop: Stop | None = None,
    profiler: Profiler | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train a fold and write folder/weights.safetensors. After a kill, it resumes from the last checkpoint.

    context: that of the fold, its pseudo-labelled rows included (pseudo_rows.fold_context).
    stop: once requested, the state is saved after the current step and Stopped is raised.
    on_epoch: called with the report of each epoch; may raise distributed.Pruned to end the fold.
    """
    # --- setup ---------------------------------------------------------------------------------------------------------
    cfg, device, heads = context.cfg, context.device, context.samples.heads
    stop, profiler = stop or Stop(), profiler or Profiler(device)
    torch.manual_seed(fold_in(seed, 3))

    # --- data ----------------------------------------------------------------------------------------------------------
    taught, watched, judged = _rows(context, number)
    draw = class_balance.make_sampler(cfg, context.samples, taught)
    span = schedule.train_length(cfg, len(epoch_rows(taught, seed, 0, draw)))
    batch_size, accumulate, steps_per_epoch, steps = span
    curve = schedule.lr_schedule(cfg, span)
    truths = [pseudo_rows.training_target(context.samples, head) for head in heads]
    targets = [
        _target(each, device) for each in target_scaler.standardize(cfg, context.samples, taught, truths)
    ]
    lessons = distillation.teacher_targets(
        context, number, folder
    )  # what a teacher says, one more target a head
    weight = torch.tensor(context.samples.frame["weight"].to_numpy(), dtype=torch.float32, device=device)

    # --- model ---------------------------------------------------------------------------------------------------------
    module = models.build(cfg, heads, cfg.model.pretrained is True, context.loader).to(device)
    if checkpoint.log_offset(folder) is None:
        pretrained.begin(module, cfg, seed, number)
    stages = Stages(cfg, module)
    pixel_stats.fit_pixel_stats(cfg, module, context.loader, taught)
    target_scaler.fit(cfg, module, context.samples, taught)
    network = torch_compile.prepare(cfg, module)
    criterion = losses.build_loss(cfg, context.samples, taught)
    mixture = mixup.mixed_loss(
        cfg, heads, distillation.distillation_loss(cfg, context.samples, taught, criterion)
    )
    in_units = losses.build_loss(cfg, context.samples, taught, False)  # of the targets: to be read
    read = mixup.mixed_loss(
        cfg, heads, distillation.distillation_loss(cfg, context.samples, taught, in_units, False)
    )
    scaled = losses.has_scaled_targets(cfg, heads)  # what is read is not what is minimised
    apart = consistency.consistency_loss(cfg, heads)
    optimizer = optim.optimizer(cfg, module)
    kept = WeightSets(cfg, module, folder, schedule.snapshot_steps(cfg, span))
    judge = model_selection.build_scorer(
        context, judged, transforms.Preprocess(normalize.build(cfg, module, device))
    )
    renew = bn_updater(
        context, stages, seed, lambda: training_batches(taught, batch_size, seed, cfg.train.epochs, 0, draw)
    )
    second_order = optim.second_order(optimizer)
    half = HALF[cfg.train.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)

    # --- resume --------------------------------------------------------------------------------------------------------
    step, losses_seen = 0, list[float]()  # of this epoch
    state = distributed.broadcast(checkpoint.load_latest(folder, device))
    distributed.validate_resume(state)
    if state is not None:
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        kept.load(state["kept"])
        distributed.broadcast_files(folder)
        step, losses_seen = state["step"], state["losses"]
        curve.seen.extend(state["epochs"])
    distributed.validate(cfg, batch_size, accumulate, module)
    distributed.broadcast_module(module)
    room = MicroBatches(module, state["room"] if state else batch_size, cfg.augment.group_size)
    looks = NanGuard(log, context.samples, half == torch.float16, room.size)

    def save() -> None:
        looks.weights(module, step)
        checkpoint.save(folder, step, {
            "step": step, "processes": distributed.world_size(), "room": room.size, "losses": losses_seen, "epochs": curve.seen,
            "model": module.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "kept": kept.state(),
        }, log.offset())  # fmt: skip

    # --- epochs --------------------------------------------------------------------------------------------------------
    bar = tqdm(
        total=steps * span.effective,
        initial=step * span.effective,
        desc=f"seed {seed} fold {number}",
        unit=" images",
        unit_scale=True,
        disable=_quiet(cfg),
        leave=False,
    )
    watched_last, said = "", time.perf_counter()
    profiler.start()
    for epoch in range(step // steps_per_epoch, cfg.train.epochs):
        if kept.enough():
            break
        stages.enter(epoch)
        began, drawn = time.perf_counter(), 0
        first = (step - epoch * steps_per_epoch) * accumulate
        today = transforms.epoch_augment(
            cfg, epoch
        )  # the size of its pictures, and whether the strong ops are on
        seen = transforms.Preprocess(
            normalize.build(cfg, module, device), transforms.epoch_recipe(cfg, today)
        )
        mix = mixup.epoch_mix(cfg, today)
        plan = training_batches(taught, batch_size, seed, epoch, first, draw)
        batches = context.loader.batches(distributed.shard(plan, accumulate, cfg.augment.group_size), today)
        while step < (epoch + 1) * steps_per_epoch:
            optim.set_lr(optimizer, curve.rate(step), curve.momentum(step))
            looks.begin(step + 1, curve.rate(step))
            room.begin(
                (_whole(next(batches), context) for _ in range(distributed.local_passes(accumulate))),
                fold_in(seed, step, 4, distributed.rank()),
            )
            drawn += span.effective
            profiler.lap("waiting for pictures")
            while room.to_do:
                with room.fits(looks.again):
                    batch = room.to_do.popleft()
                    images = seen(batch.images.permute(0, 3, 1, 2), batch.seeds)  # float, normalised
                    images, parts = mix(images, batch.seeds)  # parts: whose targets, with which share
                    profiler.lap("colour and normalising")
                    rows = to_device(batch.samples, device)
                    truth = [target[rows] for target in (*targets, *lessons)]
                    with torch.autocast(device.type, half, enabled=half is not None):
                        output = network(images, **context.loader.extras(batch))  # (batch, all outputs)
                    each = mixture(output, truth, weight[rows], parts) + apart(output)  # (batch,), weighted
                    share = len(batch.samples) / span.effective
                    loss = losses.reduce(each, cfg.loss.ohem) * share
                    shown = loss
                    if scaled:
                        told = read(output.detach(), truth, weight[rows], parts)
                        shown = losses.reduce(told, cfg.loss.ohem) * share
                    profiler.lap("forward")
                    scaler.scale(loss).backward(create_graph=second_order)
                    profiler.lap("backward")
                    looks.note(batch.samples, each, shown)
            distributed.sum_gradients(module)
            if cfg.optim.clip_grad is not None:
                scaler.unscale_(optimizer)
                looks.note_gradient(optim.clip_gradients(cfg, module))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            profiler.lap("step")
            step += 1
            bar.update(span.effective)
            last = step == (epoch + 1) * steps_per_epoch
            inside = not last and cfg.train.checkpoint_every and step % cfg.train.checkpoint_every == 0
            stopping = distributed.any_reduce(stop.requested) and not last
            if last or inside or stopping or looks.due or step in kept.ends:
                losses_seen += looks.look(room.size)
                bar.set_postfix_str(f"loss {losses_seen[-1]:.4f}{watched_last}")
            if step in kept.ends:
                looks.weights(module, step)
            kept.after_step(step)
            if inside or stopping:
                save()
            if stopping:
                raise Stopped(f"saved at step {step} of {steps}")
        report = {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": sum(losses_seen) / steps_per_epoch,
            "images_per_second": round(drawn / (time.perf_counter() - began), 1),
        }
        curve.seen.append(report["train_loss"])
        losses_seen.clear()
        profiler.lap("log and checkpoint")
        report |= validate(context, kept.current, seen, in_units, watched, targets, step)
        report |= kept.after_epoch(epoch + 1, judge)
        profiler.lap("validation")
        log.log(report)
        distributed.call_on_epoch(on_epoch, report)
        watched_last = "".join(f", {k} {v:.4f}" for k, v in report.items() if k.startswith("valid"))
        bar.set_postfix_str(f"loss {report['train_loss']:.4f}{watched_last}")
        if bar.disable and cfg.machine.progress and time.perf_counter() - said >= PULSE:
            said = time.perf_counter()
            left = (steps - step) * span.effective / report["images_per_second"]
            bar.write(f"seed {seed} fold {number}, epoch {epoch + 1} of {cfg.train.epochs}: loss {report['train_loss']:.4f}{watched_last}, "
                      f"{report['images_per_second']:.0f} images/s, {left:.0f} s left")  # fmt: skip
        save()
        kept.drop(epoch + 1)

    # --- finish --------------------------------------------------------------------------------------------------------
    bar.close()
    kept.seal(renew, judge, log.offset())
    if not cfg.keep.optimizer_state:
        checkpoint.delete(folder)


def planned(
    context: Context, seed: int, number: int | str
) -> schedule.LRSchedule | schedule.StagedLRSchedule:
    """The schedule of a fold, before it runs. `context`: that of the fold."""
    taught, _, _ = _rows(context, number)
    draw = class_balance.make_sampler(context.cfg, context.samples, taught)
    span = schedule.train_length(context.cfg, len(epoch_rows(taught, seed, 0, draw)))
    return schedule.lr_schedule(context.cfg, span)


def _rows(context: Context, number: int | str) -> list[Positions]:
    """Rows that train, rows to watch the score of, rows that a choice is made on."""
    rows = [
        metric_learning.drop_unknown_class(context.cfg, context.samples, each)
        for each in model_selection.fold_rows(context, number)
    ]
    if len(rows[0]) == 0:
        raise Refused(f"fold {number}: no rows to train on")
    return rows


def validate(
    context: Context,
    module: nn.Module,
    seen: transforms.Preprocess,
    criterion: losses.Total,
    rows: Positions,
    targets: list[Tensor],
    step: int,
) -> dict[str, float]:
    """Loss and metric on the scored rows, to watch; the score called CV comes from oof.arrow alone."""
    if len(rows) == 0:
        return {}
    cfg = context.cfg
    distributed.broadcast_buffers(module)
    raw, damaged = forward_rows(module, context.loader, rows, cfg.predict.batch_size, seen, cfg.train.amp)
    raise_damaged(damaged, context.samples)
    truth = [target[rows].cpu() for target in targets]
    loss = criterion(torch.from_numpy(target_scaler.to_loss_units(cfg, module, raw[0])), truth).numpy()
    if len(bad := rows[~(np.isfinite(loss) & np.isfinite(raw[0]).all(1))]):
        raise distributed.CollectiveError(
            f"validation behind step {step}: NaN or inf{list_samples(context.samples, bad)}: {REMEDY}; the last checkpoint is from before"
        )
    report = {"valid_loss": float(loss.mean())}
    for head, stored in zip(
        context.samples.heads, models.decode(cfg, context.samples.heads, raw[0]), strict=True
    ):
        if stored.shape[1] == 0:
            continue  # embeddings without centres
        name = "valid_metric" if len(context.samples.heads) == 1 else f"valid_metric_{head.name}"
        report[name] = score.validation_score(cfg, head, stored, context.samples, rows)
    return report


def _target(values: NDArray[Any], device: torch.device) -> Tensor:
    kind = torch.long if np.issubdtype(values.dtype, np.integer) else torch.float32
    return torch.tensor(values, dtype=kind, device=device)


def _whole(batch: Batch, context: Context) -> Batch:
    raise_damaged(batch.damaged, context.samples)
    return batch


def _quiet(cfg: Config) -> bool | None:
    """None lets tqdm find out whether anybody is watching."""
    return None if cfg.machine.progress else True
