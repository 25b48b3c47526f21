"""Exports a model as a program of `torch.export`, to save, load, compile or lower elsewhere."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gateloop_transformer.arguments import check_release
from gateloop_transformer.decoding.decoder import evaluating
from gateloop_transformer.export.plain import PlainOperators
from gateloop_transformer.export.states import check_model, dimension, start_state, window
from gateloop_transformer.model import Transformer


def export_program(model: Transformer, *, portable: bool = False, max_length: int = 65536) -> ExportedProgram:
    """Export a program that maps ids (B, T) to logits (B, T, vocabulary), for B ≥ 1 and T ≥ 1, in evaluation mode.

    By default the program names this library's operators, with the backend that computes them: it is as fast and as
    exact as the model, and whoever loads it says `import gateloop_transformer.model` before `torch.export.load`. A
    portable program is of torch's own operators alone, and runs where this library is not installed, on every device.

    Args:
        model: a `Transformer`; it stays as it is. The program runs on its device and shares its weights.
        portable: only torch's own operators. No loop runs over time: chunks of 64 steps are matrix products, and states
            are carried over chunks in log₂(chunks) rounds, so some memory is spent.
        max_length: the longest T of a portable program.

    Returns:
        The program: `program.module()(ids)`, `torch.export.save(program, "model.pt2")`.

    Raises:
        ValueError: the model is not a `Transformer` or is quantized, max_length is below 2, or torch is too old.
    """
    check_model("export_program", model)
    if max_length < 2:
        raise ValueError(f"export_program: max_length must be at least 2 steps, not {max_length}")
    if portable:
        check_release("export_program: a portable program", "torch", torch.__version__, "2.11")
    longest = {"most": max_length} if portable else {}
    dims = {0: dimension("batch", 1), 1: dimension("length", 1, **longest)}
    # The two sizes differ, and neither is 0 or 1, because equal sizes would be merged and 0 and 1 taken for constants.
    example = torch.zeros(3, 2, dtype=torch.int64, device=model.token_emb.weight.device)
    with evaluating(model), PlainOperators(max_length) if portable else contextlib.nullcontext():
        return torch.export.export(_Whole(model), (example,), dynamic_shapes={"ids": dims})


class _Whole(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        # A window that may be longer or shorter than T makes two programs, but not after keys that are never seen.
        windowed = window(self.model) is not None
        logits: Tensor = self.model(ids, start_state(self.model, ids, 1) if windowed else None)
        return logits
