"""The recurrences as records: what operators are given, and backends compute.

B batch, T time, H heads, K key size, V value size, D channels; N documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import Pair, compute_dtype


class LinearScan(NamedTuple):
    """h[t] = a[t] h[t-1] + x[t]: gates a and inputs x (B, T, D), the initial h (B, D), or (N, D) of documents."""

    gates: Pair
    inputs: Pair
    initial: Pair | None = None
    reverse: bool = False
    backend: str = "auto"
    layout: Layout = PLAIN

    def parts(self) -> int:
        """1: real states, 2: complex ones."""
        return 2 if any(pair is not None and pair.im is not None for pair in self[:3]) else 1


class GateLoop(NamedTuple):
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t]).

    queries and keys (B, T, H, K), values (B, T, H, V), gates (B, T, H) or (B, T, H, K), the initial S (B, H, K, V), or
    (N, H, K, V) of documents.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    gates: Pair
    initial: Pair | None = None
    reverse: bool = False
    backend: str = "auto"
    layout: Layout = PLAIN

    def parts(self) -> int:
        """1: real states, 2: complex ones."""
        return 2 if any(pair is not None and pair.im is not None for pair in (self.gates, self.initial)) else 1

    def wide(self) -> torch.dtype:
        """The precision of the arithmetic."""
        return compute_dtype(self.queries.dtype, self.gates.re.dtype)

    def elementwise(self) -> bool:
        """Whether heads are of size 1."""
        return self.keys.shape[-1] == self.values.shape[-1] == 1

    def per_channel(self) -> bool:
        """Whether each key channel has a gate of its own."""
        return self.gates.re.ndim == 4


def last_states(states: Tensor, initial: Tensor | None, reverse: bool, layout: Layout) -> Tensor:
    """The state after the last step of every row or document (B or N, D), from those after all steps (B, T, D)."""
    B, T, D = states.shape
    if T == 0:
        return states.new_zeros(layout.states(B), D) if initial is None else initial.to(states.dtype, copy=True)
    if layout.cu_seqlens is None:
        # A copy: a view would keep all states in memory.
        return states[:, 0 if reverse else -1].clone()
    starts, ends = (part.to(states.device).long() for part in (layout.cu_seqlens[:-1], layout.cu_seqlens[1:]))
    last = states[0, starts.clamp(max=T - 1) if reverse else (ends - 1).clamp(min=0)]
    return torch.where((starts == ends)[:, None], 0 if initial is None else initial.to(states.dtype), last)
