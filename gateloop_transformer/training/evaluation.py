"""Bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from gateloop_transformer.generation import evaluating
from gateloop_transformer.model import Transformer
from gateloop_transformer.ops.pairs import compute_dtype
from gateloop_transformer.training.data import Bytes


def _sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return F.cross_entropy(
        logits.to(compute_dtype(logits.dtype)).flatten(0, 1), labels.flatten(), reduction="sum"
    ).item()


@torch.no_grad()
def validate(model: Transformer, data: Bytes, context: int, limit: int, batch: int) -> float:
    """Bits per byte over windows of `context` bytes, each from an empty state, spread evenly over `data`.

    Args:
        model: is put in evaluation mode meanwhile.
        data: validation bytes, at least 2.
        context: bytes predicted per window; fewer if data is shorter.
        limit: about how many bytes are predicted in all.
        batch: windows at a time.
    """
    device = next(model.parameters()).device
    context = min(context, len(data) - 1)
    count = max(1, min(limit // context, (len(data) - 1) // context))
    starts = np.linspace(0, len(data) - 1 - context, count).astype(np.int64)
    windows = np.stack([data[start : start + context + 1] for start in starts]).astype(np.int64)
    total = 0.0
    with evaluating(model):
        for rows in torch.from_numpy(windows).split(batch):
            ids = rows.to(device)
            total += _sum_of_losses(model(ids[:, :-1]), ids[:, 1:])
    return total / (count * context) / math.log(2)


@torch.no_grad()
def bits_per_byte(
    model: Transformer, data: Bytes, block: int = 1024, report: Callable[[int], object] | None = None
) -> float:
    """Bits per byte of a whole text, read once from start to end with the state carried along.

    The first byte has nothing to be predicted from and does not count.

    Args:
        model: is put in evaluation mode meanwhile.
        data: the text's bytes, at least 2.
        block: bytes per forward pass; the result does not depend on it, save for rounding.
        report: called after each block with the number of bytes predicted in it.

    Raises:
        ValueError: fewer than 2 bytes.
        RuntimeError: the loss is not finite.
    """
    if len(data) < 2:
        raise ValueError(f"evaluation needs at least 2 bytes of text, got {len(data)}")
    device = next(model.parameters()).device
    ids = torch.from_numpy(data.astype(np.int64)).unsqueeze(0)
    total, state = 0.0, None
    with evaluating(model):
        for start in range(0, len(data) - 1, block):
            piece = ids[:, start : start + block + 1].to(device)
            logits, state = model(piece[:, :-1], state=state, return_state=True)
            total += _sum_of_losses(logits, piece[:, 1:])
            if report is not None:
                report(piece.shape[1] - 1)
    if not math.isfinite(total):
        raise RuntimeError("the model's loss is not finite; its weights may be damaged")
    return total / (len(data) - 1) / math.log(2)
