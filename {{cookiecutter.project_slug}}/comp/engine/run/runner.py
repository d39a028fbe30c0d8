"""One experiment as jobs: each (seed, fold) goes from config to predictions by itself, whoever starts it."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from comp.engine import hardware
from comp.engine.config import experiments, resolve, run_members
from comp.engine.config.resolve import Loaded
from comp.engine.config.schema import Config
from comp.engine.errors import Refused, UserError
from comp.engine.run import fingerprint, unused_knobs
from comp.engine.store import artifacts, locks, paths, process

if TYPE_CHECKING:
    from collections.abc import Callable

    from comp.engine.run.context import Context
    from comp.engine.run.profiler import Profiler


def train(
    experiment: str,
    overrides: list[str],
    *,
    fold: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    fresh: bool = False,
    debug: bool = False,
    profile: bool = False,
    on: str | None = None,
    time_limit: str | None = None,
    stop: hardware.Stop | None = None,
) -> None:
    """Every fold of every seed that is not done yet, one after the other or side by side, then the run's score."""
    stop = hardware.Stop(hardware.parse_duration("--time-limit", time_limit)) if time_limit else stop
    _validate_parallel(on, profile, stop)
    loaded = experiments.load(experiment, overrides, debug, claimed=name or experiment)
    cfg = unused_knobs.warn(loaded)
    changed = resolve.changes_results(overrides)
    if changed and name is None:
        raise Refused(
            f"{' '.join(changed)} changes results, so it is another run: give it a name with --as NAME"
        )
    command = _command(experiment, overrides, name, debug)
    name = name or (f"{experiment}-debug" if debug else experiment)
    fingerprint.validate_name(name)
    _check_teachers(cfg)
    seeds = cfg.train.seeds if seed is None else [seed]
    afresh = fresh or name.endswith("-debug")
    places = [paths.run_folder(name)]
    if fold is not None:
        places = [paths.fold_folder(name, s, int(fold) if fold.isdigit() else fold) for s in seeds]
    old = places if afresh else []
    fingerprint.validate_images(name, cfg, old)
    hardware.set_threads(cfg.train.threads)
    from comp.engine.run import run_media
    from comp.engine.run.profiler import Profiler

    context = gather(cfg, loaded)
    stop, profiler = stop or hardware.Stop(), Profiler(context.device, profile)
    folds = _wanted(fold, context.folds.count)
    fingerprint.claim(name, cfg, context.folds, command, old)
    _announce(context, name, seeds, folds)
    todo = [(s, number) for s in seeds for number in folds]
    try:
        if on is not None:
            _side_by_side(context, name, todo, on, stop)
        for s, number in todo if on is None else []:
            one_fold(context, name, s, number, stop=stop, profiler=profiler)
            if stop.asked:
                raise hardware.Stopped(f"seed {s} fold {number} is done")
    except hardware.Stopped as stopped:
        if not stop.out_of_time:
            raise
        print(f"time limit: {stopped}")
    if profile:
        print(profiler.table())
    if score := _merge(name, cfg, asked=run_members.REFIT if folds == [run_members.REFIT] else ""):
        run_media.log_summary(context, name, fingerprint.run_id(name), score)


def _validate_parallel(on: str | None, profile: bool, stop: hardware.Stop | None) -> None:
    if on is not None and profile:
        raise Refused("--profile looks into one process; leave --on out")
    if on is not None and (stop is not None or hardware.world_size() > 1):
        what = "--time-limit" if stop is not None else "torchrun"
        raise Refused(f"{what}: is for folds one after the other; leave --on out")


def _command(experiment: str, overrides: list[str], name: str | None, debug: bool) -> str:
    """What to type to go on with a run. One that is its own source goes on as it began."""
    alone = (
        name in (None, experiment) and not debug and not paths.path("configs", f"{experiment}.yaml").exists()
    )
    if alone:
        began = shlex.split(fingerprint.resume_command(experiment))
        return shlex.join([*began, *(each for each in overrides if each not in began)])
    flags = [*(["--as", name] if name else []), *(["--debug"] if debug else [])]
    return shlex.join(["comp", "train", experiment, *flags, *overrides])


