"""Gates of several heads from their projections, in one pass: contract, checks, gradient."""

from typing import NamedTuple

from torch import Tensor

from gateloop_transformer.ops import checks
from gateloop_transformer.ops.dispatch import FUSED, choose
from gateloop_transformer.ops.gates import check_gate, gates_of
from gateloop_transformer.ops.operator import Gradient, Operator
from gateloop_transformer.ops.pairs import Pair, compute_dtype

RealPair = tuple[Tensor, Tensor]


class HeadGates(NamedTuple):
    """What the operator computes from: the arguments of `head_gates`."""

    projections: Tensor
    bias: Pair | None
    gate: str
    real: bool
    fraction: float
    backend: str


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

    What the functions of `gates` give in turn, in one pass where the backend has one. Differentiable in every
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
    gates = _gates(HeadGates(projections, None if bias is None else Pair(*bias), gate, real, float(fraction), chosen))
    return gates[0], None if real else gates[1], gates[-1] if gate == "ring" else None


def _results(given: HeadGates) -> list[Tensor]:
    """Empty gates and scales."""
    z = given.projections
    shape, dtype = (*z.shape[:-1], z.shape[-1] // 2), compute_dtype(z.dtype)
    return [z.new_empty(shape, dtype=dtype) for _ in range((1 if given.real else 2) + (given.gate == "ring"))]


def _forward(given: HeadGates) -> list[Tensor]:
    if not given.projections.numel():
        return _results(given)
    return FUSED[given.backend].gates_forward(given.projections, given.gate, given.bias, given.real)


def _backward(given: HeadGates, _: list[Tensor], grad: list[Tensor]) -> tuple[Gradient, ...]:
    z, bias, gate, real, fraction, backend = given
    return FUSED[backend].gates_backward(grad, z, gate, bias, real, fraction) if z.numel() else (None, None)


def _plain(given: HeadGates) -> list[Tensor]:
    bias = None if given.bias is None else given.bias.both()
    gates = gates_of(given.projections, given.gate, bias, given.fraction, given.real)
    return [part for part in gates if part is not None]


_gates = Operator("head_gates", HeadGates, results=_results, forward=_forward, backward=_backward, plain=_plain)
