"""From projections to complex gates: polar, paper, ring. Pure functions on pairs (real, imaginary).

All compute in float32 or better and return that precision. `torch.complex(*polar(re, im))` is the gate as one
complex tensor; `gate_loop` takes the pair as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.ops.pairs import compute_dtype


def _wide(first: Tensor, second: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    for value in (first, second):
        if not value.is_floating_point():
            raise ValueError(f"{gate}: projections must be real floating-point tensors, not {value.dtype}")
    if first.shape != second.shape:
        raise ValueError(
            f"{gate}: both projections must have one shape, not {tuple(first.shape)} and {tuple(second.shape)}"
        )
    dtype = compute_dtype(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def polar(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """a = σ(|z|)·e^{i·arg z} for z = real + i·imaginary: the original's gate, |a| in [0.5, 1).

    At z = 0, and where |z| is too small to be squared in its precision, a = ½ with gradient 0; no other input
    gives NaN either, up to the largest finite |z|.

    Args:
        real: Re z, any shape.
        imaginary: Im z, the same shape.

    Returns:
        The real and imaginary parts of a.

    Raises:
        ValueError: shapes differ, or a tensor is not real floating point.

    >>> polar(torch.tensor(0.0), torch.tensor(0.0))
    (tensor(0.5000), tensor(0.))
    """
    re, im = _wide(real, imaginary, "polar")
    # The scale is a constant for the gradient: z/|z| does not depend on it.
    scale = torch.maximum(re.detach().abs(), im.detach().abs())
    zero = scale < torch.finfo(re.dtype).tiny ** 0.5
    scale = torch.where(zero, 1.0, scale)
    x, y = torch.where(zero, 1.0, re / scale), torch.where(zero, 0.0, im / scale)
    ratio = torch.sqrt(x * x + y * y)
    # The phase's gradient, of size 1/|z|, is summed apart: the magnitude's would lose its digits to it.
    size = torch.hypot(torch.where(zero, 1.0, re), torch.where(zero, 0.0, im))
    magnitude = torch.sigmoid(torch.where(zero, 0.0, size))
    return magnitude * (x / ratio), magnitude * (y / ratio)


def paper(logit: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """a = σ(logit)·e^{i·phase}: the gate of the paper, |a| in (0, 1), phase in radians and unbounded.

    Args:
        logit: of the magnitude, any shape.
        phase: radians, the same shape.

    Returns:
        The real and imaginary parts of a.

    Raises:
        ValueError: shapes differ, or a tensor is not real floating point.

    Source: T. Katsch, GateLoop (2023), section 3.1.
    """
    logit, phase = _wide(logit, phase, "paper")
    magnitude = torch.sigmoid(logit)
    return magnitude * torch.cos(phase), magnitude * torch.sin(phase)


def ring(logit: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """a = σ(logit)·e^{i·phase}, meant to start near the unit circle: see `ring_input_scale`, `ring_start`.

    The function is that of `paper`; what makes the gate stable is its start (memories spread over the training
    length, phases learned per head) and the scale of the inputs.

    Args:
        logit: of the magnitude, any shape.
        phase: radians, the same shape.

    Returns:
        The real and imaginary parts of a.

    Raises:
        ValueError: shapes differ, or a tensor is not real floating point.

    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences (2023), section 3.
    """
    logit, phase = _wide(logit, phase, "ring")
    return paper(logit, phase)


def ring_input_scale(logit: Tensor) -> Tensor:
    """√(1 - |a|²) for |a| = σ(logit): with it, a state fed by white noise keeps unit variance.

    Computed from the logit, not from |a|: near |a| = 1 it keeps its digits and its gradient stays below ½.

    Args:
        logit: of the magnitude, any shape.

    Returns:
        The scale, same shape, in float32 or better.
    """
    logit = logit.to(compute_dtype(logit.dtype))
    return torch.exp(0.5 * F.logsigmoid(-logit)) * torch.sqrt(1.0 + torch.sigmoid(logit))


def ring_start(heads: int, max_memory: float, min_memory: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits and phases (heads,) to start from: memories 1/(1-|a|) spread log-uniformly over a range.

    Phases are uniform in ±π, scaled by 1-|a|: a state turns about once in its own memory at most.

    Args:
        heads: how many gates.
        max_memory: the end of the range in steps, above 1.
        min_memory: its start, from 1 to below max_memory.

    Returns:
        logits (heads,) and phases (heads,) in radians; the phases are random (torch's default generator).

    Raises:
        ValueError: the range is empty or goes below 1.
    """
    if not 1 < max_memory < math.inf:
        raise ValueError(f"max_memory must be finite and above 1 step, not {max_memory}")
    if not 1 <= min_memory < max_memory:
        raise ValueError(f"min_memory must be at least 1 step and below max_memory={max_memory}, not {min_memory}")
    shortest = math.log(min_memory)
    exponents = shortest + (math.log(max_memory) - shortest) * (torch.arange(heads) + 0.5) / heads
    memories = torch.exp(exponents)
    phases = (2 * torch.rand(heads) - 1) * torch.pi / memories
    return torch.log(torch.expm1(exponents)), phases


def scale_gradient(x: Tensor, fraction: float) -> Tensor:
    """x itself, an infinite one too, with its gradient multiplied by `fraction`."""
    if fraction == 1:
        return x
    held = x.detach()
    return torch.where(held.isfinite(), held + (x - held) * fraction, x)


# The gates of a layer by name: from both projections to (real, imaginary).
GATES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"polar": polar, "paper": paper, "ring": ring}


def check_gate(caller: str, gate: str) -> None:
    """`gate` is in the table.

    Raises:
        ValueError: it is not.
    """
    if gate not in GATES:
        raise ValueError(f"{caller}: gate must be one of {', '.join(GATES)}, not {gate!r}")


def gates_of(
    projections: Tensor,
    gate: str,
    bias: tuple[Tensor, Tensor] | None = None,
    fraction: float = 1.0,
    real: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From projections as a layer makes them to gates and the scale of what they admit.

    Args:
        projections: pairs, neighbours in memory (..., 2·H).
        gate: a name in the table.
        bias: (H,) each, added to the projections; None: nothing.
        fraction: the gradient of the projections (not that of the bias) is multiplied by this.
        real: the gate is real: the imaginary projection ("polar") or the phase counts as 0.

    Returns:
        Real part, imaginary part (None if `real`) and, for "ring", `ring_input_scale` (None for others), each (..., H)
        in float32 or better.
    """
    z = scale_gradient(projections, fraction)
    first, second = z.to(compute_dtype(z.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    if bias is not None:
        first, second = first + bias[0].to(first.dtype), second + bias[1].to(second.dtype)
    re, im = GATES[gate](first, torch.zeros_like(second) if real else second)
    return re, None if real else im, ring_input_scale(first) if gate == "ring" else None
