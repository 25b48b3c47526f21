"""y[t] = Σ_i weight[:, i] · inputs[t + i], each channel on its own, with a SiLU on request: in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.operator import operator


def short_convolution(inputs: Tensor, weight: Tensor, silu: bool = False, backend: str = "auto") -> Tensor:
    """y[t] = Σ_i weight[:, i] · inputs[t + i], of T = L - taps + 1 steps, each with the taps - 1 inputs before it.

    Differentiable (once) in both arguments; sums are float32 or better where the kernels are fused.

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
    if chosen in FUSED:
        result: Tensor = _forward(inputs, weight, silu, chosen)
        return result
    steps = inputs.shape[1] - weight.shape[1] + 1
    y = inputs[:, :steps] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        y = y + inputs[:, tap : tap + steps] * weight[:, tap]
    return F.silu(y) if silu else y


def _empty(inputs: Tensor, weight: Tensor) -> Tensor:
    B, L, D = inputs.shape
    return inputs.new_empty(B, L - weight.shape[1] + 1, D, dtype=torch.promote_types(inputs.dtype, weight.dtype))


@operator("short_convolution")
def _forward(inputs: Tensor, weight: Tensor, silu: bool, backend: str) -> Tensor:
    empty = _empty(inputs, weight)
    return FUSED[backend].conv_forward(inputs, weight, silu) if empty.numel() else empty


@_forward.register_fake
def _(inputs: Tensor, weight: Tensor, silu: bool, backend: str) -> Tensor:
    return _empty(inputs, weight)


@operator("short_convolution_backward")
def _backward(grad: Tensor, inputs: Tensor, weight: Tensor, silu: bool, backend: str) -> list[Tensor]:
    if not grad.numel():
        return checks.no_gradient(inputs, weight)
    return list(FUSED[backend].conv_backward(grad, inputs, weight, silu))


@_backward.register_fake
def _(grad: Tensor, inputs: Tensor, weight: Tensor, silu: bool, backend: str) -> list[Tensor]:
    return checks.no_gradient(inputs, weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    return (*_backward(grad, x, weight, ctx.silu, ctx.backend), None, None)


_forward.register_autograd(_gradient, _setup)
