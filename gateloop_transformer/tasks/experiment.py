"""An experiment trains one model on one task, scores it, and reports all of it in one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.tasks.curriculum import Curriculum, Progress
from gateloop_transformer.tasks.models import build_model
from gateloop_transformer.tasks.scoring import Score, score_lengths
from gateloop_transformer.tasks.settings import TaskTraining, check_read, defaults
from gateloop_transformer.tasks.task import Task


@dataclass(frozen=True)
class Experiment:
    """An experiment: a task, a model and its training."""

    task: Task
    model: TransformerConfig
    training: TaskTraining

    @classmethod
    def of(cls, task: type[Task], given: dict[str, Any]) -> Experiment:
        """Build an experiment from settings of all three in one dictionary; missing ones are the task's defaults.

        Raises:
            ValueError: a value is out of range, or the model does not read a setting.
        """
        kind = given.get("model", "gateloop")
        check_read(kind, given)
        values = {**defaults(task, kind), **given}
        own, model, training = (
            {item.name: values[item.name] for item in dataclasses.fields(kind) if item.init and item.name in values}
            for kind in (task, TransformerConfig, TaskTraining)
        )
        return cls(task(**own), TransformerConfig(**model), TaskTraining(**training))


@dataclass
class Outcome:
    """The outcome of an experiment: the trained model, where training stopped, and scores by length."""

    experiment: Experiment
    model: nn.Module
    progress: Progress
    scores: dict[int, Score]

    def to_json(self) -> dict[str, Any]:
        """The object that `gateloop tasks --json` prints, in plain values."""
        task, config, training = self.experiment.task, self.experiment.model, self.experiment.training
        kind = training.model
        scores = {str(length): each for length, each in self.scores.items()}
        spans = accuracy_by_span(list(self.scores.values()))
        return {
            "task": task.name,
            "model": kind,
            "gate": config.gate if kind == "gateloop" else None,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seconds": round(self.progress.seconds, 2),
            "steps": self.progress.step,
            "seed": training.seed,
            "trained_lengths": [self.experiment.training.trained_lengths(task)[0], self.progress.longest],
            "accuracy_by_length": {length: each.last for length, each in scores.items()},
            "accuracy_of_all_by_length": {length: each.every for length, each in scores.items()},
            **({"accuracy_by_span": spans} if spans else {}),
            "chance": 1 / task.answers,
            "commonest_by_length": {length: each.commonest for length, each in scores.items()},
            "options": {
                "task": dataclasses.asdict(task),
                "model": dataclasses.asdict(config),
                "training": dataclasses.asdict(training),
            },
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }


def accuracy_by_span(scores: list[Score]) -> dict[str, float]:
    """The share of right answers for spans "1", "2-3", "4-7" and so on, over all lengths together."""
    sums: dict[int, tuple[int, int]] = {}
    for each in scores:
        for power, (right, count) in each.by_span.items():
            before = sums.get(power, (0, 0))
            sums[power] = before[0] + right, before[1] + count
    return {
        str(2**power) if power == 0 else f"{2**power}-{2 ** (power + 1) - 1}": right / count
        for power, (right, count) in sorted(sums.items())
    }


def run(
    experiment: Experiment,
    on_step: Callable[[Progress], object] = lambda _progress: None,
    on_length: Callable[[int], object] = lambda _length: None,
) -> Outcome:
    """Train and score.

    Args:
        experiment: what to run.
        on_step: called after each step of training.
        on_length: called after each length is scored.

    Raises:
        ValueError: the task does not have these lengths, or the model cannot be built.
        RuntimeError: the loss is not finite.
    """
    task, training = experiment.task, experiment.training
    lengths = training.tested_lengths(task)
    torch.manual_seed(training.seed)
    model = build_model(training.model, experiment.model, task.vocabulary)
    progress = Curriculum(model, task, training).run(on_step)
    scores = score_lengths(model, task, lengths, training.rows, training.seed, on_length)
    return Outcome(experiment, model, progress, scores)
