"""Which weights a fold keeps beside those that are trained, and which of them speak: EMA, SWA, snapshots, the best epoch, soups.

Whatever is a mean over epochs is held in files (epoch-0007.safetensors, snap2/…) or in the training state, so a run that goes
on after a kill ends in the same bytes. What is written twice is written alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from comp import models, transforms
from comp.data import Batches
from comp.engine.config import run_members
from comp.engine.config.schema import Config
from comp.engine.data.seeding import fold_in
from comp.engine.run import model_selection, normalize
from comp.engine.run.model_selection import Scores
from comp.engine.store import artifacts

if TYPE_CHECKING:
    from comp.engine.run.context import Context
    from comp.engine.run.freezing import Stages

State = dict[str, Any]
Score = Callable[[nn.Module], Scores]
UpdateBN = Callable[[nn.Module], None]
WEIGHTS = "weights.safetensors"
WARMUP = 0.1  # the average reaches back over this share of the steps so far, until train.ema_decay is shorter


class Ema:
    """The moving average of the weights, with the buffers as they are: what a batch norm measures is a moving average already, and one
    of it again lags behind a short run. Equal to timm's ModelEmaV3 with use_warmup and exclude_buffers, which lists all tensors anew
    at every step and copies counters one by one: 2 ms of CPU time, a third of a step where the GPU is fast and the network small."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(module).eval(), decay
        self.moving, self.moved = list[Tensor](self.module.parameters()), list[Tensor](module.parameters())
        kinds = dict[
            torch.dtype, tuple[list[Tensor], list[Tensor]]
        ]()  # one call each: mixed types take the slow way
        for mine, other in zip(self.module.buffers(), module.buffers(), strict=True):
            ours, theirs = kinds.setdefault(mine.dtype, ([], []))
            ours.append(mine)
            theirs.append(other)
        self.buffers = list(kinds.values())

    def decay_at(self, step: int) -> float:
        """`step` counts from 1. Warm-up: a decay of 0.98 alone still holds 24 % of the random start after 72 steps. A function of the
        step, so that a resumed run needs no state for it; 0 at the first two steps, when the average is what the weights are."""
        return min(self.decay, 1 - 1 / (1 + WARMUP * max(0, step - 2)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` counts from 1."""
        torch._foreach_lerp_(self.moving, self.moved, weight=1 - self.decay_at(step))
        for ours, theirs in self.buffers:
            torch._foreach_copy_(ours, theirs)


class WeightSets:
    def __init__(self, cfg: Config, module: nn.Module, folder: Path, ends: Sequence[int]):
        self.cfg, self.module, self.folder = cfg, module, folder
        self.wanted = {run_members.final_weights(cfg), *cfg.average.members}
        self.ema = None if cfg.train.ema_decay is None else Ema(module, cfg.train.ema_decay)
        # One tensor after the other: all at once, as torch does by itself on a GPU, it refuses the whole numbers of a batch norm.
        one_by_one = get_swa_avg_fn()
        self.swa = (
            AveragedModel(module, avg_fn=one_by_one, use_buffers=True) if "swa" in self.wanted else None
        )
        self.ends = list(ends)  # how many steps are over at the end of each cycle
        self.scores: list[Scores] = []  # of each epoch, where one is chosen
        self.soup = list[int]()
        self.flattered: dict[str, float | None] = {}  # by how much a choice on the scored rows is too good

    @property
    def current(self) -> nn.Module:
        """What would speak if training ended now."""
        return (
            self.ema.module
            if self.ema is not None and run_members.final_weights(self.cfg) == "ema"
            else self.module
        )

    # --- while training --------------------------------------------------------------------------------------------------

    def after_step(self, step: int) -> None:
        """`step` counts from 1."""
        if self.ema is not None:
            self.ema.update(step)
        if step in self.ends:
            models.save_weights(self.current, self._snapshot(self.ends.index(step)))

    def after_epoch(self, epoch: int, judge: Score | None) -> dict[str, float]:
        """`epoch` counts from 1. What there is to log: the score that chooses."""
        if self.swa is not None and epoch > self.cfg.average.swa_start * self.cfg.train.epochs:
            self.swa.update_parameters(self.module)
        if self.cfg.select.name == "best" and judge is not None:
            self.scores.append(judge(self.current))
        if epoch in self._needed(epoch):
            models.save_weights(self.current, self._epoch(epoch))
        return {"select_score": float(self.scores[-1][0])} if self.scores else {}

    def enough(self) -> bool:
        """Early stopping: no better epoch for `patience` of them."""
        patience = self.cfg.select.patience
        return (
            patience is not None
            and bool(self.scores)
            and len(self.scores) - 1 - model_selection.best(self.scores) >= patience
        )

    def _needed(self, epoch: int) -> set[int]:
        """Epochs whose weights may still be asked for, once `epoch` of them are over."""
        needed = {model_selection.best(self.scores) + 1} if self.scores else set()
        if "tail" in self.wanted or ("greedy" in self.wanted and not self.ends):
            first = self.cfg.train.epochs - self.cfg.average.tail_epochs
            needed |= set(range(first + 1, epoch + 1))
        return needed

    def drop(self, epoch: int) -> None:
        """What the state that was just saved asks for no more."""
        for file in self.folder.glob("epoch-*.safetensors"):
            if file not in map(self._epoch, self._needed(epoch)):
                file.unlink()
                artifacts.remove_from_manifest(file)

    def _epoch(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.safetensors"

    def _snapshot(self, number: int) -> Path:
        return self.folder / f"snap{number + 1}" / WEIGHTS

    def state(self) -> State:
        return {
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "swa": self.swa.state_dict() if self.swa is not None else None,
            "scores": [each.tolist() for each in self.scores],
        }

    def load(self, state: State) -> None:
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.swa is not None:
            self.swa.load_state_dict(state["swa"])
        self.scores = [np.array(each) for each in state["scores"]]

    # --- at the end ------------------------------------------------------------------------------------------------------

    def seal(
        self,
        renew: UpdateBN,
        judge: Score | None,
        log: int,
    ) -> None:
        """Write all weights; those that speak last, since their being there means done. `renew` measures batch norms anew."""
        raw = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        for name in self.cfg.average.members:
            models.save_weights(self._made(name, renew, judge), self.folder / name / WEIGHTS)
            self.module.load_state_dict(raw)
        spoken = self._made(run_members.final_weights(self.cfg), renew, judge)
        if self.scores:
            at = model_selection.best(self.scores)
            spoken = models.load_weights(spoken, self._epoch(at + 1))
            self._flattered(
                "", lambda column: model_selection.best(self.scores, column), self.scores.__getitem__
            )
        if self.flattered:
            artifacts.write_json(self.folder / "optimism.json", self.flattered)
            artifacts.add_to_manifest(self.folder / "optimism.json")
        models.save_weights(spoken, self.folder / WEIGHTS, log=log)
        self.clear()

    def clear(self) -> None:
        for file in self.folder.glob("epoch-*.safetensors"):
            file.unlink()
            artifacts.remove_from_manifest(file)

    def _made(self, name: str, renew: UpdateBN, judge: Score | None) -> nn.Module:
        if name == "raw":
            return self.module
        if name == "ema":
            assert self.ema is not None
            return self.ema.module
        if name == "swa":
            assert self.swa is not None
            renew(self.swa.module)
            return self.swa.module
        files = self._ingredients(name)
        if name != "greedy":
            return self._mean(files, renew)
        assert judge is not None
        return self._greedy(files, renew, judge)

    def _ingredients(self, name: str) -> list[Path]:
        if self.ends and name != "tail":
            return [self._snapshot(number) for number in range(len(self.ends))]
        epochs = self.cfg.train.epochs
        return [self._epoch(epoch) for epoch in range(epochs - self.cfg.average.tail_epochs + 1, epochs + 1)]

    def _mean(self, files: Sequence[Path], renew: UpdateBN) -> nn.Module:
        """Into the trained module, whose own weights are saved by now."""
        self.module.load_state_dict(average_states(_states(files)))
        if len(files) > 1:
            renew(self.module)
        return self.module

    def _greedy(self, files: list[Path], renew: UpdateBN, judge: Score) -> nn.Module:
        """The best alone, then each of the others, best first, where the mean does not lose by it."""
        known: dict[frozenset[int], Scores] = {}

        def score_of(soup: frozenset[int]) -> Scores:
            if soup not in known:
                known[soup] = judge(self._mean([files[i] for i in sorted(soup)], renew))
            return known[soup]

        def pick(column: int) -> frozenset[int]:
            alone = {i: score_of(frozenset([i]))[column] for i in range(len(files))}
            first, *others = sorted(alone, key=lambda i: (-np.nan_to_num(alone[i], nan=-np.inf), i))
            soup = frozenset([first])
            for i in others:
                if score_of(soup | {i})[column] >= score_of(soup)[column]:
                    soup |= {i}
            return soup

        chosen = pick(0)
        self.soup = sorted(chosen)
        self._flattered("greedy", pick, score_of)
        return self._mean([files[i] for i in self.soup], renew)

    def _flattered(self, name: str, pick: Callable[[int], Any], score_of: Callable[[Any], Scores]) -> None:
        if self.cfg.select.on == "fold":
            self.flattered["" if run_members.final_weights(self.cfg) == name else name] = (
                model_selection.optimism(pick, score_of)
            )


def average_states(states: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of weights, one at a time in memory; what counts (batches seen by a norm) is taken from the last."""
    total: dict[str, Tensor] = {}
    count = 0
    for state in states:
        count += 1
        for name, tensor in state.items():
            if tensor.is_floating_point():
                total[name] = total[name] + tensor.double() if name in total else tensor.double()
            else:
                total[name] = tensor
    return {name: (t / count).float() if t.dtype == torch.float64 else t for name, t in total.items()}


def _states(files: Sequence[Path]) -> Iterator[dict[str, Tensor]]:
    from safetensors.torch import load_file

    return (load_file(artifacts.verified(file)) for file in files)


def bn_updater(context: Context, stages: Stages, seed: int, plan: Callable[[], Batches]) -> UpdateBN:
    """One pass over training pictures as the last epoch saw them, under draws that never taught."""

    def renew(module: nn.Module) -> None:
        cfg, loader = context.cfg, context.loader
        today = transforms.epoch_augment(cfg, cfg.train.epochs - 1)
        seen = transforms.Preprocess(
            normalize.build(cfg, module, context.device), transforms.epoch_recipe(cfg, today)
        )
        stages.enter(cfg.train.epochs - 1, module)
        torch.manual_seed(fold_in(seed, 5))
        batches = loader.batches(plan(), today)
        update_bn(module, ((seen(b.images.permute(0, 3, 1, 2), b.seeds), loader.extras(b)) for b in batches))

    return renew


def update_bn(module: nn.Module, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> None:
    """Batch norms measure their inputs anew: the mean weights were never run, so theirs are those of other networks.

    As torch.optim.swa_utils.update_bn, for networks with more inputs than one; norms that are frozen stay as they are.
    """
    norms = {
        each: each.momentum
        for each in module.modules()
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training
    }
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    with torch.no_grad():
        for images, extras in batches:
            module(images, **extras)
    for norm, momentum in norms.items():
        norm.momentum = momentum
