"""What changes the weights: AdamW's groups, and the average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.runs.config import TrainingConfig


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW groups: matrices (decayed), the rest (not), gate parameters (lower learning rate, not decayed)."""
    gate_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, GateLoopedAttention | CausalFullAttention)
        for parameter in module.gate_parameters()
    }
    matrix_ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices, others, gates = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gate_ids:
            gates.append(parameter)
        elif id(parameter) in matrix_ids:
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = (
        {"params": matrices, "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": others, "weight_decay": 0.0, "factor": 1.0},
        {"params": gates, "weight_decay": 0.0, "factor": config.gate_lr},
    )
    return [group for group in groups if group["params"]]


class Average:
    """An exponential moving average of a model's parameters.

    Without bias at the start: after n steps it is the mean of the weights after each, weighted with decay^(n - step).

    Args:
        model: whose parameters are averaged.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step`, the first being 1."""
        share = (1 - self.decay) / (1 - self.decay**step)
        new: list[Tensor] = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), new, share)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the average for its weights meanwhile."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)
