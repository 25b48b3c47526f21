"""Kinds of models that the tests of this folder run on."""

from __future__ import annotations

from typing import Any

from models import MODELS

# Each kind of layer, and what decodes in a way of its own.
KINDS = ["polar", "recipe", "heads", "real", "norm after", "hybrid", "window", "attention", "gated positions"]
KINDS += ["released positions"]
VOCABULARY = 50


def build(kind: str, **changes: Any) -> Any:
    """A language model of a kind, in evaluation mode."""
    from gateloop_transformer.huggingface import GateLoopConfig, GateLoopForCausalLM

    options = {"vocab_size": VOCABULARY, "dim": 16, "depth": 2, "ff_mult": 2, "dim_head": 8, **MODELS[kind], **changes}
    return GateLoopForCausalLM(GateLoopConfig(**options)).eval()
