"""√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension: the original's norm, in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.operator import operator
from gateloop_transformer.ops.pairs import compute_dtype


def rms_norm(x: Tensor, gamma: Tensor, backend: str = "auto", *, dtype: torch.dtype | None = None) -> Tensor:
    """√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension, in float32 or better.

    Differentiable (once) in both arguments.

    Args:
        x: (..., D), or (..., G, D) with gamma (G, D).
        gamma: (D,), or (G, D).
        backend: "auto", or one of `available_backends(x)`.
        dtype: of the result; None: what x and gamma promote to.

    Returns:
        The shape of x.

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
    own = torch.promote_types(x.dtype, gamma.dtype) if dtype is None else dtype
    if not own.is_floating_point:
        raise ValueError(f"rms_norm: dtype must be a floating-point type, not {own}")
    chosen = choose(backend, x.device, x.dtype)
    if chosen in FUSED:
        result: Tensor = _forward(x, gamma, own, chosen)
        return result
    wide = x.to(compute_dtype(x.dtype, gamma.dtype))
    unit = F.normalize(wide, dim=-1) * x.shape[-1] ** 0.5
    scaled: Tensor = unit.to(x.dtype) * gamma
    return scaled.to(own)


@operator("rms_norm")
def _forward(x: Tensor, gamma: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return FUSED[backend].norm_forward(x, gamma, dtype) if x.numel() else x.new_empty(x.shape, dtype=dtype)


@_forward.register_fake
def _(x: Tensor, gamma: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@operator("rms_norm_backward")
def _backward(grad: Tensor, x: Tensor, gamma: Tensor, backend: str) -> list[Tensor]:
    if not x.numel():
        return checks.no_gradient(x, gamma)
    return list(FUSED[backend].norm_backward(grad, x, gamma))


@_backward.register_fake
def _(grad: Tensor, x: Tensor, gamma: Tensor, backend: str) -> list[Tensor]:
    return checks.no_gradient(x, gamma)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, _, ctx.backend = inputs
    ctx.save_for_backward(x, gamma)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gamma = ctx.saved_tensors
    return (*_backward(grad, x, gamma, ctx.backend), None, None)


_forward.register_autograd(_gradient, _setup)
