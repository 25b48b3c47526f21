"""Kinds of models that the tests of this folder run on."""

from __future__ import annotations

from typing import Any

ATTENTION = {"heads": 2, "dim_head": 8}
KINDS: dict[str, dict[str, Any]] = {
    "polar": {},
    "recipe": {"gate": "ring", "ff_mult": 0, "conv_size": 4, "conv_silu": True, "qkv_bias": True},
    "heads": {"gate": "ring", "gate_loop_heads": 4, "head_norm": True, "qk_norm": True},
    "real": {"gate": "paper", "ablate_complex": True, "sub_ln": True},
    "norm after": {"post_ln_norm": True},
    "hybrid": {"layer_pattern": "gate attention", "rotary_emb": True, **ATTENTION},
    "window": {"layer_pattern": "gate attention", "rotary_emb": True, "attn_window": 5, **ATTENTION},
    "attention": {"use_gate_looped_attn": False, **ATTENTION},
    "gated positions": {"layer_pattern": "attention gate", "data_dependent_rel_pos": "gate_loop", **ATTENTION},
    "released positions": {"layer_pattern": "attention gate", "data_dependent_rel_pos": "released", **ATTENTION},
}
VOCABULARY = 50


def build(kind: str, **changes: Any) -> Any:
    """A language model of a kind, in evaluation mode."""
    from gateloop_transformer.huggingface import GateLoopConfig, GateLoopForCausalLM

    options = {"vocab_size": VOCABULARY, "dim": 16, "depth": 2, "ff_mult": 2, **KINDS[kind], **changes}
    return GateLoopForCausalLM(GateLoopConfig(**options)).eval()
