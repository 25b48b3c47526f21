"""A linear recurrence over the ranks of `context_parallel`: what each hands on, and its gradient.

Rank r turns the state S before its part into A[r] S + E[r] after it: A[r] is the product of its gates, E[r] what it
ends with from nothing. All ranks learn all A and E at once and have their S by a few products. The gradient G of the
state after a part comes back the same way: conj(A[r]) G + D[r] before it, D[r] what the outputs of the part say alone.

A part that begins anew forgets S and G whatever they are. It says so besides its A, for 0 times NaN would be NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gateloop_transformer.ops.context_parallel import Ranks, nothing, uncompiled
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.packing import cleared
from gateloop_transformer.ops.pairs import Pair, compute_dtype, split, take


class Shift(NamedTuple):
    """Places in time for the gradient of the state before all: its scan runs the other way, with the gate of one step
    beside what came in at the step before.
    """

    inputs: slice
    gates: slice
    first: int
    last: int

    def layout(self, resets: Tensor | None) -> Layout:
        """Where that scan begins anew, given the resets (B, T) of the other."""
        return PLAIN if resets is None else Layout(resets[:, self.gates])

    def forgotten(self, state: Pair, resets: Tensor | None) -> Pair:
        """`state` (B, ...), 0 where the first step forgets what precedes it."""
        return state if resets is None else cleared(state, resets[:, self.first])

    @staticmethod
    def of(reverse: bool) -> Shift:
        """That of a scan in this direction."""
        earlier, later = slice(None, -1), slice(1, None)
        return Shift(later, earlier, -1, 0) if reverse else Shift(earlier, later, 0, -1)


class Recurrence(NamedTuple):
    """One rank's part of an operator.

    run: outputs and the last state, from a first one (None: zeros).
    product: of the gates of all steps, in the shape of a state or with 1 in its place; called without gradient.
    before: the gradient of the first state, given that of the outputs, and `saved`.
    parts: 2 where the state is complex, else 1.
    resets: (B, T) booleans; None: there are none.
    """

    run: Callable[[Pair | None], tuple[Tensor, Pair]]
    product: Callable[[], Pair]
    before: Callable[..., Pair]
    saved: Sequence[Tensor]
    parts: int
    resets: Tensor | None

    def forgets(self, state: Tensor) -> Tensor:
        """Whether each row begins anew on the way: 0 or 1, in the type of a state (B, ...) and with its dimensions."""
        rows = state.new_zeros(state.shape[0]) if self.resets is None else self.resets.any(1).to(state.dtype)
        return rows.reshape(-1, *[1] * (state.ndim - 1))


@uncompiled
def over_ranks(ranks: Ranks, operator: str, part: Recurrence, initial: Pair | None) -> tuple[Tensor, Pair]:
    """Outputs of this rank's part and the state after the whole sequence.

    Args:
        ranks: in the direction of the scan.
        operator: named in errors.
        part: what is computed here.
        initial: the state before the whole sequence; None: zeros.

    Returns:
        Outputs, and the last state of the last rank, the same on every rank.
    """
    if ranks.first:
        # From what precedes it, so once is enough.
        outputs, end = part.run(initial)
        products, starts = _learn(ranks, operator, part, end, initial)
    else:
        with torch.no_grad():
            _, end = part.run(None)
        products, starts = _learn(ranks, operator, part, end, initial)
        start = Pair(*(x[ranks.place] for x in starts))
        if initial is not None:
            start = start.plus(Pair(*(nothing(x).to(start.re.dtype) for x in _parts(initial, part.parts))))
        outputs, end = part.run(start)
    tensors = [*_parts(end, part.parts), *(x[-1] for x in starts), *products, *(x.detach() for x in part.saved)]
    lengths = part.parts, part.parts, len(products), len(part.saved)
    outputs, *final = _Onward.apply(ranks, part.before, lengths, outputs, *tensors)  # type: ignore[no-untyped-call]
    return outputs, Pair(*final)


@torch.no_grad()
def _learn(
    ranks: Ranks, operator: str, part: Recurrence, end: Pair, initial: Pair | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The products of all ranks (size, ...), after which it says whether they forget, and the states before each part
    and after the last (size + 1, ...).
    """
    ends, product = _parts(end, part.parts), [*part.product().parts(), part.forgets(end.re)]
    words = f"{operator}, states {tuple(end.re.shape)} of {end.re.dtype}, {'complex' if part.parts == 2 else 'real'}"
    ranks.compare(words + ("" if initial is None else ", with an initial state"), end.re.device)
    products, ends = _exchange(ranks, [product, ends])
    return products, _carried(products, ends)


def product_over_time(gates: Pair) -> Pair:
    """The product of gates (B, T, ...) over time (B, ...), in float32 or better."""
    gates = gates.to(compute_dtype(gates.re.dtype))
    return split(gates.complex().prod(1)) if gates.im is not None else Pair(gates.re.prod(1))


def _parts(pair: Pair, count: int) -> list[Tensor]:
    return (pair.as_complex() if count == 2 else pair).parts()


def _exchange(ranks: Ranks, lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The tensors of every rank, each (size, ...), sent in one message."""
    tensors = [x for tensors in lists for x in tensors]
    dtype = tensors[-1].dtype
    message = torch.cat([x.reshape(-1).to(dtype) for x in tensors])
    pieces = ranks.gather(message).split([x.numel() for x in tensors], 1)
    whole = [piece.reshape(ranks.size, *x.shape) for piece, x in zip(pieces, tensors, strict=True)]
    return take(whole, [len(tensors) for tensors in lists])


def _passed(product: Sequence[Tensor], state: Pair, backwards: bool = False) -> Pair:
    """What a part leaves of a state, or backwards of its gradient."""
    *parts, forgets = product
    gates = Pair(*parts).conj() if backwards else Pair(*parts)
    return gates.times(state).map(lambda x: x.masked_fill(forgets > 0, 0))


def _carried(products: Sequence[Tensor], ends: Sequence[Tensor]) -> list[Tensor]:
    """States before each part and after the last (size + 1, ...); what the first ends with has `initial` in it."""
    state = Pair(*(x[0] for x in ends))
    states = [state.map(torch.zeros_like), state]
    for n in range(1, ends[0].shape[0]):
        state = _passed([x[n] for x in products], state).plus(Pair(*(x[n] for x in ends)))
        states.append(state)
    return [torch.stack(parts) for parts in zip(*(state.parts() for state in states), strict=True)]


class _Onward(torch.autograd.Function):
    """Outputs and the state after the whole sequence; backwards, what later ranks say of the state after the part."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, before: Callable[..., Pair], lengths: Sequence[int], outputs: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.before, ctx.lengths = ranks, before, lengths
        _, final, products, saved = take(tensors, lengths)
        ctx.save_for_backward(*products, *saved)
        return (outputs.detach(), *(x.clone() for x in final))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grad_final: Tensor) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        parts, _, count, kept = ctx.lengths
        products, saved = take(ctx.saved_tensors, (count, kept))
        # Before the first part there is no rank that would ask.
        own = _parts(
            Pair(*(torch.zeros_like(x) for x in grad_final)) if ranks.first else ctx.before(grad, *saved), parts
        )
        before, final = _exchange(ranks, [[x.to(grad_final[0].dtype) for x in own], list(grad_final)])
        G = Pair(*(x.sum(0) for x in final))
        for n in range(ranks.size - 1, ranks.place, -1):
            G = _passed([x[n] for x in products], G, backwards=True).plus(Pair(*(x[n] for x in before)))
        return None, None, None, grad, *_parts(G, parts), *[None] * (parts + count + kept)
