"""Where the gates of a model start for tasks of state tracking."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from gateloop_transformer.layers.gate_looped import GateLoopedAttention


@torch.no_grad()
def start_gates(model: nn.Module, min_memory: float | None, max_memory: float, phase_spread: float) -> None:
    """Give "ring" gates of all layers long memories and phases that depend on the data from the start.

    A layer's own start has phases that do not depend on the data, and memories from one step on.

    Args:
        model: whose weights are changed; layers with other gates are left as they are.
        min_memory: steps; memories 1/(1-|a|) are spread log-uniformly from it to `max_memory`. None: as they are.
        max_memory: steps.
        phase_spread: radians; the standard deviation of the phases of different tokens. 0: as they are.

    Raises:
        ValueError: the memories are not in order, or phase_spread is negative.
    """
    if min_memory is not None and not 1 < min_memory <= max_memory < math.inf:
        raise ValueError(
            f"memories must go from above 1 step upwards, not from min_memory={min_memory} to max_memory={max_memory}"
        )
    if not 0 <= phase_spread < math.inf:
        raise ValueError(f"phase_spread must be finite, 0 or more, not {phase_spread}")
    for layer in model.modules():
        if not isinstance(layer, GateLoopedAttention) or layer.gate != "ring":
            continue
        if min_memory is not None:
            exponents = torch.linspace(math.log(min_memory), math.log(max_memory), layer.heads)
            layer.ring_logit.copy_(torch.log(torch.expm1(exponents)))
        if phase_spread:
            # Inputs are normalised: their entries have a mean square of 1.
            cast(nn.Linear, layer.to_a[0]).weight[1::2].normal_(std=phase_spread / layer.dim**0.5)
