"""Resets and packed documents for functions that know neither: ordinary tensor operations, differentiable.

Documents become rows of batches, those of like length together, filled up with gates of 1 and inputs of 0: at most
twice the work of the steps alone.

B batch, T time, N documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan

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
    """Documents whose lengths have the same number of binary digits, together. At least one group, maybe empty."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    sizes: dict[int, list[int]] = {}
    for n, length in enumerate(lengths):
        sizes.setdefault(length.bit_length(), []).append(n)
    for members in sizes.values() or [[]]:
        first = torch.tensor([bounds[n] for n in members], dtype=torch.long, device=device)
        own = torch.tensor([lengths[n] for n in members], dtype=torch.long, device=device)
        place = torch.arange(max((lengths[n] for n in members), default=0), device=device)
        there = place < own[:, None]
        yield Group(
            torch.tensor(members, dtype=torch.long, device=device), torch.where(there, first[:, None] + place, 0), there
        )


def by_documents(
    function: Batched, inputs: Sequence[tuple[Tensor, float]], initial: Sequence[Tensor], bounds: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """`function` of every document.

    Args:
        function: what to compute; of rows without a step it passes the states through.
        inputs: pairs of a tensor (1, T, ...) and what fills its rows behind their end: a number with which `function`
            leaves a state as it is.
        initial: states before the documents (N, ...).
        bounds: where documents begin, and T.

    Returns:
        Results (1, T, ...) and final states (N, ...), those of empty documents 0, or their initial ones.
    """
    results, finals, steps, documents = [], [], [], []
    for group in groups(bounds, inputs[0][0].device):
        y, final = function([group.rows(*x) for x in inputs], [part[group.documents] for part in initial])
        results.append([part[group.there] for part in y])
        finals.append(final)
        steps.append(group.steps[group.there])
        documents.append(group.documents)
    order, numbers = torch.cat(steps).argsort(), torch.cat(documents).argsort()
    whole = [torch.cat(parts)[order].unsqueeze(0) for parts in zip(*results, strict=True)]
    return whole, [torch.cat(parts)[numbers] for parts in zip(*finals, strict=True)]


Recurrence = TypeVar("Recurrence", LinearScan, GateLoop)


def as_rows(record: Recurrence, run: Callable[[Recurrence], list[Tensor]], steps: int | None = None) -> list[Tensor]:
    """`run` of a recurrence over documents, which it need not know: they become rows of batches.

    Args:
        record: of documents.
        run: from rows to results.
        steps: how many of the results are of every step, the others being final states; None: all.
    """
    inputs: list[tuple[Tensor, float]] = []
    fields = record._fields[: record._fields.index("initial")]
    for field in fields:
        value = getattr(record, field)
        # Behind the end of a row nothing is added, and gates of 1 keep the state.
        fills = (1.0 if field == "gates" else 0.0), 0.0
        inputs += zip(value.parts() if isinstance(value, Pair) else [value], fills, strict=False)
    if record.layout.resets is not None:
        inputs.append((record.layout.resets, 0.0))

    def of_rows(rows: list[Tensor], start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        rest = iter(rows)
        changes: dict[str, Any] = {}
        for field in fields:
            value = getattr(record, field)
            changes[field] = value.map(lambda _: next(rest)) if isinstance(value, Pair) else next(rest)
        changes["initial"] = Pair(*start) if start else None
        found = run(record._replace(**changes, layout=Layout(next(rest, None))))
        return found[:steps], found[len(found) if steps is None else steps :]

    start = [] if record.initial is None else record.initial.parts()
    of_steps, final = by_documents(of_rows, inputs, start, record.layout.bounds(inputs[0][0].shape[1]))
    return of_steps + final


def cleared(x: Pair, resets: Tensor | None) -> Pair:
    """x (B, ...), such as gates or their gradients (B, T, ...), with 0 where `resets` (B,) or (B, T) marks a step.

    Only what is finite is cleared by a gate of 0.
    """
    if resets is None:
        return x
    return x.map(lambda part: part.masked_fill(resets.reshape(*resets.shape, *[1] * (part.ndim - resets.ndim)), 0))
