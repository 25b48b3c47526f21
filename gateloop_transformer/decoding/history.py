"""A model with its state and the way back over the last tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gateloop_transformer.decoding.decoder import Decoder, evaluating
from gateloop_transformer.layers.state import AttentionState, LayerState, TransformerState


class _Read(NamedTuple):
    """The tokens (B, T) that were read in one block, and the state before them; None: the start."""

    before: TransformerState | None
    ids: Tensor


class History:
    """A model, the state after what it has read, and the way back to any of the last `keep` positions.

    A step of a gate loop cannot be undone (its gate may be 0), so states are kept: the one before each call of `feed`,
    as far back as needed. Going back to where a call began or ended restores that state to the bit. Going back into
    the middle of a call restores the state before it, and reads the call's tokens up to there again, together with
    what is fed next.

    Memory does not grow with the length: at most `keep` + 1 states and twice `keep` tokens are kept. Past keys and
    values of attention layers, which do grow, are kept once for all states.

    Args:
        model: a `Transformer`, or what behaves like one; it reads in evaluation mode, without gradients.
        keep: how many tokens it must be possible to go back from the furthest position, at least 1.
        state: start from here instead of from nothing; there is no way back before it.

    Raises:
        ValueError: keep is not an integer of at least 1.

    Example: `history.feed(prompt)`, then `history.feed(guess)`, then `history.back(guess.shape[1])` to try another.
    """

    def __init__(self, model: Decoder, keep: int, state: TransformerState | None = None) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"History: keep must be an integer of at least 1 token, not {keep!r}")
        self.model, self.keep = model, keep
        self._state = state
        self._reads: list[_Read] = []
        # The tokens that `back` left to be read again after `_state`, shape (B, 1 or more).
        self._pending: Tensor | None = None

    @property
    def available(self) -> int:
        """How many tokens `back` can take back: at least to `keep` before the furthest position, or to the start."""
        pending = 0 if self._pending is None else self._pending.shape[1]
        return pending + sum(read.ids.shape[1] for read in self._reads)

    @property
    def state(self) -> TransformerState | None:
        """The state after all that was fed and not taken back; None before any. States are never changed in place."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)
        return self._state

    def feed(self, ids: Tensor) -> Tensor:
        """Read `ids` (B, T), T ≥ 1, in parallel; the last `keep` of them as one block.

        Returns:
            Logits after each of them (B, T, vocabulary).

        Raises:
            ValueError: ids have the wrong shape or dtype, another B than what was fed before, or are outside the
                vocabulary.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] == 0:
            given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"History: feed takes ids of shape (B, T) with T of at least 1, not {given}")
        if self._pending is not None and self._pending.shape[0] != ids.shape[0]:
            raise ValueError(f"History: {self._pending.shape[0]} rows were fed before, now {ids.shape[0]}")
        again = 0 if self._pending is None else self._pending.shape[1]
        if self._pending is not None and again + ids.shape[1] <= self.keep:
            block = torch.cat([self._pending.to(ids.dtype), ids], 1)
            logits = self._read(block)
            self._pending = None
            return logits[:, again:]
        _ = self.state
        long = ids.shape[1] - self.keep
        if long <= 0:
            return self._read(ids)
        # Checked first, so that all is read or nothing.
        self.model.check_vocabulary(ids.long())
        return torch.cat([self._read(ids[:, :long]), self._read(ids[:, long:])], 1)

    def back(self, count: int) -> None:
        """Take the last `count` tokens back, as if they had not been fed.

        Raises:
            ValueError: count is not an integer, is negative, or is above `available`.
        """
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= self.available:
            raise ValueError(f"History: can go back 0 to {self.available} tokens, not {count!r}")
        while count:
            if self._pending is None:
                self._state, self._pending = self._reads.pop()
            left = max(0, self._pending.shape[1] - count)
            count -= self._pending.shape[1] - left
            self._pending = self._pending[:, :left] if left else None

    def copy(self) -> History:
        """Copy the history, to go on separately; states are shared, for they never change."""
        other = History(self.model, self.keep, self._state)
        other._reads, other._pending = list(self._reads), self._pending
        return other

    @torch.no_grad()
    def _read(self, ids: Tensor) -> Tensor:
        before = self._state
        with evaluating(self.model):
            logits, state = self.model(ids, state=before, return_state=True)
        self._state = state
        if before is not None:
            self._reads = [_Read(_within(read.before, before, state, ids.shape[1]), read.ids) for read in self._reads]
            before = _within(before, before, state, ids.shape[1])
        self._reads.append(_Read(before, ids))
        reach = sum(read.ids.shape[1] for read in self._reads)
        while reach - self._reads[0].ids.shape[1] >= self.keep:
            reach -= self._reads.pop(0).ids.shape[1]
        return logits  # type: ignore[no-any-return]


def _within(
    earlier: TransformerState | None, last: TransformerState, new: TransformerState, steps: int
) -> TransformerState | None:
    """Make attention's past in `earlier` views of `new`'s tensors, where these begin with those of `last`."""
    if earlier is None or not any(isinstance(layer, AttentionState) for layer in new.layers):
        return earlier
    return TransformerState(
        tuple(_layer_within(*three, steps) for three in zip(earlier.layers, last.layers, new.layers, strict=True))
    )


def _layer_within(earlier: LayerState, last: LayerState, new: LayerState, steps: int) -> LayerState:
    if not isinstance(earlier, AttentionState):
        return earlier
    assert isinstance(last, AttentionState)
    assert isinstance(new, AttentionState)
    length = earlier.values.shape[2]
    if new.values.shape[2] != last.values.shape[2] + steps:
        return earlier
    shared = earlier._replace(values=new.values[:, :, :length])
    # Complex keys are decayed to the last step: each state has its own.
    return shared if new.keys_imaginary.shape[2] else shared._replace(keys=new.keys[:, :, :length])