def _check_teachers(cfg: Config) -> None:
    """Who teaches beside the labels is needed to train, and not to predict."""
    if cfg.data.pseudo_labels is None and cfg.distill.teacher is None:
        return
    from comp.engine.data import folds, samples
    from comp.engine.run import pseudo_rows, teachers

    split = folds.load(samples.load())
    pseudo_rows.validate(cfg, split)
    if cfg.distill.teacher is not None:
        teachers.load(cfg.distill.teacher, split, "distill.teacher")


def _side_by_side(
    context: Context, name: str, todo: list[tuple[int, int | str]], on: str, stop: hardware.Stop
) -> None:
    """The same folds, each in a process of its own. What is left of a killed one is gone on with elsewhere."""
    from tqdm import tqdm

    from comp.engine.run import launcher

    left = [(s, n) for s, n in todo if not experiments.finished_folds(name, s, [n])]
    job = f"{process.own_id()}-{time.time_ns()}"
    jobs = [
        launcher.Job(f"{name} seed {s} fold {n}", "fold", {"name": name, "seed": s, "number": n, "job": job})
        for s, n in left
    ]
    if not jobs:
        return
    executor = launcher.make_executor(on, context.cfg.train.threads)
    print(f"{name}: {len(jobs)} folds, {min(executor.size, len(jobs))} at a time", flush=True)
    quiet = None if context.cfg.machine.progress else True
    with tqdm(total=len(jobs), desc=name, unit="fold", disable=quiet, leave=False) as bar:
        launcher.run_jobs(jobs, executor, stop, lambda left: bar.update(len(jobs) - left - bar.n))


def part(name: str, seed: int, number: int | str, job: str = "") -> None:
    """One fold of a run that was begun elsewhere, by the config that lies in it."""
    cfg = stored_config(name)
    fingerprint.validate_images(name, cfg)
    hardware.set_threads(cfg.train.threads)
    one_fold(gather(cfg), name, seed, number, stop=hardware.Stop(), wait=True, job=job)


def gather(cfg: Config, loaded: Loaded | None = None) -> Context:
    """Load what every fold shares, and refuse what no fold could do. Here torch is imported, after the threads are settled.
    `loaded`: of what is going to be trained, as configs/ declare it now."""
    from comp.engine.bank import score
    from comp.engine.data import folds, samples
    from comp.engine.run import pretrained
    from comp.engine.tasks import loss_knobs

    table = samples.load()
    split = folds.load(table)
    if loaded is not None:
        folds.validate_plan(split, loaded)
    pretrained.validate(cfg, split)
    score.metric_of(cfg)
    loss_knobs.head_losses(cfg, table.heads)
    import torch

    from comp import models, optim
    from comp.engine.run import consistency, distillation, distributed, mixup, views
    from comp.engine.run.context import Context
    from comp.engine.run.data_loader import Loader

    distributed.init()
    views.views(cfg.predict.tta)
    models.output_sizes(cfg, table.heads)
    models.validate(cfg)
    optim.validate(cfg)
    with torch.device("meta"):  # what this network does not take is refused before pictures are decoded
        network = models.build(cfg, table.heads, pretrained=False)
    if file := pretrained.weights_file(cfg):
        pretrained.matching_weights(network, cfg, file)
    device = hardware.device(cfg.machine.device)
    torch.backends.cudnn.allow_tf32 = (
        cfg.train.amp != "fp32"
    )  # fp32 means it: predictions are compared to 1e-5
    loader = Loader(cfg, table, device)
    distillation.validate(cfg, table.heads)
    consistency.validate(cfg, table.heads)
    mixup.validate(cfg, table.heads, loader.multi_image)
    if cfg.model.image_pool != "mean" and not loader.multi_image:
        raise Refused(
            f"model.image_pool: {cfg.model.image_pool} has no effect, since every sample has one image; set it to mean"
        )
    return Context(cfg, table, split, loader, device)


