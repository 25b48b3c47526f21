"""Small models of every kind, with no parameter at the value that it starts from."""

from __future__ import annotations

import torch
from cases import needs
from models import MODELS

from gateloop_transformer import Transformer, TransformerConfig

ONNX = needs("torch", "2.7", "export_onnx refuses before")
VOCABULARY = 20


def config(name: str) -> TransformerConfig:
    depth = 3 if name == "pattern" else 2
    return TransformerConfig(**{"dim": 12, "depth": depth, "dim_head": 4, **MODELS[name]})


def build(name: str, vocabulary: int = VOCABULARY) -> Transformer:
    return shaken(config(name).build(vocabulary))


def shaken(model: Transformer) -> Transformer:
    """In evaluation mode, with noise on every parameter that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
