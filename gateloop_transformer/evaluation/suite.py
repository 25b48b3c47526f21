"""All figures of a language model on one text: perplexity, bits per byte, and how far its context generalises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gateloop_transformer.data.shards import Tokens
from gateloop_transformer.data.tokenizer import Tokenizer
from gateloop_transformer.evaluation.bits import Score, score
from gateloop_transformer.evaluation.positions import borders, evenly, full_windows, spread
from gateloop_transformer.evaluation.spans import doubling_spans
from gateloop_transformer.model import Transformer

# Times the training length that losses by position go up to, where documents are long enough.
UP_TO = 16
# Tokens that are read from disk at a time.
_READ = 1 << 16


class Windows(NamedTuple):
    """Where windows begin (N,), and how many tokens each predicts."""

    starts: npt.NDArray[np.int64]
    length: int


def windows(tokens: Tokens, context: int, count: int | None = None) -> Windows:
    """Windows of `UP_TO` times the context, or, where no document is that long, of the longest one's length.

    Args:
        tokens: that the windows are of, a document of two or more among them.
        context: tokens that a window predicts in training.
        count: at most so many, evenly; None: all.
    """
    length = min(UP_TO * context, int(np.diff(borders(tokens)).max()) - 1)
    starts = full_windows(tokens, length)
    return Windows(starts if count is None else evenly(starts, count), length)


def perplexities(
    model: Transformer, tokens: Tokens, tokenizer: Tokenizer, report: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Each document read once from start to end, the state carried along; its first token is not predicted.

    Args:
        model: is put in evaluation mode meanwhile.
        tokens: of documents, one of two or more among them.
        tokenizer: of the tokens.
        report: called now and then with the number of bytes predicted since.

    Returns:
        "loss" (nats per predicted token), "perplexity_per_token" and "perplexity_per_byte" (null beyond the largest
        float), "bits_per_byte", and how many tokens and bytes were predicted.

    Raises:
        ValueError: nothing was predicted.
        RuntimeError: the loss is not finite.
    """
    total, predicted = Score(0.0, 0), 0
    for start, stop in itertools.pairwise(borders(tokens).tolist()):
        new = score(model, _parts(tokens, start, stop), tokenizer, report=report)
        total = Score(total.nats + new.nats, total.size + new.size)
        predicted += stop - start - 1
    bits = total.bits_per_byte
    return {
        "loss": total.nats / predicted,
        "perplexity_per_token": _exponential(total.nats / predicted),
        "perplexity_per_byte": _exponential(total.nats / total.size),
        "bits_per_byte": bits,
        "predicted_tokens": predicted,
        "predicted_bytes": total.size,
    }


def generalisation(
    model: Transformer,
    tokens: Tokens,
    chosen: Windows,
    context: int,
    tokenizer: Tokenizer,
    report: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Losses by position in windows read from an empty state.

    Args:
        model: is put in evaluation mode meanwhile.
        tokens: that the windows are of.
        chosen: the windows.
        context: tokens that a window predicts in training.
        tokenizer: of the tokens.
        report: called now and then with the number of tokens predicted since.

    Returns:
        "context"; "up_to", the times of it asked for, and "reached", those that the documents allowed; "length" of the
        "windows", of which there are so many; and the rows "by_position".

    Raises:
        RuntimeError: a loss is not finite.
    """
    spans = doubling_spans(chosen.length, context)
    found = spread(model, tokens, chosen.starts, chosen.length, spans, tokenizer, report)
    return {
        "context": context,
        "up_to": UP_TO,
        "reached": chosen.length / context,
        "length": chosen.length,
        "windows": len(chosen.starts),
        "by_position": found.by_position(),
    }


def _parts(tokens: Tokens, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
    for first in range(start, stop, _READ):
        yield tokens.read(first, min(first + _READ, stop))


def _exponential(nats: float) -> float | None:
    """None: it is beyond the largest float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None
