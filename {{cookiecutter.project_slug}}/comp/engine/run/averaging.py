"""Extra weights of a fold beside the trained ones (EMA, SWA, snapshots, tail mean, soups), and which set
makes the predictions.

Means over epochs are kept in files (epoch-0007.safetensors, snap2/…) or in the training state, so a resumed
run ends with the same bytes. Writing a file twice writes the same bytes.
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
from comp.engine.data.seeding import derive_seed
from comp.engine.run import model_selection, normalize
from comp.engine.run.model_selection import Scores
from comp.engine.store import artifacts

if TYPE_CHECKING:
    from comp.engine.run.context import Context
    from comp.engine.run.stages import Stages

State = dict[str, Any]
Scorer = Callable[[nn.Module], Scores]
UpdateBN = Callable[[nn.Module], None]
WEIGHTS = "weights.safetensors"
WARMUP = 0.1  # the average covers about this share of the steps so far, until train.ema_decay covers less


class Ema:
    """Exponential moving average of the parameters; buffers are copied, since batch norm statistics are
    moving averages already and averaging them again lags behind in a short run.

    Equal to timm's ModelEmaV3 with use_warmup and exclude_buffers. That one lists all tensors at every step
    and copies counters one by one: 2 ms of CPU time, a third of a step of a small network on a fast GPU.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(module).eval(), decay
        self.averages, self.parameters = (
            list[Tensor](self.module.parameters()),
            list[Tensor](module.parameters()),
        )
        # Buffers by dtype, one foreach call each: mixed dtypes fall back to the slow path.
        by_dtype = dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]()
        for own, trained in zip(self.module.buffers(), module.buffers(), strict=True):
            copies, sources = by_dtype.setdefault(own.dtype, ([], []))
            copies.append(own)
            sources.append(trained)
        self.buffers = list(by_dtype.values())

    def decay_at(self, step: int) -> float:
        """The decay at a step (from 1), with warm-up: a decay of 0.98 alone still holds 24 % of the random
        start after 72 steps.

        A function of the step, so resuming needs no state; 0 at the first two steps, when the average equals
        the weights.
        """
        return min(self.decay, 1 - 1 / (1 + WARMUP * max(0, step - 2)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` counts from 1."""
        torch._foreach_lerp_(self.averages, self.parameters, weight=1 - self.decay_at(step))
        for copies, sources in self.buffers:
            torch._foreach_copy_(copies, sources)


class WeightSets:
    """All weights that a fold writes: those of the run itself and those of its members (average.members,
    snapshots)."""

    def __init__(self, cfg: Config, module: nn.Module, folder: Path, snapshot_steps: Sequence[int]):
        self.cfg, self.module, self.folder = cfg, module, folder
        self.names = {run_members.final_weights(cfg), *cfg.average.members}
        self.ema = None if cfg.train.ema_decay is None else Ema(module, cfg.train.ema_decay)
        # One tensor at a time: torch's foreach version, the default on a GPU, fails on batch norm's counters.
        average = get_swa_avg_fn()
        self.swa = AveragedModel(module, avg_fn=average, use_buffers=True) if "swa" in self.names else None
        self.snapshot_steps = list(snapshot_steps)  # steps done at the end of each cycle
        self.scores: list[Scores] = []  # per epoch, with select.name=best
        self.soup = list[int]()  # files that the greedy soup averages
        self.optimism: dict[str, float | None] = {}  # of weights selected on the validation rows, per member

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated: the EMA if it makes the predictions, otherwise the trained model."""
        use_ema = self.ema is not None and run_members.final_weights(self.cfg) == "ema"
        return self.ema.module if self.ema is not None and use_ema else self.module

    # --- while training ------------------------------------------------------------------------------

    def after_step(self, step: int) -> None:
        """`step` counts from 1."""
        if self.ema is not None:
            self.ema.update(step)
        if step in self.snapshot_steps:
            models.save_weights(self.eval_model, self._snapshot_file(self.snapshot_steps.index(step)))

    def after_epoch(self, epoch: int, scorer: Scorer | None) -> dict[str, float]:
        """`epoch` counts from 1. Returns what is logged: the score that weights are selected by."""
        if self.swa is not None and epoch > self.cfg.average.swa_start * self.cfg.train.epochs:
            self.swa.update_parameters(self.module)
        if self.cfg.select.name == "best" and scorer is not None:
            self.scores.append(scorer(self.eval_model))
        if epoch in self._needed_epochs(epoch):
            models.save_weights(self.eval_model, self._epoch_file(epoch))
        return {"select_score": float(self.scores[-1][0])} if self.scores else {}

    def should_stop(self) -> bool:
        """Early stopping: no better epoch for select.patience epochs."""
        patience = self.cfg.select.patience
        if patience is None or not self.scores:
            return False
        return len(self.scores) - 1 - model_selection.best(self.scores) >= patience

    def _needed_epochs(self, epoch: int) -> set[int]:
        """Epochs (from 1) whose weights may still be used, after `epoch` of them."""
        needed = {model_selection.best(self.scores) + 1} if self.scores else set()
        if "tail" in self.names or ("greedy" in self.names and not self.snapshot_steps):
            first = self.cfg.train.epochs - self.cfg.average.tail_epochs
            needed |= set(range(first + 1, epoch + 1))
        return needed

    def delete_unneeded(self, epoch: int) -> None:
        """Delete epoch files that the training state just saved does not need."""
        needed = {self._epoch_file(each) for each in self._needed_epochs(epoch)}
        self._delete_epoch_files(keep=needed)

    def _delete_epoch_files(self, keep: set[Path]) -> None:
        for file in self.folder.glob("epoch-*.safetensors"):
            if file not in keep:
                file.unlink()
                artifacts.remove_from_manifest(file)

    def _epoch_file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.safetensors"

    def _snapshot_file(self, index: int) -> Path:
        return self.folder / f"snap{index + 1}" / WEIGHTS

    def state_dict(self) -> State:
        return {
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "swa": self.swa.state_dict() if self.swa is not None else None,
            "scores": [each.tolist() for each in self.scores],
        }

    def load_state_dict(self, state: State) -> None:
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.swa is not None:
            self.swa.load_state_dict(state["swa"])
        self.scores = [np.array(each) for each in state["scores"]]

    # --- at the end ----------------------------------------------------------------------------------

    def write(self, update_bn: UpdateBN, scorer: Scorer | None, log_offset: int) -> None:
        """Write all weights. The run's own come last: a fold is trained once folder/weights.safetensors
        exists."""
        trained = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        for name in self.cfg.average.members:
            models.save_weights(self._build(name, update_bn, scorer), self.folder / name / WEIGHTS)
            self.module.load_state_dict(trained)
        final = self._build(run_members.final_weights(self.cfg), update_bn, scorer)
        if self.scores:
            best_epoch = model_selection.best(self.scores) + 1
            final = models.load_weights(final, self._epoch_file(best_epoch))
            self._estimate_optimism(
                "", lambda column: model_selection.best(self.scores, column), self.scores.__getitem__
            )
        if self.optimism:
            artifacts.write_json(self.folder / "optimism.json", self.optimism)
            artifacts.add_to_manifest(self.folder / "optimism.json")
        models.save_weights(final, self.folder / WEIGHTS, log=log_offset)
        self._delete_epoch_files(keep=set())

    def _build(self, name: str, update_bn: UpdateBN, scorer: Scorer | None) -> nn.Module:
        if name == "raw":
            return self.module
        if name == "ema":
            assert self.ema is not None
            return self.ema.module
        if name == "swa":
            assert self.swa is not None
            update_bn(self.swa.module)
            return self.swa.module
        files = self._files_to_average(name)
        if name != "greedy":
            return self._average(files, update_bn)
        assert scorer is not None
        return self._greedy_soup(files, update_bn, scorer)

    def _files_to_average(self, name: str) -> list[Path]:
        if self.snapshot_steps and name != "tail":
            return [self._snapshot_file(index) for index in range(len(self.snapshot_steps))]
        epochs = self.cfg.train.epochs
        return [
            self._epoch_file(epoch) for epoch in range(epochs - self.cfg.average.tail_epochs + 1, epochs + 1)
        ]

    def _average(self, files: Sequence[Path], update_bn: UpdateBN) -> nn.Module:
        """In the trained module itself, whose own weights were saved before."""
        self.module.load_state_dict(average_states(_states(files)))
        if len(files) > 1:
            update_bn(self.module)
        return self.module

    def _greedy_soup(self, files: list[Path], update_bn: UpdateBN, scorer: Scorer) -> nn.Module:
        """Greedy model soup (Wortsman et al. 2022): the best file, then each other one, best first, if the
        score does not fall."""
        known: dict[frozenset[int], Scores] = {}

        def score_of(soup: frozenset[int]) -> Scores:
            if soup not in known:
                known[soup] = scorer(self._average([files[i] for i in sorted(soup)], update_bn))
            return known[soup]

        def pick(column: int) -> frozenset[int]:
            single = {i: score_of(frozenset([i]))[column] for i in range(len(files))}
            first, *others = sorted(single, key=lambda i: (-np.nan_to_num(single[i], nan=-np.inf), i))
            soup = frozenset([first])
            for i in others:
                if score_of(soup | {i})[column] >= score_of(soup)[column]:
                    soup |= {i}
            return soup

        self.soup = sorted(pick(0))
        self._estimate_optimism("greedy", pick, score_of)
        return self._average([files[i] for i in self.soup], update_bn)

    def _estimate_optimism(
        self, name: str, pick: Callable[[int], Any], score_of: Callable[[Any], Scores]
    ) -> None:
        if self.cfg.select.on == "fold":
            member = "" if run_members.final_weights(self.cfg) == name else name
            self.optimism[member] = model_selection.optimism(pick, score_of)


def average_states(states: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of weights, with one state in memory at a time; integer buffers (num_batches_tracked) come from
    the last."""
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
    """A function that recomputes batch norm statistics in one pass over training images, augmented as in the
    last epoch."""

    def update(module: nn.Module) -> None:
        cfg, loader = context.cfg, context.loader
        augment = transforms.epoch_augment(cfg, cfg.train.epochs - 1)
        recipe = transforms.epoch_recipe(cfg, augment)
        preprocess = transforms.Preprocess(normalize.build(cfg, module, context.device), recipe)
        stages.set_trainable(cfg.train.epochs - 1, module)
        torch.manual_seed(derive_seed(seed, 5))
        batches = loader.batches(plan(), augment)
        update_bn(
            module, ((preprocess(b.images.permute(0, 3, 1, 2), b.seeds), loader.extras(b)) for b in batches)
        )

    return update


def update_bn(module: nn.Module, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> None:
    """Recompute batch norm statistics: averaged weights never ran, so theirs belong to other weights.

    As torch.optim.swa_utils.update_bn, for networks with several inputs; frozen norms stay as they are.
    """
    momenta = {
        layer: layer.momentum
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    }
    if not momenta:
        return
    for layer in momenta:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean over all batches
    with torch.no_grad():
        for images, extras in batches:
            module(images, **extras)
    for layer, momentum in momenta.items():
        layer.momentum = momentum
