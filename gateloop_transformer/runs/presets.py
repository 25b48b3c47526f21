"""Settings that go together, by name: sizes of models and how to train each."""

from __future__ import annotations

from typing import Any

from gateloop_transformer.configuration import RECIPE, recipe_rank

_GATED = {"gate": "ring", "conv_size": 4, "head_norm": True}

# Heads of 64, steps of 1/4 or 1/2 million tokens, about 20 tokens per parameter; peak learning rates of Brown et al.,
# Language Models are Few-Shot Learners (2020), arXiv 2005.14165, table 2.1.
_LARGE = {
    **_GATED,
    "precision": "bf16",
    "schedule": "wsd",
    "warmup": 0.02,
    "gate_lr": 0.5,
    "eval_every": 500,
    "checkpoint_every": 500,
    "eval_bytes": 1048576,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **RECIPE,
        "dim": 208,
        "gate_rank": recipe_rank(208),
        "depth": 4,
        "max_memory": 64,
        "steps": 700,
        "context": 256,
        "batch": 8,
        "lr": 6e-3,
        "gate_lr": 1.0,
        "eval_every": 100,
    },
    "small": {
        **RECIPE,
        "dim": 816,
        "gate_rank": recipe_rank(816),
        "depth": 6,
        "max_memory": 128,
        "steps": 10000,
        "context": 512,
        "batch": 16,
        "lr": 2e-3,
        "gate_lr": 1.0,
        "eval_every": 500,
        "checkpoint_every": 500,
        "eval_bytes": 262144,
    },
    "paper": {
        "gate": "paper",
        "dim": 768,
        "depth": 14,
        "dropout": 0.1,
        "steps": 100000,
        "context": 512,
        "batch": 16,
        "lr": 6e-4,
        "gate_lr": 0.2,
        "eval_every": 1000,
        "checkpoint_every": 1000,
        "eval_bytes": 1048576,
    },
    "base": {
        **_LARGE,
        "dim": 768,
        "depth": 16,
        "gate_loop_heads": 12,
        "max_memory": 1024,
        "steps": 10000,
        "context": 1024,
        "batch": 16,
        "accumulate": 16,
        "lr": 6e-4,
    },
    "medium": {
        **_LARGE,
        "dim": 1024,
        "depth": 26,
        "gate_loop_heads": 16,
        "max_memory": 2048,
        "steps": 28000,
        "context": 2048,
        "batch": 8,
        "accumulate": 16,
        "lr": 3e-4,
    },
    "large": {
        **_LARGE,
        "dim": 1536,
        "depth": 25,
        "gate_loop_heads": 24,
        "max_memory": 2048,
        "steps": 30000,
        "context": 2048,
        "batch": 8,
        "accumulate": 32,
        "lr": 2.5e-4,
    },
    "xl": {
        **_LARGE,
        "dim": 2048,
        "depth": 20,
        "gate_loop_heads": 32,
        "max_memory": 2048,
        "steps": 42000,
        "context": 2048,
        "batch": 4,
        "accumulate": 64,
        "lr": 2e-4,
    },
}
PRESET_HELP = (
    "tiny: 1 M parameters, minutes on a CPU; small: 21 M; paper: 124 M, as many heads as channels and the paper's "
    "gate; for accelerators, with a vocabulary of bytes: base: 124 M, medium: 356 M, large: 770 M, xl: 1.1 B"
)
