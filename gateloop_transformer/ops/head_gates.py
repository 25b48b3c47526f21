"""Gates of several heads from their projections, in one pass: contract, checks, gradient."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.gates import check_gate, gates_of
from gateloop_transformer.ops.operator import operator
from gateloop_transformer.ops.pairs import Pair, compute_dtype, take

RealPair = tuple[Tensor, Tensor]


def head_gates(
    projections: Tensor,
    *,
    gate: str = "polar",
    bias: RealPair | None = None,
    fraction: float = 1.0,
    real: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gates for `gate_loop` from projections, and the scale of the keys that goes with them, in float32 or better.

    What the functions of `gates` give in turn, in one pass where the backend has one. Differentiable (once) in every
    tensor argument.

    Args:
        projections: pairs, neighbours in memory (..., 2·H): of `polar` (real, imaginary), of `paper` and `ring`
            (logit, phase).
        gate: "polar", "paper" or "ring".
        bias: (H,) each, added to the projections; for "ring" only, which needs it.
        fraction: the gradient of the projections (not that of the bias) is multiplied by this.
        real: gates are real: the imaginary projection or the phase counts as 0.
        backend: "auto", or one of `available_backends(projections)`.

    Returns:
        Real part, imaginary part (None if `real`) and, for "ring", `ring_input_scale` (None for others), each (..., H).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no gate or backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.

    >>> head_gates(torch.zeros(2))
    (tensor([0.5000]), tensor([0.]), None)
    """
    check_gate("head_gates", gate)
    if projections.ndim < 1 or projections.shape[-1] % 2:
        raise ValueError(f"head_gates: projections must have shape (..., 2·H), not {tuple(projections.shape)}")
    if (bias is not None) != (gate == "ring"):
        raise ValueError("head_gates: 'ring' needs a bias (logits, phases), other gates take none")
    named = {"projections": projections}
    for n, part in enumerate(bias or ()):
        checks.same_shape("head_gates", "bias", part, (projections.shape[-1] // 2,), "(H,)")
        named[f"bias[{n}]"] = part
    checks.floating("head_gates", tuple(named), **named)
    checks.same_device("head_gates", **named)
    chosen = choose(backend, projections.device, projections.dtype)
    if chosen not in FUSED:
        return gates_of(projections, gate, bias, fraction, real)
    results = _forward(projections, list(bias or ()), gate, real, float(fraction), chosen)
    return results[0], None if real else results[1], results[-1] if gate == "ring" else None


def _empty(projections: Tensor, gate: str, real: bool) -> list[Tensor]:
    shape = *projections.shape[:-1], projections.shape[-1] // 2
    dtype = compute_dtype(projections.dtype)
    return [projections.new_empty(shape, dtype=dtype) for _ in range((1 if real else 2) + (gate == "ring"))]


@operator("head_gates")
def _forward(
    projections: Tensor, bias: Sequence[Tensor], gate: str, real: bool, fraction: float, backend: str
) -> list[Tensor]:
    if not projections.numel():
        return _empty(projections, gate, real)
    return FUSED[backend].gates_forward(projections, gate, Pair(*bias) if bias else None, real)


@_forward.register_fake
def _(
    projections: Tensor, bias: Sequence[Tensor], gate: str, real: bool, fraction: float, backend: str
) -> list[Tensor]:
    return _empty(projections, gate, real)


@operator("head_gates_backward")
def _backward(
    grad: Sequence[Tensor],
    projections: Tensor,
    bias: Sequence[Tensor],
    gate: str,
    real: bool,
    fraction: float,
    backend: str,
) -> list[Tensor]:
    if not projections.numel():
        return checks.no_gradient(projections, *bias)
    start = Pair(*bias) if bias else None
    dz, d_bias = FUSED[backend].gates_backward(list(grad), projections, gate, start, real, fraction)
    return [dz, *([] if d_bias is None else checks.fit(d_bias, list(bias)))]


@_backward.register_fake
def _(
    grad: Sequence[Tensor],
    projections: Tensor,
    bias: Sequence[Tensor],
    gate: str,
    real: bool,
    fraction: float,
    backend: str,
) -> list[Tensor]:
    return checks.no_gradient(projections, *bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    projections, bias, *ctx.rest = inputs
    ctx.save_for_backward(projections, *bias)


def _gradient(ctx: Any, grad: list[Tensor]) -> tuple[Any, ...]:
    projections, *bias = ctx.saved_tensors
    gradients = _backward(grad, projections, bias, *ctx.rest)
    (d_projections,), d_bias = take(gradients, (1, len(bias)))
    return d_projections, d_bias, None, None, None, None


_forward.register_autograd(_gradient, _setup)
