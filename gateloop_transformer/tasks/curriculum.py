"""Training on sequences of growing length, with a learning rate that falls once the longest are solved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gateloop_transformer.tasks.settings import TaskTraining
from gateloop_transformer.tasks.task import NONE, Batch, Task, generator
from gateloop_transformer.training.optimizer import parameter_groups

# Gives training other random numbers than tests.
_TRAIN = 0
_WARMUP = 50
# The decay of the running average of accuracy.
_MEMORY = 0.8
# Share of the steps whose lengths are drawn from the shortest on; the others are near the longest.
_SHORT = 0.2


@dataclass
class Progress:
    """Where training stands.

    step: steps done. longest: tokens of the longest sequences. accuracy: running average at about that length.
    falling: the fraction of the run that was done when the learning rate began to fall; None: not yet. seconds: time
    since the end of the first step. loss: loss of the last step.
    """

    longest: int
    step: int = 0
    accuracy: float = 0.0
    falling: float | None = None
    seconds: float = 0.0
    loss: float = float("nan")


class Curriculum:
    """Trains one model on one task.

    Lengths are drawn up to `longest`, which grows whenever the running average of accuracy there reaches `solved`. The
    learning rate is constant, except for a factor of the square root of the length, until the last length is solved or
    only `decay` of the run is left. From there it falls linearly to 0 during `decay` of the run, and training ends.

    Args:
        model: maps ids to logits.
        task: gives batches.
        settings: settings of the training.
    """

    def __init__(self, model: nn.Module, task: Task, settings: TaskTraining) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.first, self.last = settings.trained_lengths(task)
        config = settings.optimizer()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
        )
        self.progress = Progress(self.first)

    def done(self) -> float:
        """The fraction of the steps or seconds, whichever is larger, that is used up."""
        progress, settings = self.progress, self.settings
        used = progress.step / settings.steps
        return used if settings.seconds is None else max(used, progress.seconds / settings.seconds)

    def run(self, report: Callable[[Progress], object] = lambda _progress: None) -> Progress:
        """Train to the end; `report` is called after each step."""
        started = None
        self.model.train()
        while (rate := self.rate()) > 0:
            self._step(rate)
            # Time counts from the end of the first step, in which kernels are compiled.
            started = time.perf_counter() if started is None else started
            self.progress.seconds = time.perf_counter() - started
            report(self.progress)
        return self.progress

    def rate(self) -> float:
        """The learning rate of the next step; 0: training is over."""
        progress, settings = self.progress, self.settings
        done = self.done()
        if progress.falling is None and done >= 1 - settings.decay:
            progress.falling = 1 - settings.decay
        left = 1.0 if progress.falling is None else 1 - (done - progress.falling) / settings.decay
        if left <= 1e-9 or done >= 1:
            return 0.0
        warm = min(1.0, (progress.step + 1) / _WARMUP)
        return settings.lr * warm * min(1.0, math.sqrt(4 / progress.longest)) * left

    def _step(self, rate: float) -> None:
        progress, settings = self.progress, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batch = self._batch(generator(settings.seed, _TRAIN, progress.step))
        targets = torch.from_numpy(batch.targets)
        logits = self.model(torch.from_numpy(batch.inputs))
        asked = targets != NONE
        picked, wanted = logits[asked][:, : self.task.answers], targets[asked]
        loss = F.cross_entropy(picked, wanted, label_smoothing=settings.smoothing)
        progress.loss = loss.item()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is not finite at step {progress.step + 1}; a lower --lr may help")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        self._grow((picked.argmax(-1) == wanted).float().mean().item())

    def _batch(self, rng: np.random.Generator) -> Batch:
        task, settings, longest = self.task, self.settings, self.progress.longest
        length = longest
        if task.grows:
            low = task.shortest if rng.random() < _SHORT else max(task.shortest, longest // 2)
            length = int(rng.integers(low, longest + 1))
        return task.batch(rng, max(settings.least_rows, settings.tokens // length), length)

    def _grow(self, accuracy: float) -> None:
        """Grow the sequences if these are solved; at the last length, let the learning rate begin to fall."""
        progress, settings = self.progress, self.settings
        progress.accuracy = _MEMORY * progress.accuracy + (1 - _MEMORY) * accuracy
        if progress.accuracy < settings.solved:
            return
        if progress.longest < self.last:
            progress.longest = min(self.last, int(progress.longest * settings.growth) + 1)
            progress.accuracy = 0.0
        elif progress.falling is None:
            progress.falling = self.done()
