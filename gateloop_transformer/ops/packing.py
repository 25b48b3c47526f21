"""Resets and packed documents for functions that know neither: ordinary tensor operations, differentiable.

A reset is a gate of 0. Documents become rows of batches, those of like length together, filled up with gates of 1 and
inputs of 0: at most twice the work of the steps alone.

B batch, T time, N documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.ops.pairs import Pair

# From rows (n, L, ...) and initial states (n, ...) to results (n, L, ...) and final states (n, ...).
Batched = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


class Group(NamedTuple):
    """Documents of like length as rows of a batch: their numbers (n,), the step of each place (n, L), and whether
    there is one.
    """

    documents: Tensor
    steps: Tensor
    there: Tensor

    def rows(self, x: Tensor, fill: float) -> Tensor:
        """(1, T, ...) → (n, L, ...), `fill` where there is no step."""
        rows = x[0, self.steps]
        return rows.masked_fill(~self.there.reshape(*self.there.shape, *[1] * (rows.ndim - 2)), fill)


def groups(bounds: list[int], device: torch.device) -> Iterator[Group]:
    """Documents that are not empty, those of one length up to the next power of two together."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    sizes: dict[int, list[int]] = {}
    for n, length in enumerate(lengths):
        if length:
            sizes.setdefault((length - 1).bit_length(), []).append(n)
    for members in sizes.values():
        first = torch.tensor([bounds[n] for n in members], device=device)
        own = torch.tensor([lengths[n] for n in members], device=device)
        place = torch.arange(max(lengths[n] for n in members), device=device)
        there = place < own[:, None]
        yield Group(torch.tensor(members, device=device), torch.where(there, first[:, None] + place, 0), there)


def by_documents(
    function: Batched, inputs: Sequence[tuple[Tensor, float]], initial: Sequence[Tensor], bounds: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """`function` of every document.

    Args:
        function: what to compute; asked once at least.
        inputs: pairs of a tensor (1, T, ...) and what fills its rows behind their end: a number with which `function`
            leaves a state as it is.
        initial: states before the documents (N, ...).
        bounds: where documents begin, and T.

    Returns:
        Results (1, T, ...) and final states (N, ...), those of empty documents 0, or their initial ones.
    """
    device = inputs[0][0].device
    results, finals, steps, documents = [], [], [], []
    for group in groups(bounds, device):
        y, final = function([group.rows(*x) for x in inputs], [part[group.documents] for part in initial])
        results.append([part[group.there] for part in y])
        finals.append(final)
        steps.append(group.steps[group.there])
        documents.append(group.documents)
    starts = torch.tensor(bounds)
    empty = (starts[1:] == starts[:-1]).nonzero().flatten().to(device)
    if len(empty) or not results:
        # Rows without a step pass their states through.
        none = [x.new_zeros(len(empty), 0, *x.shape[2:]) for x, _ in inputs]
        y, final = function(none, [part[empty] for part in initial])
        results.append([part.flatten(0, 1) for part in y])
        finals.append(final)
        documents.append(empty)
    order = torch.cat(steps).argsort() if steps else empty.new_zeros(0)
    numbers = torch.cat(documents).argsort()
    whole = [torch.cat(parts)[order].unsqueeze(0) for parts in zip(*results, strict=True)]
    return whole, [torch.cat(parts)[numbers] for parts in zip(*finals, strict=True)]


def cleared(gates: Pair, resets: Tensor | None) -> Pair:
    """Gates (B, T, ...) that are 0 where a step begins anew."""
    if resets is None:
        return gates
    return gates.map(lambda x: x.masked_fill(resets.reshape(*resets.shape, *[1] * (x.ndim - 2)), 0))
