"""Small models of every kind, with no parameter at the value that it starts from."""

from __future__ import annotations

from typing import Any

import torch
from cases import needs

from gateloop_transformer import Transformer, TransformerConfig

ONNX = needs("torch", "2.7", "export_onnx refuses before")
VOCABULARY = 20
_ATTENTION = {"use_gate_looped_attn": False, "heads": 2, "dim_head": 4}

GATES: dict[str, dict[str, Any]] = {
    "polar": {},
    "polar heads": {"gate_loop_heads": 3},
    "paper": {"gate": "paper", "ff_mult": 0},
    "paper heads": {"gate": "paper", "gate_loop_heads": 3, "sub_ln": True, "attn_add_swish_gating": False},
    "ring": {"gate": "ring", "sub_ln": True},
    "ring heads": {"gate": "ring", "gate_loop_heads": 2, "head_norm": True, "qk_norm": True},
    "conv": {"conv_size": 3},
    "conv silu": {"gate": "ring", "conv_size": 4, "conv_silu": True, "qkv_bias": True, "ff_mult": 0},
    "fixed": {"gate": "ring", "fixed_gates": True, "phase_spread": 1.0},
    "fixed heads": {"gate": "ring", "fixed_gates": True, "gate_loop_heads": 2, "dim_gate_looped_attn": 24},
    "rank": {"gate": "ring", "gate_rank": 3, "phase_spread": 1.0},
    "rank heads": {"gate_rank": 2, "gate_loop_heads": 3},
    "no swish": {"attn_add_swish_gating": False},
    "post norm": {"post_ln_norm": True, "sub_ln": True, "ff_mult": 1, "gate_loop_heads": 3},
    "real": {"ablate_complex": True},
    "real paper": {"ablate_complex": True, "gate": "paper", "gate_loop_heads": 3},
    "real ring": {"ablate_complex": True, "gate": "ring", "gate_loop_heads": 3, "conv_size": 2},
    "still": {"ablate_state_transition": True, "gate": "ring"},
    "still heads": {"ablate_state_transition": True, "gate": "ring", "gate_loop_heads": 3},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "attention": _ATTENTION,
    "rotary": {**_ATTENTION, "rotary_emb": True, "qk_norm": True},
    "window": {**_ATTENTION, "rotary_emb": True, "attn_window": 3},
    "window 1": {**_ATTENTION, "attn_window": 1, "attn_add_swish_gating": False},
    "bare": {**_ATTENTION, "attn_softmax_normalize": False},
    "pattern": {**_ATTENTION, "layer_pattern": "gate attention", "gate_loop_heads": 4, "conv_size": 3, "depth": 3},
}
POSITION: dict[str, dict[str, Any]] = {
    "released": {**_ATTENTION, "data_dependent_rel_pos": "released"},
    "gate_loop": {**_ATTENTION, "data_dependent_rel_pos": "gate_loop", "rotary_emb": True},
    "gate_loop window": {**_ATTENTION, "data_dependent_rel_pos": "gate_loop", "attn_window": 3},
}
EVERY = {**GATES, **ATTENTION, **POSITION}


def config(name: str) -> TransformerConfig:
    return TransformerConfig(**{"dim": 12, "depth": 2, **EVERY[name]})


def build(name: str, vocabulary: int = VOCABULARY) -> Transformer:
    return shaken(config(name).build(vocabulary))


def shaken(model: Transformer) -> Transformer:
    """In evaluation mode, with noise on every parameter that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
