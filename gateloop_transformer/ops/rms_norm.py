"""√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension: the original's norm, in one pass."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.pairs import compute_dtype


class RmsNorm(NamedTuple):
    """What the operator computes from: x (..., D), gamma (D,) or (G, D), the dtype of the result."""

    x: Tensor
    gamma: Tensor
    dtype: torch.dtype
    backend: str


def rms_norm(x: Tensor, gamma: Tensor, backend: str = "auto", *, dtype: torch.dtype | None = None) -> Tensor:
    """√D · x / max(‖x‖₂, 1e-12) · gamma over the last dimension, in float32 or better.

    Differentiable in both arguments.

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
    given = RmsNorm(x, gamma, own, chosen)
    (y,) = _norm(given) if chosen in FUSED else _plain(given)
    return y


def _results(given: RmsNorm) -> list[Tensor]:
    """The empty result."""
    return [given.x.new_empty(given.x.shape, dtype=given.dtype)]


def _forward(given: RmsNorm) -> list[Tensor]:
    if not given.x.numel():
        return _results(given)
    return [FUSED[given.backend].norm_forward(given.x, given.gamma, given.dtype)]


def _backward(given: RmsNorm, _: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    return FUSED[given.backend].norm_backward(grad[0], given.x, given.gamma) if given.x.numel() else (None, None)


def _plain(given: RmsNorm) -> list[Tensor]:
    x, gamma, dtype, _ = given
    wide = x.to(compute_dtype(x.dtype, gamma.dtype))
    unit = F.normalize(wide, dim=-1) * x.shape[-1] ** 0.5
    return [(unit.to(x.dtype) * gamma).to(dtype)]


_norm = Operator("rms_norm", RmsNorm, results=_results, forward=_forward, backward=_backward, plain=_plain)
