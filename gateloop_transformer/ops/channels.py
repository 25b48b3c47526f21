"""The gate loop at head size 1 as backends are given it.

B batch, T time, H heads of size 1, D channels, which are the same; N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype


class ChannelLoop(NamedTuple):
    """What the gate loop at head size 1 is given: all (B, T, D), but projections that are pairs (B, T, 2·D).

    `gate` names what becomes of the projections in `gates`; "given": they are gates. With "sigmoid" there are no keys.
    `bias` (D,) is added to the projections of "ring"; the projections' gradient is multiplied by `fraction`.
    """

    queries: Tensor
    keys: Tensor | None
    values: Tensor
    gates: Pair
    swish: Tensor | None
    bias: Pair | None
    gate: str
    fraction: float
    reverse: bool
    layout: Layout = PLAIN

    @property
    def wide(self) -> torch.dtype:
        """The precision of the arithmetic."""
        return compute_dtype(self.queries.dtype, self.gates.re.dtype)

    @property
    def parts(self) -> int:
        """1: real states, 2: complex ones."""
        return 1 if self.gate == "sigmoid" or (self.gate == "given" and self.gates.im is None) else 2


def gradient_memory(
    loop: ChannelLoop, packed: Tensor, new: Callable[[Tensor], Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor | None], list[Tensor | None]]:
    """Memory for gradients, as `new` makes it like a tensor.

    Args:
        loop: queries, keys and values of it are parts of `packed`, with "sigmoid" the gates too.
        packed: (B, T, 3·D).
        new: fresh memory in the shape and dtype of its argument.

    Returns:
        Of packed inputs, projections and SiLU gate; and, in the same memory, of queries, keys, values, both parts of
        the gates and SiLU gate, None for what the loop has not.
    """
    d_packed = new(packed)
    first, second, third = d_packed.chunk(3, -1)
    d_swish = None if loop.swish is None else new(loop.swish)
    if loop.gate == "sigmoid":
        return (d_packed, third, d_swish), [first, None, second, third, None, d_swish]
    d_gates = new(loop.gates.re)
    return (d_packed, d_gates, d_swish), [first, second, third, d_gates, None, d_swish]


def elementwise(keys: Tensor, values: Tensor) -> bool:
    """Whether heads are of size 1."""
    return keys.shape[-1] == values.shape[-1] == 1


def flat(x: Tensor) -> Tensor:
    """(B, T, H[, 1]) → (B, T, H), as a view."""
    return x.squeeze(-1) if x.ndim == 4 else x


def flat_state(state: Pair) -> Pair:
    """(B, H, 1, 1) → (B, H)."""
    return state.map(lambda x: x.reshape(x.shape[:2]))


def given(
    queries: Tensor, keys: Tensor, values: Tensor, gates: Pair, initial: Pair | None, reverse: bool, layout: Layout
) -> ChannelLoop:
    """A gate loop with heads of size 1: one precision for all, gates complex where the initial state is."""
    gates = gates.map(flat)
    if torch.float64 in (queries.dtype, gates.re.dtype):
        queries, keys, values, gates = (*(x.double() for x in (queries, keys, values)), gates.to(torch.float64))
    if initial is not None and initial.im is not None:
        gates = gates.as_complex()
    return ChannelLoop(flat(queries), flat(keys), flat(values), gates, None, None, "given", 1.0, reverse, layout)
