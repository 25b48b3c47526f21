"""Losses by position in a window and by how far back the same tokens came before."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer.data.cache import spool
from gateloop_transformer.data.shards import Tokens, Writer, open_tokens
from gateloop_transformer.data.tokenizer import Tokenizer, encode_document
from gateloop_transformer.evaluation.spans import Span, distances_to_same, spans_of
from gateloop_transformer.files import cache_folder
from gateloop_transformer.generation import evaluating
from gateloop_transformer.model import Transformer
from gateloop_transformer.ops.pairs import compute_dtype
from gateloop_transformer.waiting import waiting

# Windows, and tokens of each for which activations exist at a time.
_ROWS, _BLOCK = 8, 256
# Lengths of windows that are tried, in training contexts, until there are as many windows as the second says.
_UP_TO, _SOME = (64, 32, 16, 8, 4, 2, 1), 8


class Costs(NamedTuple):
    """What predicting cost, in groups of tokens (G,) each.

    tokens: predicted; nats: sums of the losses; size: bytes that the tokens stand for; right: how many were the
    likeliest; again: how many were what had followed the same tokens the last time.
    """

    tokens: npt.NDArray[np.float64]
    nats: npt.NDArray[np.float64]
    size: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    again: npt.NDArray[np.float64]

    @classmethod
    def none(cls, groups: int) -> Costs:
        """Nothing yet."""
        return cls(*np.zeros((5, groups)))

    def add(self, groups: npt.NDArray[np.int64], *parts: npt.NDArray[Any]) -> None:
        """Add tokens of these groups; parts: the fields after `tokens`, for each token."""
        for total, part in zip(self, (np.ones(groups.shape), *parts), strict=True):
            total += np.bincount(groups.ravel(), part.ravel(), len(total))

    def row(self, group: int) -> dict[str, float | int | None]:
        """Tokens, loss (nats per token), bits per byte (None: there are no bytes) and accuracy of a group of some."""
        tokens, nats, size, right, _ = (float(field[group]) for field in self)
        bits = nats / size / math.log(2) if size else None
        return {"tokens": int(tokens), "loss": nats / tokens, "bits_per_byte": bits, "accuracy": right / tokens}


class Spread(NamedTuple):
    """How losses are spread over windows.

    positions: costs by `spans` of how many tokens of the window were read before the one predicted. distances: by the
    same spans of how many tokens ago the same `same` tokens stood before one, and last those of which they never did.
    """

    spans: list[Span]
    positions: Costs
    distances: Costs
    same: int

    def by_position(self) -> list[dict[str, float | int | None]]:
        """Rows for JSON."""
        return [
            {"from": span.first, "to": span.last, **self.positions.row(n)}
            for n, span in enumerate(self.spans)
            if self.positions.tokens[n]
        ]

    def by_distance(self) -> list[dict[str, float | int | None]]:
        """Rows for JSON; "from" and "to" are null where the same tokens never came before.

        "again": the share of tokens that were what had followed the last time.
        """
        costs, ends = self.distances, [*self.spans, None]
        return [
            {
                "from": span and span.first,
                "to": span and span.last,
                **costs.row(n),
                "again": float(costs.again[n] / costs.tokens[n]),
            }
            for n, span in enumerate(ends)
            if costs.tokens[n]
        ]


def same_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens in a row are the same context again: 4 bytes, or 2 tokens of BPE."""
    return 4 if tokenizer.kind == "bytes" else 2


