"""A causal depthwise convolution over a few steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer.ops.context_parallel import Ranks, current, nothing
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.pairs import autocast_dtype
from gateloop_transformer.ops.short_convolution import short_convolution


class ShortConv(nn.Module):
    """A depthwise causal convolution: y[t] = Σ_i weight[:, 0, i] · x[t - (taps-1) + i]; under autocast in its dtype.

    Args:
        dim: number of channels.
        taps: length of the filter, at least 1.
        silu: apply a SiLU to y, with weights that start uniform in ±1/√taps; otherwise y starts near x.
        backend: "auto", or a backend's name.
    """

    def __init__(self, dim: int, taps: int, *, silu: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.taps, self.silu, self.backend = taps, silu, backend
        if silu:
            weight = (2 * torch.rand(dim, 1, taps) - 1) / taps**0.5
        else:
            weight = torch.randn(dim, 1, taps) * 0.02
            weight[:, :, -1] += 1.0
        self.weight = nn.Parameter(weight)

    def forward(
        self, x: Tensor, past: Tensor, layout: Layout = PLAIN, *, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Convolve, and return what the next call needs.

        Args:
            x: (B, T, dim).
            past: the last taps - 1 inputs before x (B, taps - 1, dim), or before each document (N, taps - 1, dim);
                zeros at the start.
            layout: where sequences begin; no output depends on inputs of another sequence.
            backwards: x comes with the last step first, so that ranks which share a sequence go in reverse order.

        Returns:
            y (B, T, dim) and the last taps - 1 inputs (B or N, taps - 1, dim).
        """
        x = x.to(autocast_dtype(x) or x.dtype)
        past = past.to(x.dtype)
        if layout.cu_seqlens is not None:
            return self._documents(x, past, layout.resets, layout.cu_seqlens.to(x.device).long())
        if (ranks := current()) is not None and self.taps > 1:
            return self._over_ranks(ranks.along(backwards), x, past, layout.resets)
        return self._rows(x, past, layout.resets)

    def _rows(self, x: Tensor, past: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        T, kept = x.shape[1], self.taps - 1
        inputs = torch.cat([past, x], 1)
        if resets is None:
            # This is a copy, because a view would keep all inputs in memory.
            return self._filter(inputs, None), inputs[:, T:].clone()
        segment = torch.cat([resets.new_zeros(x.shape[0], kept), resets], 1).cumsum(1)
        left = inputs[:, T:].masked_fill((segment[:, T:] != segment[:, -1:]).unsqueeze(-1), 0)
        return self._filter(inputs, segment), left

    def _over_ranks(self, ranks: Ranks, x: Tensor, past: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve a part of a sequence: the ranks exchange their last inputs, and each finds those before its part."""
        (B, T, D), kept = x.shape, self.taps - 1
        ranks.compare(f"convolution of {self.taps} taps, B = {B}, dim = {D}, {x.dtype}", x.device)
        last = slice(max(T - kept, 0), T)
        # Parts after the first do not know their past yet: zeros take its place.
        _, tail = self._rows(
            x[:, last], past if ranks.first else nothing(past), None if resets is None else resets[:, last]
        )
        own = kept if ranks.first else min(T, kept)
        cut = x.new_zeros(B) if resets is None else resets.any(1).to(x.dtype)
        fresh = (torch.arange(kept, 0, -1, device=x.device) <= own).to(x.dtype)
        sent = ranks.gather_with_gradient(torch.cat([tail.flatten(), fresh, cut]))
        tails = sent[:, : tail.numel()].unflatten(1, tail.shape)
        counts, cuts = sent[:, -B - kept : sent.shape[1] - B].sum(1).long(), sent[:, sent.shape[1] - B :] > 0
        # The graph of every rank must reach what was sent, so that all ranks take part in its backward pass.
        before, left = past + nothing(tails[0]), tails[0]
        for n in range(1, ranks.size):
            before = left if n == ranks.place else before
            older = left.masked_fill(cuts[n, :, None, None], 0)
            # Keep the last inputs of both parts joined; the fresh ones of this part stand at the end of its tail.
            place = torch.arange(kept, device=x.device)
            shifted = older.index_select(1, (place + counts[n]).clamp(max=kept - 1))
            left = torch.where((place < kept - counts[n])[:, None], shifted, tails[n])
        y, _ = self._rows(x, before, resets)
        return y, left

    def _filter(self, inputs: Tensor, segment: Tensor | None) -> Tensor:
        """Convolve: outputs from the taps-th input on. With `segment` (B, L) inputs of other segments count as 0."""
        weight = self.weight.squeeze(1).to(autocast_dtype(inputs) or self.weight.dtype)
        if segment is None:
            return short_convolution(inputs, weight, self.silu, self.backend)
        T = inputs.shape[1] - self.taps + 1
        y = inputs[:, self.taps - 1 :] * weight[:, -1]
        for tap in range(self.taps - 1):
            part = inputs[:, tap : tap + T] * weight[:, tap]
            same = segment[:, tap : tap + T] == segment[:, self.taps - 1 :]
            y = y + part.masked_fill(~same.unsqueeze(-1), 0)
        return F.silu(y) if self.silu else y

    def _documents(self, x: Tensor, past: Tensor, resets: Tensor | None, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve packed documents, each with its own past put before it, all in one row."""
        kept, T = self.taps - 1, x.shape[1]
        N = bounds.shape[0] - 1
        numbers = torch.arange(N, device=x.device)
        before = (bounds[:-1] + numbers * kept)[:, None] + torch.arange(kept, device=x.device)
        steps = torch.arange(T, device=x.device)
        # repeat_interleave would write out of bounds where the bounds are invalid.
        document = torch.bucketize(steps, bounds[1:].contiguous(), right=True)
        steps = steps + (document + 1) * kept
        order = torch.cat([before.flatten(), steps]).argsort()
        inputs = torch.cat([past.reshape(1, N * kept, x.shape[-1]), x], 1)[:, order]
        ends = (bounds[1:] + (numbers + 1) * kept)[:, None] - kept + torch.arange(kept, device=x.device)
        left = inputs[0, ends]
        segment = None
        if resets is not None:
            segment = resets.new_zeros(1, inputs.shape[1]).index_copy(1, steps, resets).cumsum(1)
            last = segment[0, ends]
            left = left.masked_fill((last != last[:, -1:]).unsqueeze(-1), 0)
        y = self._filter(inputs, segment) if T or N else x
        return y[:, steps - kept], left
