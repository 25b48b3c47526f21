"""Scores: how often a model answers right, by length and by span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gateloop_transformer.tasks.task import NONE, Batch, Ids, Task, generator, last_asked, test_rows
from gateloop_transformer.waiting import waiting

# Gives tests other random numbers than training.
_TEST = 1
_BLOCK = 512


@dataclass(frozen=True)
class Score:
    """The scores at one length.

    last: share of sequences whose last answer is right. every: share of all answers that are right. commonest: share of
    sequences whose last answer is the commonest one, which a constant answer would score. by_span: right answers and
    all answers for spans from 2^n to 2^(n+1) - 1.
    """

    last: float
    every: float
    commonest: float
    by_span: dict[int, tuple[int, int]]


@torch.no_grad()
def answers(model: nn.Module, inputs: Ids, choices: int, block: int = _BLOCK) -> Ids:
    """Answer at every step by the likeliest of the first `choices` tokens (B, T).

    Sequences are read in blocks with the state carried along: memory does not grow with the length, except for the
    state of attention layers.

    Args:
        model: called like `Transformer`.
        inputs: tokens (B, T).
        choices: number of answers.
        block: steps to read at a time.
    """
    found, state = [], None
    for part in torch.from_numpy(inputs).split(block, 1):
        logits, state = model(part, state=state, return_state=True)
        found.append(logits[..., :choices].argmax(-1).numpy())
    return np.concatenate(found, 1)


def by_span(right: npt.NDArray[np.bool_], spans: Ids) -> dict[int, tuple[int, int]]:
    """Count right answers and all answers for each power of two of their spans.

    Args:
        right: (N,) booleans.
        spans: (N,), at least 1.
    """
    powers = np.log2(spans).astype(np.int64)
    return {int(n): (int(right[powers == n].sum()), int((powers == n).sum())) for n in np.unique(powers)}


def score(model: nn.Module, task: Task, batch: Batch) -> Score:
    """Score a model on one batch; meanwhile it is in evaluation mode.

    Args:
        model: called like `Transformer`.
        task: the task that the batch belongs to.
        batch: sequences and answers.
    """
    training = model.training
    try:
        found = answers(model.eval(), batch.inputs, task.answers)
    finally:
        model.train(training)
    asked = batch.targets != NONE
    right = found == batch.targets
    rows, steps = np.arange(len(found)), last_asked(batch.targets)
    last = batch.targets[rows, steps]
    spans = {} if batch.spans is None else by_span(right[asked], batch.spans[asked])
    return Score(
        last=float(right[rows, steps].mean()),
        every=float(right[asked].mean()),
        commonest=float(np.bincount(last).max() / len(last)),
        by_span=spans,
    )


def score_lengths(
    model: nn.Module,
    task: Task,
    lengths: tuple[int, ...],
    rows: int,
    seed: int,
    report: Callable[[int], object] = lambda _length: None,
) -> dict[int, Score]:
    """Score a model at each length, on sequences that training does not see.

    Args:
        model: called like `Transformer`.
        task: the task to test.
        lengths: lengths of sequences in tokens.
        rows: sequences of each length; fewer of those above 2,000 tokens, at least 64.
        seed: seed of the sequences.
        report: called after each length.
    """
    scores = {}
    for length in lengths:
        with waiting(f"testing on sequences of {length:,} tokens"):
            batch = task.test_batch(generator(seed, _TEST, length), test_rows(rows, length), length)
            scores[length] = score(model, task, batch)
        report(length)
    return scores
