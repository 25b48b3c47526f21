"""The earlier keys and values that attention sees: those in its state, and those of the ranks before this one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.layers.state import AttentionState
from gateloop_transformer.ops.context_parallel import Ranks, current


class Earlier(NamedTuple):
    """Where the T steps of one part stand among the keys of the whole sequence.

    past: number of keys before those of the part; total: number of keys of all parts together; before: (B,) steps from
    the start of the sequence to the part; None: the sequence starts here; after: (B,) steps from the start of the
    sequence to the end of the last part; None: there is only this part; ranks: the ranks that hold the other parts;
    lengths: number of keys on each rank.
    """

    past: int
    total: int
    before: Tensor | None
    after: Tensor | None = None
    ranks: Ranks | None = None
    lengths: Sequence[int] = ()

    @staticmethod
    def of(x: Tensor, state: AttentionState | None, resets: Tensor | None) -> Earlier:
        """Locate the steps of x (B, T, dim), which follow `state`."""
        past = 0 if state is None else state.keys.shape[2]
        if (ranks := current()) is not None:
            return _over_ranks(ranks, x, state, past, resets)
        return Earlier(past, past + x.shape[1], None if state is None else state.seen)

    def join(self, stored: Sequence[Tensor] | None, own: Sequence[Tensor]) -> list[Tensor]:
        """Join the tensors of a state with those of the part, and over ranks: one (B, heads, total, d) for each."""
        if self.ranks is None:
            return list(own) if stored is None else [torch.cat(pair, 2) for pair in zip(stored, own, strict=True)]
        if stored is not None:
            # Only the first rank uses the state, but the graph must reach it on every rank.
            kept = slice(None) if self.ranks.first else slice(0)
            own = [torch.cat([old[:, :, kept], new], 2) for old, new in zip(stored, own, strict=True)]
        together = torch.cat(list(own), -1)
        padded = F.pad(together, (0, 0, 0, max(self.lengths) - together.shape[2]))
        parts = self.ranks.gather_with_gradient(padded)
        whole = torch.cat([part[:, :, :length] for part, length in zip(parts, self.lengths, strict=True)], 2)
        pieces = whole.split([x.shape[-1] for x in own], -1)
        return [piece.to(x.dtype) for piece, x in zip(pieces, own, strict=True)]


def _over_ranks(ranks: Ranks, x: Tensor, state: AttentionState | None, past: int, resets: Tensor | None) -> Earlier:
    """Exchange between ranks how many keys and steps each has, and how many steps since its last reset."""
    B, T = x.shape[:2]
    ranks.compare(f"attention, B = {B}, dim = {x.shape[2]}, {x.dtype}", x.device)
    since = torch.full((B,), -1, device=x.device)
    if resets is not None and T:
        latest = torch.where(resets, torch.arange(T, device=x.device), -1).amax(1)
        since = torch.where(latest < 0, -1, T - latest)
    seen = since.new_zeros(B) if state is None else state.seen
    sizes = since.new_tensor([T + (past if ranks.first else 0), T])
    told = ranks.gather(torch.cat([sizes, since, seen]))
    lengths = told[:, 0].tolist()
    steps = [told[0, 2 + B :]]
    for row in told:
        steps.append(torch.where(row[2 : 2 + B] < 0, steps[-1] + row[1], row[2 : 2 + B]))
    edges = [past, *itertools.accumulate(lengths)]
    return Earlier(edges[ranks.place], edges[-1], steps[ranks.place], steps[-1], ranks, lengths)
