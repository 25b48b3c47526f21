"""Bits per byte, of tokens of any kind: nats of all predicted tokens over the bytes that these stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.data.batches import windows_at
from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import ByteTokenizer, Tokenizer
from gateloop_transformer.generation import evaluating
from gateloop_transformer.model import Transformer
from gateloop_transformer.ops.pairs import compute_dtype

# What `cross_entropy` passes over.
_NONE = -100


class Score(NamedTuple):
    """What predicting a text cost. nats: the sum of the losses; size: bytes that the predicted tokens stand for."""

    nats: float
    size: int

    @property
    def bits_per_byte(self) -> float:
        """The mean, in bits.

        Raises:
            ValueError: nothing was predicted.
            RuntimeError: the loss is not finite.
        """
        if not self.size:
            raise ValueError("no byte was predicted: there is too little text")
        if not math.isfinite(self.nats):
            raise RuntimeError("the model's loss is not finite; its weights may be damaged")
        return self.nats / self.size / math.log(2)


class Share(NamedTuple):
    """One process's share of a validation. rank, size: of the processes; add: sums lists of numbers over them."""

    rank: int = 0
    size: int = 1
    add: Callable[[list[float]], list[float]] = list


def _score(logits: Tensor, labels: Tensor, tokenizer: Tokenizer) -> Score:
    """Of logits (B, T, vocabulary) against labels (B, T), -100 where none counts."""
    precise = logits.to(compute_dtype(logits.dtype)).flatten(0, 1)
    nats = F.cross_entropy(precise, labels.flatten(), reduction="sum", ignore_index=_NONE).item()
    return Score(nats, int(tokenizer.lengths[labels[labels != _NONE].cpu().numpy()].sum()))


@torch.no_grad()
def validate(
    model: Transformer,
    tokens: Tokens,
    context: int,
    limit: int,
    batch: int,
    tokenizer: Tokenizer | None = None,
    share: Share | None = None,
) -> float:
    """Bits per byte over windows of `context` tokens, each from an empty state, spread evenly over `tokens`.

    A document is read from an empty state too, and its first token is not predicted.

    Args:
        model: is put in evaluation mode meanwhile.
        tokens: validation data, at least 2.
        context: tokens predicted per window; fewer if there are fewer.
        limit: about how many tokens are predicted in all.
        batch: windows at a time.
        tokenizer: of the tokens; None: they are bytes.
        share: this process's of the batches; None: all. Each process calls the model equally often.

    Raises:
        ValueError: no token in the windows stands for a byte.
    """
    device = next(model.parameters()).device
    context = min(context, len(tokens) - 1)
    count = max(1, min(limit // context, (len(tokens) - 1) // context))
    starts = np.linspace(0, len(tokens) - 1 - context, count).astype(np.int64)
    rank, size, add = share or Share()
    total = Score(0.0, 0)
    with evaluating(model):
        for first in range(rank * batch, -(-count // (batch * size)) * batch * size, batch * size):
            # Where none are left for this process it goes along with others' windows, which do not count.
            rows = starts[first : first + batch] if first < count else starts[:1]
            ids, resets = windows_at(tokens, rows, context).to(device)
            labels = ids[:, 1:] if resets is None else ids[:, 1:].masked_fill(resets[:, 1:], _NONE)
            marks = {} if resets is None else {"resets": resets[:, :-1]}
            found = _score(model(ids[:, :-1], **marks), labels, tokenizer or ByteTokenizer())
            total = _sum(total, found) if first < count else total
    nats, bytes_read = add([total.nats, float(total.size)])
    total = Score(nats, int(bytes_read))
    # A loss that is not finite is a result of training, to be seen.
    return total.nats / total.size / math.log(2) if total.size else total.bits_per_byte


def _sum(one: Score, other: Score) -> Score:
    return Score(one.nats + other.nats, one.size + other.size)


@torch.no_grad()
def score(
    model: Transformer,
    ids: Iterable[npt.NDArray[Any]],
    tokenizer: Tokenizer,
    block: int = 1024,
    report: Callable[[int], object] | None = None,
) -> Score:
    """Read a whole text once from start to end, the state carried along, in memory that does not grow with it.

    The first token has nothing to be predicted from and does not count.

    Args:
        model: is put in evaluation mode meanwhile.
        ids: the text's tokens, in parts.
        tokenizer: of the tokens.
        block: tokens per forward pass; the result does not depend on it, save for rounding.
        report: called after each block with the number of bytes predicted in it.
    """
    device = next(model.parameters()).device
    total, state, last = Score(0.0, 0), None, np.empty(0, dtype=np.int64)
    with evaluating(model):
        for part in in_blocks(ids, block):
            piece = torch.from_numpy(np.concatenate([last, part])).unsqueeze(0).to(device)
            last = part[-1:]
            if piece.shape[1] < 2:
                continue
            logits, state = model(piece[:, :-1], state=state, return_state=True)
            new = _score(logits, piece[:, 1:], tokenizer)
            total = _sum(total, new)
            if report is not None:
                report(new.size)
    return total


def in_blocks(arrays: Iterable[npt.NDArray[Any]], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """The same tokens in blocks of `size`, the last one shorter."""
    held: list[npt.NDArray[np.int64]] = []
    missing = size
    for array in arrays:
        ids = array.astype(np.int64)
        while len(ids):
            held.append(ids[:missing])
            ids, missing = ids[missing:], missing - len(held[-1])
            if not missing:
                yield np.concatenate(held)
                held, missing = [], size
    if held:
        yield np.concatenate(held)