def one_fold(
    context: Context,
    name: str,
    seed: int,
    number: int | str,
    *,
    stop: hardware.Stop,
    profiler: Profiler | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,  # of a search: may raise distributed.Pruned
    search: bool = False,
    wait: bool = False,  # for another process that is at it, one that is about to die
    job: str = "",  # of a queue that hands it out again: see locks.lock
) -> None:
    """Idempotent: what is sealed already is not done again. A search needs neither pictures nor test rows."""
    from comp import predict, train
    from comp.engine.data import cache
    from comp.engine.run import checkpoint, distributed, pseudo_rows, run_media, teacher_predictions, tracking

    folder = paths.fold_folder(name, seed, number)

    def done() -> bool:
        return bool(
            experiments.finished_folds(name, seed, [number])
            or (search and artifacts.manifest_entry(folder / "oof.arrow"))
        )

    if done():
        return
    cfg = context.cfg
    if isinstance(context.loader.images.images, cache.UncachedImages):
        fingerprint.validate_images(name, cfg)  # a cache goes on with what it was opened with
    doing = f"training seed {seed} fold {number}"
    with locks.lock(folder, doing, wait=wait, job=job), stop.listening():
        if done():
            return
        began = time.perf_counter()
        log = tracking.open_log(
            folder,
            run_id=f"{name}-{fingerprint.run_id(name)}-seed{seed}-fold{number}",
            name=f"{name}/seed{seed}/fold{number}",
            group=name,
            job_type="fold",
            config=cfg.model_dump(),
            settings=cfg.track,
            resume_at=checkpoint.log_offset(folder),
        )
        with log:
            if not search:
                run_media.log_inputs(context, log, name, folder, number)
            if not artifacts.manifest_entry(folder / "weights.safetensors"):
                own = pseudo_rows.fold_context(context, number)
                teacher_predictions.prepare(own, gather, number, folder, stop)
                with distributed.collective(_order(cfg, seed, number)):
                    train.fold(
                        own, seed, number, folder, log, stop=stop, profiler=profiler, on_epoch=on_epoch
                    )
            if number != run_members.REFIT:
                predict.write_fold(context, name, seed, number, "oof", stop=stop)
            if number != run_members.REFIT and not search:
                run_media.log_results(context, log, name, folder)
            log.finish()
            if search:
                return
            for inside in [
                *run_members.extra_weights(cfg),
                "",
            ]:  # the run itself last: with it the fold is finished
                for kind in ("oof", "test") if number != run_members.REFIT else ("test",):
                    predict.write_fold(context, name, seed, number, kind, inside, stop=stop)
    print(
        f"{name} seed {seed} fold {number}: {run_media.last_epoch(folder)}, {time.perf_counter() - began:.0f} s"
    )


def _order(cfg: Config, seed: int, fold: int | str) -> dict[str, Any]:
    """What the other processes of a torchrun hear (gang.py): without bars and W&B, which are for the first."""
    told = cfg.model_dump()
    told["machine"]["progress"], told["track"]["mode"] = False, "none"
    return {"config": told, "seed": seed, "fold": fold}


def predict(
    experiment: str | None, *, tta: str | None = None, space: str | None = None, last_look: bool = False
) -> None:
    """Merge what is there; with other views, predict every stored fold again into a member of its own. Of exp001:full only the
    refit."""
    from comp.engine.bank import merge

    if experiment is None:
        raise UserError(
            "run-missing",
            where="comp predict",
            what="the name of a run is missing",
            remedy="comp predict exp001",
        )
    address = experiment
    name, _, member = address.partition(":")
    if member not in ("", run_members.REFIT):
        raise Refused(
            f"{address}: comp predict takes a run, or its refit: {name} or {name}:{run_members.REFIT}"
        )
    cfg = stored_config(name)
    if member and not experiments.refit_seeds(name):
        raise experiments.missing_predictions(address, "test predictions")
    if tta is None and space is None and not last_look:
        _merge(name, cfg, asked=member)
        return
    fingerprint.validate_images(name, cfg)
    hardware.set_threads(cfg.train.threads)
    from comp.engine.run import holdout, repredict

    if last_look:
        if member:
            raise Refused(
                f"--last-look: the refit was trained on some rows, not scored: comp predict {name} --last-look"
            )
        print(f"{name}: {holdout.score_holdout(gather(cfg), name)}")
        return
    views = [view.strip() for view in tta.split(",")] if tta else cfg.predict.tta
    for made in repredict.predict(
        gather(cfg), name, views, space or cfg.predict.averaging_space, refit_only=bool(member)
    ):
        merge.print_result(name, made)


def augmentation_sheet(experiment: str, overrides: list[str]) -> None:
    from comp.engine.data import samples
    from comp.engine.run import augment_grid

    cfg = experiments.load(experiment, overrides).config
    hardware.set_threads(cfg.train.threads)
    file = paths.path("runs", f"{experiment}-augment.png")
    augment_grid.write(cfg, samples.load(), file)
    print(*augment_grid.ops(cfg), sep="\n")
    print(
        f"written: {paths.relative(file)}: first column as it is, then seven draws\nnext: comp train {experiment}"
    )