@contextlib.contextmanager
def tokens_on_disk(documents: Iterable[Iterable[bytes]], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """The tokens of documents given as blocks of bytes, in files of the cache that are gone at the end."""
    with spool(cache_folder() / "corpora") as folder:
        writer = Writer(folder, "tokens", tokenizer.dtype)
        with contextlib.closing(writer), waiting("tokenising the data"):
            for document in documents:
                for n, ids in enumerate(encode_document(tokenizer, document)):
                    writer.write(ids, np.zeros(int(n == 0), dtype=np.int64))
        starts = folder / "tokens-starts.bin"
        yield open_tokens(folder, writer.shards, tokenizer.dtype, starts, writer.tokens)[0]


def windows_up_to(tokens: Tokens, context: int, up_to: int | None) -> tuple[npt.NDArray[np.int64], int]:
    """Windows of `up_to` times the context; None: 64 times it, or less so that there are some windows.

    Args:
        tokens: that the windows are of.
        context: tokens that a window predicts in training.
        up_to: how many times that.

    Returns:
        Where they begin, and `up_to`.

    Raises:
        ValueError: no document is long enough.
    """
    if up_to is not None and up_to < 1:
        raise ValueError(f"--up-to must be at least 1 times the training context, not {up_to}")
    tried = _UP_TO if up_to is None else (up_to,)
    for times in tried:
        starts = full_windows(tokens, times * context)
        if len(starts) >= (_SOME if times != tried[-1] else 1):
            return starts, times
    raise ValueError(
        f"losses up to {tried[-1]} times the training context need a document of more than {tried[-1] * context:,} "
        f"tokens; the longest has {np.diff(borders(tokens)).max():,}"
    )


def evenly(starts: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` windows, evenly through all of them.

    >>> evenly(np.arange(9), 3).tolist()
    [0, 4, 8]
    """
    if len(starts) <= count:
        return starts
    some: npt.NDArray[np.int64] = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
    return some


def borders(tokens: Tokens) -> npt.NDArray[np.int64]:
    """Where documents begin, and where the last one ends, ascending."""
    ends: npt.NDArray[np.int64] = np.unique(np.concatenate([[0], tokens.starts(0, len(tokens)), [len(tokens)]]))
    return ends


def full_windows(tokens: Tokens, length: int) -> npt.NDArray[np.int64]:
    """Where windows of `length` predicted tokens begin, as many as fit into each document one after the other."""
    ends = borders(tokens)
    starts = [
        np.arange(start, stop - length, length) for start, stop in itertools.pairwise(ends) if stop - start > length
    ]
    return np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)


@torch.no_grad()
def spread(
    model: Transformer,
    tokens: Tokens,
    starts: npt.NDArray[np.int64],
    length: int,
    spans: list[Span],
    tokenizer: Tokenizer,
    report: Callable[[int], object] | None = None,
) -> Spread:
    """Losses by position and by distance in windows, each read from an empty state in blocks, the state carried along.

    Activations do not grow with `length`, save where attention without a window looks at all of it.

    Args:
        model: is put in evaluation mode meanwhile.
        tokens: what the windows are of.
        starts: where they begin, each within a document.
        length: tokens that a window predicts.
        spans: from 1 to length.
        tokenizer: of the tokens.
        report: called after each block with the number of tokens predicted in it.

    Raises:
        RuntimeError: a loss is not finite.
    """
    found = Spread(spans, Costs.none(len(spans)), Costs.none(len(spans) + 1), same_tokens(tokenizer))
    positions = spans_of(np.arange(1, length + 1), spans)
    with evaluating(model):
        for rows in np.array_split(starts, -(-len(starts) // _ROWS)):
            whole = np.stack([tokens.read(row, row + length + 1) for row in rows.tolist()])
            distances = np.stack([distances_to_same(row, found.same) for row in whole])[:, 1:]
            labels = whole[:, 1:]
            again = (np.take_along_axis(whole, np.arange(1, length + 1) - distances, 1) == labels) & (distances > 0)
            ago = np.where(distances > 0, spans_of(distances, spans), len(spans))
            for part, nats, right in _in_blocks(model, whole):
                costs = nats, tokenizer.lengths[labels[:, part]], right, again[:, part]
                found.positions.add(np.broadcast_to(positions[part], nats.shape), *costs)
                found.distances.add(ago[:, part], *costs)
                if report is not None:
                    report(nats.size)
    if not np.isfinite(found.positions.nats).all():
        raise RuntimeError("the model's loss is not finite; its weights may be damaged")
    return found


def _in_blocks(
    model: Transformer, whole: npt.NDArray[np.int64]
) -> Iterator[tuple[slice, npt.NDArray[np.float64], npt.NDArray[np.bool_]]]:
    """What each token after the first of windows (B, T) cost: stretches of the T - 1, with `token_costs`."""
    device, state = next(model.parameters()).device, None
    for first in range(0, whole.shape[1] - 1, _BLOCK):
        ids = torch.from_numpy(whole[:, first : first + _BLOCK + 1]).to(device)
        logits, state = model(ids[:, :-1], state=state, return_state=True)
        yield slice(first, first + ids.shape[1] - 1), *token_costs(logits, ids[:, 1:])


def token_costs(logits: Tensor, labels: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The loss (nats) of each label (B, T) under logits (B, T, vocabulary), and whether it was the likeliest."""
    precise = logits.to(compute_dtype(logits.dtype))
    nats = F.cross_entropy(precise.flatten(0, 1), labels.flatten(), reduction="none").unflatten(0, labels.shape)
    return nats.double().cpu().numpy(), (precise.argmax(-1) == labels).cpu().numpy()
