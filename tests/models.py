"""Kinds of models that the tests of all folders run on: one list, from which each folder picks.

Options are those of `Transformer` and of `TransformerConfig`, but for the width, the depth and `dim_head`, which each
folder sets: all kinds are made for widths that are multiples of 4.
"""

from __future__ import annotations

from typing import Any

from gateloop_transformer.configuration import RECIPE

_ATTENTION = {"use_gate_looped_attn": False, "heads": 2}
_HYBRID = {"layer_pattern": "gate attention", "heads": 2, "rotary_emb": True}

GATES: dict[str, dict[str, Any]] = {
    "polar": {},
    "polar heads": {"gate_loop_heads": 4},
    "paper": {"gate": "paper", "ff_mult": 0},
    "paper heads": {"gate": "paper", "gate_loop_heads": 4, "sub_ln": True, "attn_add_swish_gating": False},
    "ring": {"gate": "ring", "sub_ln": True},
    "heads": {"gate": "ring", "gate_loop_heads": 4, "head_norm": True, "qk_norm": True},
    "two heads": {"gate": "ring", "gate_loop_heads": 2, "head_norm": True, "qk_norm": True},
    "conv": {"conv_size": 3},
    "conv heads": {"gate": "ring", "gate_loop_heads": 4, "head_norm": True, "conv_size": 4},
    "recipe": RECIPE,
    "fixed": {"gate": "ring", "fixed_gates": True, "phase_spread": 1.0},
    "fixed heads": {"gate": "ring", "fixed_gates": True, "gate_loop_heads": 2, "dim_gate_looped_attn": 24},
    "fixed real": {"gate": "ring", "fixed_gates": True, "ablate_complex": True, "conv_size": 2},
    "rank": {"gate": "ring", "gate_rank": 3, "phase_spread": 1.0},
    "rank heads": {"gate_rank": 2, "gate_loop_heads": 4},
    "spread heads": {"gate": "paper", "gate_loop_heads": 4, "head_norm": True, "qk_norm": True}
    | {"spread_start": True, "gate_rank": 3},
    "no swish": {"attn_add_swish_gating": False},
    "norm after": {"post_ln_norm": True},
    "norm after heads": {"post_ln_norm": True, "sub_ln": True, "ff_mult": 1, "gate_loop_heads": 4},
    "norm after wide": {"post_ln_norm": True, "sub_ln": True, "attn_add_swish_gating": False}
    | {"dim_gate_looped_attn": 24},
    "real polar": {"ablate_complex": True},
    "real": {"gate": "paper", "ablate_complex": True, "sub_ln": True},
    "real heads": {"gate": "paper", "ablate_complex": True, "gate_loop_heads": 4},
    "real ring": {"gate": "ring", "ablate_complex": True, "gate_loop_heads": 4, "conv_size": 2},
    "still": {"ablate_state_transition": True, "gate": "ring"},
    "still heads": {"ablate_state_transition": True, "gate": "ring", "gate_loop_heads": 4},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "attention": _ATTENTION,
    "rotary": {**_ATTENTION, "rotary_emb": True, "qk_norm": True},
    "rotary after": {**_ATTENTION, "rotary_emb": True, "post_ln_norm": True},
    "attention window": {**_ATTENTION, "rotary_emb": True, "attn_window": 3},
    "window of one": {**_ATTENTION, "attn_window": 1, "attn_add_swish_gating": False},
    "bare": {**_ATTENTION, "attn_softmax_normalize": False},
}
HYBRID: dict[str, dict[str, Any]] = {
    "hybrid": _HYBRID,
    "window": {**_HYBRID, "attn_window": 5},
    "window heads": {**_HYBRID, "attn_window": 5, "qk_norm": True, "gate_loop_heads": 4},
    "window conv": {**_HYBRID, "attn_window": 6, "gate": "ring", "gate_loop_heads": 4, "conv_size": 4},
    "pattern": {"layer_pattern": "gate attention gate", "heads": 2, "gate_loop_heads": 4, "conv_size": 3},
}
POSITION: dict[str, dict[str, Any]] = {
    "released": {**_ATTENTION, "data_dependent_rel_pos": "released"},
    "gate_loop": {**_ATTENTION, "data_dependent_rel_pos": "gate_loop"},
    "gate_loop rotary": {**_ATTENTION, "data_dependent_rel_pos": "gate_loop", "rotary_emb": True},
    "gate_loop softmax": {**_ATTENTION, "data_dependent_rel_pos": "gate_loop", "attn_softmax_normalize": True},
    "gate_loop window": {**_ATTENTION, "data_dependent_rel_pos": "gate_loop", "attn_window": 3},
    "gated positions": {"layer_pattern": "attention gate", "heads": 2, "data_dependent_rel_pos": "gate_loop"},
    "released positions": {"layer_pattern": "attention gate", "heads": 2, "data_dependent_rel_pos": "released"},
}
MODELS = {**GATES, **ATTENTION, **HYBRID, **POSITION}
