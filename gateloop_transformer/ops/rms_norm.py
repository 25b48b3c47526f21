"""√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension: the original's norm, in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose, direct
from gateloop_transformer.ops.pairs import compute_dtype


def rms_norm(x: Tensor, gamma: Tensor, backend: str = "auto") -> Tensor:
    """√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension, in float32 or better.

    Differentiable (once) in both arguments.

    Args:
        x: (..., D), or (..., G, D) with gamma (G, D).
        gamma: (D,), or (G, D).
        backend: "auto", or one of `available_backends(x)`.

    Returns:
        The shape of x, in the precision that x and gamma promote to.

    Raises:
        ValueError: gamma's shape is not that of x's last dimensions, or no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), with the original's limit.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2)).square().mean().item()
    1.0
    """
    if gamma.ndim not in (1, 2) or x.shape[x.ndim - gamma.ndim :] != gamma.shape or x.ndim < gamma.ndim:
        raise ValueError(
            f"rms_norm: gamma must be (D,) or (G, D), the last dimensions of x, not {tuple(gamma.shape)} "
            f"for x {tuple(x.shape)}"
        )
    checks.floating("rms_norm", ("x", "gamma"), x=x, gamma=gamma)
    checks.same_device("rms_norm", x=x, gamma=gamma)
    chosen = choose(backend, x.device, x.dtype)
    if chosen in FUSED:
        result: Tensor = (_compute if direct(x, gamma) else _forward)(x, gamma, chosen)
        return result
    wide = x.to(compute_dtype(x.dtype, gamma.dtype))
    unit = F.normalize(wide, dim=-1) * x.shape[-1] ** 0.5
    scaled: Tensor = unit.to(x.dtype) * gamma
    return scaled


def _empty(x: Tensor, gamma: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gamma.dtype))


def _compute(x: Tensor, gamma: Tensor, backend: str) -> Tensor:
    return FUSED[backend].norm_forward(x, gamma) if x.numel() else _empty(x, gamma)


_forward = torch.library.custom_op("gateloop::rms_norm", mutates_args=())(_compute)


@_forward.register_fake
def _(x: Tensor, gamma: Tensor, backend: str) -> Tensor:
    return _empty(x, gamma)


@torch.library.custom_op("gateloop::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, gamma: Tensor, backend: str) -> list[Tensor]:
    if not x.numel():
        return checks.no_gradient(x, gamma)
    return list(FUSED[backend].norm_backward(grad, x, gamma))


@_backward.register_fake
def _(grad: Tensor, x: Tensor, gamma: Tensor, backend: str) -> list[Tensor]:
    return checks.no_gradient(x, gamma)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, ctx.backend = inputs
    ctx.save_for_backward(x, gamma)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gamma = ctx.saved_tensors
    return (*_backward(grad, x, gamma, ctx.backend), None)


_forward.register_autograd(_gradient, setup_context=_setup)
