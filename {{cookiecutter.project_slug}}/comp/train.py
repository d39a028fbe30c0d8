"""The training loop: one fold of one seed, from data and model to the final weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from comp import losses, models, optim, transforms
from comp.data import Batch, Index, epoch_rows, training_batches
from comp.engine.bank import score
from comp.engine.config.schema import Config
from comp.engine.data import class_balance
from comp.engine.data.samples import Positions
from comp.engine.data.seeding import derive_seed
from comp.engine.hardware import Stop, Stopped
from comp.engine.run import (
    checkpoint,
    consistency,
    distillation,
    distributed,
    mixup,
    model_selection,
    normalize,
    pixel_stats,
    pretrained,
    schedule,
    target_scaler,
    torch_compile,
    tracking,
)
from comp.engine.run.averaging import WeightSets, bn_updater
from comp.engine.run.context import Context
from comp.engine.run.device import AMP_DTYPES, to_device
from comp.engine.run.forward import forward_rows, raise_damaged
from comp.engine.run.microbatch import MicroBatches
from comp.engine.run.nan_guard import NanGuard, nan_error
from comp.engine.run.profiler import Profiler
from comp.engine.run.stages import Stages

LOG_INTERVAL = 10  # seconds between two printed lines where there is no progress bar: nohup, a notebook's log


def train_fold(
    context: Context,
    seed: int,
    fold: int | str,
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
    # --- setup ------------------------------------------------------------------------------------
    cfg, device, heads = context.cfg, context.device, context.samples.heads
    stop, profiler = stop or Stop(), profiler or Profiler(device)
    torch.manual_seed(derive_seed(seed, 3))

    # --- data -------------------------------------------------------------------------------------
    train_rows, valid_rows, select_rows = model_selection.fold_rows(context, fold)
    sampler = class_balance.make_sampler(cfg, context.samples, train_rows)
    length = schedule.train_length(cfg, len(epoch_rows(train_rows, seed, 0, sampler)))
    batch_size, grad_accum_steps, steps_per_epoch, steps = length  # a schedule.TrainLength
    lr_schedule = schedule.lr_schedule(cfg, length)
    targets = target_scaler.training_targets(cfg, context.samples, train_rows, device)  # one per head
    teacher_targets = distillation.teacher_targets(context, fold, folder)  # one more per head, or none
    weight = torch.tensor(context.samples.frame["weight"].to_numpy(), dtype=torch.float32, device=device)

    # --- model ------------------------------------------------------------------------------------
    model = models.build(cfg, heads, cfg.model.pretrained is True, context.loader).to(device)
    if checkpoint.log_offset(folder) is None:
        pretrained.load_pretrained(model, cfg, seed, fold)
    stages = Stages(cfg, model)
    pixel_stats.fit_pixel_stats(cfg, model, context.loader, train_rows)
    target_scaler.fit(cfg, model, context.samples, train_rows)
    compiled_model = torch_compile.prepare(cfg, model)  # same weights
    # Regression targets are standardized: one loss is minimized, the same in the target's units is logged.
    valid_loss = losses.build_loss(cfg, context.samples, train_rows, standardized=False)
    criterion = _mixed_criterion(context, train_rows, standardized=True)
    logged_criterion = _mixed_criterion(context, train_rows, standardized=False)
    log_other_loss = losses.has_scaled_targets(cfg, heads)
    consistency_loss = consistency.consistency_loss(cfg, heads)
    optimizer = optim.optimizer(cfg, model)
    weight_sets = WeightSets(cfg, model, folder, schedule.snapshot_steps(cfg, length))  # EMA, SWA, snapshots
    plain_preprocess = transforms.Preprocess(normalize.build(cfg, model, device))  # no augmentation
    scorer = model_selection.build_scorer(context, select_rows, plain_preprocess)
    second_order = optim.second_order(optimizer)
    half = AMP_DTYPES[cfg.train.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)

    # --- resume -----------------------------------------------------------------------------------
    step, step_losses = 0, list[float]()  # losses of the current epoch's steps
    state = distributed.broadcast(checkpoint.load_latest(folder, device))
    distributed.validate_resume(state)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        weight_sets.load_state_dict(state["weight_sets"])
        distributed.broadcast_files(folder)
        step, step_losses = state["step"], state["step_losses"]
        lr_schedule.epoch_losses.extend(state["epoch_losses"])
    distributed.validate(cfg, batch_size, grad_accum_steps, model)
    distributed.broadcast_module(model)
    micro_batch_size = state["micro_batch_size"] if state else batch_size
    micro_batches = MicroBatches(model, micro_batch_size, cfg.augment.group_size)
    nan_guard = NanGuard(log, context.samples, half == torch.float16, micro_batches.size)

    def save() -> None:
        nan_guard.check_weights(model, step)
        checkpoint.save(folder, step, {
            "step": step, "world_size": distributed.world_size(), "micro_batch_size": micro_batches.size,
            "step_losses": step_losses, "epoch_losses": lr_schedule.epoch_losses,
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "weight_sets": weight_sets.state_dict(),
        }, log.offset())  # fmt: skip

    # --- epochs -----------------------------------------------------------------------------------
    title = f"seed {seed} fold {fold}"
    bar = _progress_bar(cfg, length, step, title)
    valid_text, last_line = "", time.perf_counter()
    profiler.start()
    for epoch in range(step // steps_per_epoch, cfg.train.epochs):
        if weight_sets.should_stop():
            break
        stages.set_trainable(epoch)
        epoch_start, images_seen = time.perf_counter(), 0
        first_batch = (step - epoch * steps_per_epoch) * grad_accum_steps
        augment = transforms.epoch_augment(cfg, epoch)  # image size, and whether strong augmentation is on
        recipe = transforms.epoch_recipe(cfg, augment)
        preprocess = transforms.Preprocess(normalize.build(cfg, model, device), recipe)
        mix = mixup.epoch_mix(cfg, augment)
        plan = training_batches(train_rows, batch_size, seed, epoch, first_batch, sampler)
        plan = distributed.shard(plan, grad_accum_steps, cfg.augment.group_size)
        batches = context.loader.batches(plan, augment)
        while step < (epoch + 1) * steps_per_epoch:
            optim.set_lr(optimizer, lr_schedule.lr(step), lr_schedule.momentum(step))
            nan_guard.start_step(step + 1, lr_schedule.lr(step))
            step_batches = _undamaged(batches, distributed.local_batches(grad_accum_steps), context)
            micro_batches.start_step(step_batches, derive_seed(seed, step, 4, distributed.rank()))
            images_seen += length.effective_batch_size
            profiler.lap("data loading")
            while micro_batches.pending:
                with micro_batches.retry_on_oom(nan_guard.restart_step):
                    batch = micro_batches.pending.popleft()
                    images = preprocess(batch.images.permute(0, 3, 1, 2), batch.seeds)  # float, normalized
                    images, mix_parts = mix(images, batch.seeds)  # mix_parts: whose targets, with which share
                    profiler.lap("augmentation")
                    rows = to_device(batch.samples, device)
                    target = [each[rows] for each in (*targets, *teacher_targets)]
                    with torch.autocast(device.type, half, enabled=half is not None):
                        output = compiled_model(images, **context.loader.extras(batch))  # (batch, outputs)
                    per_sample_loss = criterion(output, target, weight[rows], mix_parts)  # (batch,), weighted
                    per_sample_loss = per_sample_loss + consistency_loss(output)
                    share = len(batch.samples) / length.effective_batch_size
                    loss = losses.reduce(per_sample_loss, cfg.loss.ohem) * share
                    logged_loss = loss
                    if log_other_loss:
                        logged = logged_criterion(output.detach(), target, weight[rows], mix_parts)
                        logged_loss = losses.reduce(logged, cfg.loss.ohem) * share
                    profiler.lap("forward")
                    scaler.scale(loss).backward(create_graph=second_order)
                    profiler.lap("backward")
                    nan_guard.record(batch.samples, per_sample_loss, logged_loss)
            distributed.sum_gradients(model)
            if cfg.optim.clip_grad is not None:
                scaler.unscale_(optimizer)
                nan_guard.record_grad_norm(optim.clip_gradients(cfg, model))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            profiler.lap("step")
            step += 1
            bar.update(length.effective_batch_size)
            last_step = step == (epoch + 1) * steps_per_epoch
            save_now = not last_step and cfg.train.checkpoint_every and step % cfg.train.checkpoint_every == 0
            stop_now = distributed.any_reduce(stop.requested) and not last_step
            snapshot_now = step in weight_sets.snapshot_steps
            if last_step or save_now or stop_now or nan_guard.due or snapshot_now:
                step_losses += nan_guard.check(micro_batches.size)
                bar.set_postfix_str(f"loss {step_losses[-1]:.4f}{valid_text}")
            if snapshot_now:
                nan_guard.check_weights(model, step)
            weight_sets.after_step(step)
            if save_now or stop_now:
                save()
            if stop_now:
                raise Stopped(f"saved at step {step} of {steps}")
        report = {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": sum(step_losses) / steps_per_epoch,
            "images_per_second": round(images_seen / (time.perf_counter() - epoch_start), 1),
        }
        lr_schedule.epoch_losses.append(report["train_loss"])
        step_losses.clear()
        profiler.lap("log and checkpoint")
        report |= evaluate(context, weight_sets.eval_model, preprocess, valid_loss, valid_rows, targets, step)
        report |= weight_sets.after_epoch(epoch + 1, scorer)
        profiler.lap("validation")
        log.log(report)
        distributed.call_on_epoch(on_epoch, report)
        valid_text = score.valid_text(cfg, heads, report)
        bar.set_postfix_str(f"loss {report['train_loss']:.4f}{valid_text}")
        if bar.disable and cfg.machine.progress and time.perf_counter() - last_line >= LOG_INTERVAL:
            last_line = time.perf_counter()
            speed = report["images_per_second"]
            seconds_left = (steps - step) * length.effective_batch_size / speed
            text = f"{title}, epoch {epoch + 1} of {cfg.train.epochs}: loss {report['train_loss']:.4f}"
            bar.write(f"{text}{valid_text}, {speed:.0f} images/s, {seconds_left:.0f} s left")
        save()
        weight_sets.delete_unneeded(epoch + 1)

    # --- finish -----------------------------------------------------------------------------------
    bar.close()

    def one_more_epoch() -> Iterator[list[Index]]:  # augmented with draws that no training epoch used
        return training_batches(train_rows, batch_size, seed, cfg.train.epochs, 0, sampler)

    weight_sets.write(bn_updater(context, stages, seed, one_more_epoch), scorer, log.offset())
    if not cfg.keep.optimizer_state:
        checkpoint.delete(folder)


def planned_schedule(context: Context, seed: int, fold: int | str) -> schedule.Schedule:
    """The learning-rate schedule of a fold, before it is trained. `context`: that of the fold."""
    train_rows, _, _ = model_selection.fold_rows(context, fold)
    sampler = class_balance.make_sampler(context.cfg, context.samples, train_rows)
    length = schedule.train_length(context.cfg, len(epoch_rows(train_rows, seed, 0, sampler)))
    return schedule.lr_schedule(context.cfg, length)


def evaluate(
    context: Context,
    model: nn.Module,
    preprocess: transforms.Preprocess,
    criterion: losses.MultiHeadLoss,
    rows: Positions,
    targets: list[Tensor],
    step: int,
) -> dict[str, float]:
    """Loss and metric on the validation rows, for the log. The CV score comes from oof.arrow instead."""
    if len(rows) == 0:
        return {}
    cfg, heads = context.cfg, context.samples.heads
    distributed.broadcast_buffers(model)
    batch_size, amp = cfg.predict.batch_size, cfg.train.amp
    # raw: (1, rows, outputs of all heads)
    raw, damaged = forward_rows(model, context.loader, rows, batch_size, preprocess, amp)
    raise_damaged(damaged, context.samples)
    output = torch.from_numpy(target_scaler.to_loss_units(cfg, model, raw[0]))
    loss = criterion(output, [target[rows].cpu() for target in targets]).numpy()  # (rows,)
    if len(nan_rows := rows[~(np.isfinite(loss) & np.isfinite(raw[0]).all(1))]):
        where, what = f"validation after step {step}", "outputs or losses are NaN or inf"
        raise nan_error("validation-not-finite", where, what, context.samples, nan_rows)
    report = {"valid_loss": float(loss.mean())}
    for head, prediction in zip(heads, models.decode(cfg, heads, raw[0]), strict=True):
        if prediction.shape[1] == 0:
            continue  # contrastive and triplet: embeddings without class scores
        name = "valid_metric" if len(heads) == 1 else f"valid_metric_{head.name}"
        report[name] = score.validation_score(cfg, head, prediction, context.samples, rows)
    return report


def _mixed_criterion(context: Context, train_rows: Positions, standardized: bool) -> mixup.MixedLoss:
    """(output, targets, weight, mix_parts) -> (batch,): loss of labels and teacher, mixed images included."""
    cfg, samples = context.cfg, context.samples
    label_loss = losses.build_loss(cfg, samples, train_rows, standardized)
    loss = distillation.distillation_loss(cfg, samples, train_rows, label_loss, standardized)
    return mixup.mixed_loss(cfg, samples.heads, loss)


def _undamaged(batches: Iterator[Batch], count: int, context: Context) -> Iterator[Batch]:
    """The next batches; a damaged image is an error, since half an image is no training sample."""
    for _ in range(count):
        batch = next(batches)
        raise_damaged(batch.damaged, context.samples)
        yield batch


def _progress_bar(cfg: Config, length: schedule.TrainLength, step: int, description: str) -> tqdm[Any]:
    images = length.effective_batch_size
    disable = None if cfg.machine.progress else True  # None: disabled where stderr is no terminal
    options: dict[str, Any] = {"unit": " images", "unit_scale": True, "disable": disable, "leave": False}
    return tqdm(total=length.steps * images, initial=step * images, desc=description, **options)
