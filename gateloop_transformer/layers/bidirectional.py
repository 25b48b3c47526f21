"""Bidirectional: a layer and another of its kind that runs backwards, for encoders."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gateloop_transformer.layers.gate_looped import GateLoopedAttention, check_input
from gateloop_transformer.layers.padding import over_steps
from gateloop_transformer.layers.simple_gate_loop import SimpleGateLoopLayer
from gateloop_transformer.ops.context_parallel import current
from gateloop_transformer.ops.layout import Layout

KINDS = (GateLoopedAttention, SimpleGateLoopLayer)
MERGES = ("sum", "concat")


def _mark_after(resets: Tensor) -> Tensor:
    """Whether the step after the last one begins a sequence (B, 1): over ranks that is the first of a later part."""
    mark = resets.new_zeros(resets.shape[0], 1)
    if (ranks := current()) is None:
        return mark
    steps = mark if resets.shape[1] == 0 else ~mark
    first = torch.cat([resets, mark], 1)[:, :1]
    for step, begins in ranks.gather(torch.stack([steps, first]))[ranks.place + 1 :].flip(0):
        mark = torch.where(step, begins, mark)
    return mark


class Bidirectional(nn.Module):
    """y[t] of a layer that has read x[0] to x[t], and of another that has read x[T-1] to x[t]: every step sees all.

    The two have parameters of their own. There is no state: what comes later decides the output of the first step.

    Args:
        layer: GateLoopedAttention or SimpleGateLoopLayer, the class.
        dim: width of the input, and of each direction's output.
        merge: "sum" of both outputs, or "concat": beside each other, the forward layer's first, as in nn.GRU.
        options: of both layers, all that the class takes but reverse.

    Raises:
        ValueError: another layer, another merge, reverse among the options, or what the layer refuses.

    Source: M. Schuster and K. K. Paliwal, Bidirectional Recurrent Neural Networks (1997), section II.
    """

    def __init__(
        self,
        layer: type[GateLoopedAttention] | type[SimpleGateLoopLayer],
        dim: int,
        *,
        merge: str = "sum",
        **options: Any,
    ) -> None:
        super().__init__()
        if not (isinstance(layer, type) and issubclass(layer, KINDS)):
            names = " or ".join(kind.__name__ for kind in KINDS)
            what = layer.__name__ if isinstance(layer, type) else f"an object of {type(layer).__name__}"
            raise ValueError(f"Bidirectional: layer must be the class {names}, which can run backwards, not {what}")
        if merge not in MERGES:
            raise ValueError(f"Bidirectional: merge must be 'sum' or 'concat', not {merge!r}")
        if "reverse" in options:
            raise ValueError("Bidirectional: reverse is no option; there is one layer of each direction")
        self.dim, self.merge = dim, merge
        self.forward_layer = layer(dim, **options)
        self.backward_layer = layer(dim, reverse=True, **options)

    def forward(
        self,
        x: Tensor,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mix over time, in both directions.

        Args:
            x: (B, T, dim), B and T may be 0.
            resets: (B, T) booleans: such a step is the first of a sequence; neither direction sees across; None: one
                sequence per row.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone.
            mask: (B, T) booleans, False for padding, on whatever side: such steps are not there and give 0; a reset at
                one counts for nothing.

        Returns:
            y (B, T, dim), or (B, T, 2·dim) with "concat", in x's dtype (under autocast: what a Linear gives).

        Raises:
            ValueError: x, resets, cu_seqlens or mask has another shape or kind.
        """
        check_input("Bidirectional", x, self.dim, self)
        # Without padding the step before a reset is the one that is there.
        y: Tensor = over_steps("Bidirectional", x, (resets, cu_seqlens, mask), self._both, False)
        return y

    def initial_state(self, batch: int, **options: Any) -> NoReturn:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Bidirectional: has no state, as what comes later decides the output of the first step; its forward_layer "
            "alone has one"
        )

    def _both(self, x: Tensor, layout: Layout) -> Tensor:
        resets, cu_seqlens = layout
        # The last step of a sequence is where the backward layer begins anew. A mark that falls into the document
        # before stands at its end, where nothing is remembered yet.
        ends = None if resets is None else torch.cat([resets, _mark_after(resets)], 1)[:, 1:]
        y = self.forward_layer(x, resets=resets, cu_seqlens=cu_seqlens)
        z = self.backward_layer(x, resets=ends, cu_seqlens=cu_seqlens)
        return y + z if self.merge == "sum" else torch.cat([y, z], -1)

    def gate_parameters(self) -> list[nn.Parameter]:
        """What decides the gates of both layers, where that is apart from the rest; none of SimpleGateLoopLayer."""
        both = (self.forward_layer, self.backward_layer)
        return [parameter for layer in both for parameter in getattr(layer, "gate_parameters", list)()]

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"dim={self.dim}, merge={self.merge!r}"
