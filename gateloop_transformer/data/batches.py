"""Batches as functions of the step, so that a run can be resumed from the step number alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gateloop_transformer.data.shards import Tokens

Numbers = npt.NDArray[np.int64]

_ALL = slice(None)
_ROUNDS = 6
# Give shuffles and streams different random numbers from the same seed.
_SHUFFLE, _STREAM = 1, 0


class Batch(NamedTuple):
    """Windows of tokens.

    ids: (rows, context + 1), int64. resets: (rows, context + 1), booleans, True where a document begins: the state is
    cleared before that token, and the token before does not predict it; None: no document begins.
    """

    ids: Tensor
    resets: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device."""
        return Batch(self.ids.to(device), None if self.resets is None else self.resets.to(device))


def batch_at(tokens: Tokens, step: int, *, windows: int, context: int, seed: int, rows: slice = _ALL) -> Batch:
    """The shuffled windows of a step, each from an empty state; every window comes once in an epoch.

    Window number (step - 1) * windows + row of a run is number (that modulo n) of an epoch of
    n = (len(tokens) - 1) // context windows. Each epoch has its own order, and its own shift of all windows, so
    that their borders vary. The order depends only on the arguments and is not kept in memory.

    Args:
        tokens: at least context + 1 tokens.
        step: number of the step, from 1 on.
        windows: number of windows in a step.
        context: tokens that a window predicts.
        seed: seed of the order.
        rows: which of the step's windows are wanted.
    """
    count = (len(tokens) - 1) // context
    first, last, stride = rows.indices(windows)
    epoch, place = divmod((step - 1) * windows + first, count)
    ahead = place + np.arange(0, last - first, stride)
    starts = np.empty_like(ahead)
    for n in np.unique(ahead // count):
        own = ahead // count == n
        starts[own] = _shuffled(ahead[own] % count, epoch + int(n), count, context, seed, len(tokens))
    return windows_at(tokens, starts, context)


def stream_at(tokens: Tokens, step: int, *, windows: int, context: int, seed: int, rows: slice = _ALL) -> Batch:
    """Windows that continue those of the step before, with one token's overlap; arguments are those of `batch_at`.

    Every row is a stream of its own. The streams begin evenly spread over the data; after the data's end a stream
    returns to the start, with a reset there.
    """
    count = (len(tokens) - 1) // context
    shift = int(np.random.default_rng([seed, _STREAM]).integers(0, len(tokens) - count * context))
    numbers = (np.arange(*rows.indices(windows)) * count // windows + step - 1) % count
    return windows_at(tokens, shift + numbers * context, context, numbers == 0)


def windows_at(tokens: Tokens, starts: Numbers, context: int, begin: npt.NDArray[np.bool_] | None = None) -> Batch:
    """Windows that begin at `starts` (rows,).

    Args:
        tokens: all tokens.
        starts: positions in them.
        context: tokens that a window predicts.
        begin: (rows,) booleans, True for windows at the data's start, while others continue from a state; None: each
            begins with an empty state, so that no reset is needed before its first token.
    """
    ids = np.empty((len(starts), context + 1), dtype=np.int64)
    resets = np.zeros(ids.shape, dtype=bool)
    for row, start in enumerate(starts.tolist()):
        ids[row] = tokens.read(start, start + context + 1)
        resets[row, tokens.starts(start, start + context + 1) - start] = True
    resets[:, 0] = False if begin is None else resets[:, 0] | begin
    return Batch(torch.from_numpy(ids), torch.from_numpy(resets) if resets.any() else None)


def _shuffled(numbers: Numbers, epoch: int, count: int, context: int, seed: int, length: int) -> Numbers:
    """The positions where the windows with these numbers begin in an epoch."""
    keys = np.random.SeedSequence([seed, epoch, _SHUFFLE]).generate_state(_ROUNDS + 1, np.uint64).astype(np.uint64)
    shift = int(keys[-1]) % (length - count * context)
    return shift + permute(numbers, count, keys[:-1]) * context


def permute(numbers: Numbers, count: int, keys: npt.NDArray[np.uint64]) -> Numbers:
    """Permute numbers in [0, count) as the keys decide, in constant memory.

    This is a Feistel network on pairs of numbers below the root of `count`, rounded up. A result outside the range
    goes through again until it is inside, which keeps the map a bijection (cycle walking).

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).

    >>> import numpy as np
    >>> sorted(permute(np.arange(10), 10, np.array([3, 5], np.uint64)).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    side = np.uint64(math.isqrt(count - 1) + 1)
    values = numbers.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], side, keys)
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], side: np.uint64, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Permute numbers below side²."""
    left, right = values // side, values % side
    for key in keys:
        left, right = right, (left + _mix(right ^ key) % side) % side
    return left * side + right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix bits, so that every bit of the result depends on every bit of x (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
