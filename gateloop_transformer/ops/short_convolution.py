"""y[t] = Σ_i weight[:, i] · inputs[t + i], each channel on its own, with a SiLU on request: in one pass."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.operator import Gradient, Operator


class ShortConvolution(NamedTuple):
    """What the operator computes from: the arguments of `short_convolution`."""

    inputs: Tensor
    weight: Tensor
    silu: bool
    backend: str


def short_convolution(inputs: Tensor, weight: Tensor, silu: bool = False, backend: str = "auto") -> Tensor:
    """y[t] = Σ_i weight[:, i] · inputs[t + i], of T = L - taps + 1 steps, each with the taps - 1 inputs before it.

    Differentiable in both arguments; sums are float32 or better where the kernels are fused.

    Args:
        inputs: (B, L, D) with L ≥ taps - 1.
        weight: (D, taps), the last tap that of the step itself.
        silu: y goes through a SiLU.
        backend: "auto", or one of `available_backends(inputs)`.

    Returns:
        (B, T, D), in the precision that inputs and weight promote to.

    Raises:
        ValueError: shapes do not fit, or no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    >>> short_convolution(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]])).flatten().tolist()
    [12.0, 23.0]
    """
    if inputs.ndim != 3 or weight.ndim != 2 or weight.shape[0] != inputs.shape[-1] or not weight.shape[1]:
        raise ValueError(
            f"short_convolution: inputs must be (B, L, D) and weight (D, taps), not {tuple(inputs.shape)} and "
            f"{tuple(weight.shape)}"
        )
    taps = weight.shape[1]
    if inputs.shape[1] < taps - 1:
        raise ValueError(f"short_convolution: {taps} taps need {taps - 1} inputs or more, not {inputs.shape[1]}")
    checks.floating("short_convolution", ("inputs", "weight"), inputs=inputs, weight=weight)
    checks.same_device("short_convolution", inputs=inputs, weight=weight)
    chosen = choose(backend, inputs.device, inputs.dtype)
    given = ShortConvolution(inputs, weight, silu, chosen)
    (y,) = _convolution(given) if chosen in FUSED else _plain(given)
    return y


def _results(given: ShortConvolution) -> list[Tensor]:
    """The empty result."""
    (B, L, D), taps = given.inputs.shape, given.weight.shape[1]
    dtype = torch.promote_types(given.inputs.dtype, given.weight.dtype)
    return [given.inputs.new_empty(B, L - taps + 1, D, dtype=dtype)]


def _forward(given: ShortConvolution) -> list[Tensor]:
    empty = _results(given)
    if not empty[0].numel():
        return empty
    return [FUSED[given.backend].conv_forward(given.inputs, given.weight, given.silu)]


def _backward(given: ShortConvolution, _: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    inputs, weight, silu, backend = given
    return FUSED[backend].conv_backward(grad[0], inputs, weight, silu) if grad[0].numel() else (None, None)


def _plain(given: ShortConvolution) -> list[Tensor]:
    inputs, weight, silu, _ = given
    steps = inputs.shape[1] - weight.shape[1] + 1
    y = inputs[:, :steps] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        y = y + inputs[:, tap : tap + steps] * weight[:, tap]
    return [F.silu(y) if silu else y]


_convolution = Operator(
    "short_convolution", ShortConvolution, results=_results, forward=_forward, backward=_backward, plain=_plain
)
