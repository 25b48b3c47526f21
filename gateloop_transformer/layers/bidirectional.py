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
    """Mark the rows in which a sequence begins right after the last step, on one of the next ranks (B, 1)."""
    mark = resets.new_zeros(resets.shape[0], 1)
    if (ranks := current()) is None:
        return mark
    steps = mark if resets.shape[1] == 0 else ~mark
    first = torch.cat([resets, mark], 1)[:, :1]
    for step, begins in ranks.gather(torch.stack([steps, first]))[ranks.place + 1 :].flip(0):
        mark = torch.where(step, begins, mark)
    return mark


class Bidirectional(nn.Module):
    """A layer that reads x[0] to x[t] and another that reads x[T-1] to x[t], merged: every step sees all steps.

    Each of the two has its own parameters. There is no state, because the output of the first step depends on all
    later ones.

    Args:
        layer: the class GateLoopedAttention or SimpleGateLoopLayer.
        dim: width of the input, and of each direction's output.
        merge: "sum" adds both outputs; "concat" concatenates them, the forward layer's first, as in nn.GRU.
        options: arguments for both layers: any that the class takes, except reverse.

    Raises:
        ValueError: layer is another class, merge has another value, options contain reverse, or the layer refuses
            one of them.

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
            raise ValueError("Bidirectional: reverse is not an option here: there is one layer for each direction")
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
            resets: (B, T) booleans, True at the first step of each sequence; neither direction sees across it. None:
                each row is one sequence.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone.
            mask: (B, T) booleans, False for padding, on whatever side: padded steps are skipped and their output is 0;
                a reset at one has no effect.

        Returns:
            y (B, T, dim), or (B, T, 2·dim) with "concat", in x's dtype (under autocast, that of a Linear's output).

        Raises:
            ValueError: x, resets, cu_seqlens or mask has the wrong shape or dtype.
        """
        check_input("Bidirectional", x, self.dim, self)
        # Padding goes first, so that the step before a reset is a real one.
        y: Tensor = over_steps("Bidirectional", x, (resets, cu_seqlens, mask), self._both, False)
        return y

    def initial_state(self, batch: int, **options: Any) -> NoReturn:
        """Refuse: a bidirectional layer has no state.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Bidirectional: has no state, because the output of the first step depends on all later steps; "
            "only its forward_layer has one"
        )

    def _both(self, x: Tensor, layout: Layout) -> Tensor:
        resets, cu_seqlens = layout
        # The backward layer starts afresh at the last step of each sequence. A reset at the first step of a document
        # moves to the last step of the document before, where that layer remembers nothing yet, and does no harm.
        ends = None if resets is None else torch.cat([resets, _mark_after(resets)], 1)[:, 1:]
        y = self.forward_layer(x, resets=resets, cu_seqlens=cu_seqlens)
        z = self.backward_layer(x, resets=ends, cu_seqlens=cu_seqlens)
        return y + z if self.merge == "sum" else torch.cat([y, z], -1)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of both layers that only make gates; a SimpleGateLoopLayer has none."""
        both = (self.forward_layer, self.backward_layer)
        return [parameter for layer in both for parameter in getattr(layer, "gate_parameters", list)()]

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"dim={self.dim}, merge={self.merge!r}"