def draw_schedule(experiment: str, overrides: list[str], *, debug: bool = False) -> None:
    from comp.engine.run import plot_schedule

    loaded = experiments.load(experiment, overrides, debug)
    unused_knobs.warn(loaded)
    plot_schedule.plot(loaded, experiment)


def lr_range(
    experiment: str, overrides: list[str], *, low: float, high: float, steps: int, linear: bool
) -> None:
    if not 0 < low < high:
        raise Refused(f"--low {low:g} --high {high:g}: rates climb from above 0")
    loaded = experiments.load(experiment, overrides)
    cfg = loaded.config
    hardware.set_threads(cfg.train.threads)
    from comp.engine.run import lr_range

    if steps < lr_range.MIN_POINTS:
        raise Refused(f"--steps {steps}: {lr_range.MIN_POINTS} is the least that shows anything")
    png, csv = (paths.path("runs", f"{experiment}-lr-range.{kind}") for kind in ("png", "csv"))
    context = gather(cfg, loaded=loaded)
    points = lr_range.sweep(context, low, high, steps, linear)
    rate = lr_range.to_base_lr(context, lr_range.write(cfg, points, png, csv, linear))
    print(
        f"{len(points)} steps from rate {points[0].rate:.3g} to {points[-1].rate:.3g}; suggested: optim.lr={rate:.2g}"
    )
    print(f"{paths.relative(png)}, {paths.relative(csv)}")
    print(f"next: comp train {experiment} --as {experiment}r optim.lr={rate:.2g}")


def stored_config(name: str) -> Config:
    return experiments.stored_config(name)


def _announce(context: Context, name: str, seeds: list[int], numbers: list[int | str]) -> None:
    """How much will be written, refused now rather than in the middle of the last fold; and a warm-up that is cut short. The first
    fold stands for all, which differ by a few steps."""
    from comp import models, train
    from comp.engine.bank import bank
    from comp.engine.run import knn, pseudo_rows, schedule

    todo = [(s, n) for s in seeds for n in numbers if not experiments.finished_folds(name, s, [n])]
    if not todo:
        return
    weights = models.weight_bytes(context.cfg, context.samples.heads)
    weights += knn.gallery_bytes(context.cfg, context.samples)
    # While a fold trains its state holds the weights, two moments and the averaged weights, old and new at once.
    kept = len(todo) * (1 + len(run_members.extra_weights(context.cfg)))
    rows = len(context.samples.positions("train")) + len(context.samples.positions("test"))
    size = kept * (weights + bank.nbytes(context.samples, rows)) + 8 * weights
    print(
        f"{name}: {len(todo)} of {len(seeds) * len(numbers)} folds to train, up to {artifacts.format_size(size)} to write"
    )
    seed, first = todo[0]
    for line in schedule.shortened_warmups(
        train.planned(pseudo_rows.fold_context(context, first), seed, first)
    ):
        print(line, file=sys.stderr)
    artifacts.require_space(size, f"runs/{name}")


def _wanted(fold: str | None, count: int) -> list[int | str]:
    if fold is None:
        return list(range(count))
    if fold == run_members.REFIT:
        return [fold]
    if not fold.isdigit() or int(fold) >= count:
        raise Refused(f"--fold {fold}: there are folds 0 to {count - 1}, and full")
    return [int(fold)]


def _merge(name: str, cfg: Config, asked: str = "") -> dict[str, Any] | None:
    """What is complete, as members with their scores; `asked` is the member that was asked for, which is told last. Needs no
    network, so torch is not imported for it."""
    from comp.engine.bank import merge
    from comp.engine.data import folds, samples

    fingerprint.validate_images(name, cfg, read=False)
    table = samples.load()
    split = folds.load(table)
    with locks.lock(paths.run_folder(name), "merging", wait=True):
        score = merge.merge_run(name, cfg, table, split)
    if asked and not experiments.refit_seeds(name):  # a time limit ended it before
        print(f"{name}: fold {asked} to go\nnext: {fingerprint.resume_command(name)} --fold {asked}")
    elif asked or score is not None:
        merge.print_result(name, asked)
    else:
        missing = experiments.missing_folds(name, cfg, split.count) or "another seed"
        print(f"{name}: {missing} to go before it has a score\nnext: {fingerprint.resume_command(name)}")
    return score
