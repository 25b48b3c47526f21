"""The arguments of a model as data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gateloop_transformer import TransformerConfig


def test_the_recommended_model_has_memories_of_a_quarter_of_the_context() -> None:
    config = TransformerConfig.recommended(8, 2, context=100, head_norm=False)
    assert (config.dim, config.depth, config.max_memory, config.ff_mult) == (8, 2, 25, 0)
    assert TransformerConfig.recommended(8, context=1).max_memory == 2
    assert TransformerConfig.recommended(512).gate_rank == 32
    assert TransformerConfig.recommended(100).gate_rank == 16
    assert config.gate_rank is None
    assert TransformerConfig.recommended(100, gate_loop_heads=4).gate_rank is None
    assert TransformerConfig.recommended(100, fixed_gates=True).build().layers[0][0].fn.to_a is None
    model = config.build(7)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 7)


@pytest.mark.parametrize("context", [0, -4, float("nan"), float("inf"), "256", None, True])
def test_a_context_of_nothing_is_refused(context: Any) -> None:
    with pytest.raises(ValueError, match="context must be at least 1 token, not"):
        TransformerConfig.recommended(8, 2, context=context)


def test_an_unknown_relative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of none, released, gate_loop, not 'relative'"):
        TransformerConfig(dim=8, depth=1, data_dependent_rel_pos="relative").build()
