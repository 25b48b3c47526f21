"""Gates as layers apply them: against what they do to a state, and as hooks see them in a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gateloop_transformer import GateLoopedAttention, Transformer
from gateloop_transformer.inspection.trace import trace
from gateloop_transformer.layers.state import GateLoopState


def silent(**options: Any) -> GateLoopedAttention:
    """A layer that adds nothing to its state."""
    layer = GateLoopedAttention(8, **options).double()
    torch.nn.init.zeros_(layer.to_qkv.weight)
    if layer.to_a is not None:
        torch.nn.init.normal_(layer.to_a[0].weight)
    return layer


@pytest.mark.parametrize("gate", ["polar", "paper", "ring"])
@pytest.mark.parametrize("options", [{"heads": 2, "conv_size": 3}, {"heads": None}, {"heads": 4, "reverse": True}])
@pytest.mark.parametrize("flags", [{}, {"ablate_complex": True}, {"ablate_state_transition": True}])
def test_gates_are_what_the_state_is_multiplied_by(gate: str, options: dict[str, Any], flags: dict[str, bool]) -> None:
    layer = silent(gate=gate, **options)
    x, taps = torch.randn(2, 5, 8, dtype=torch.float64), 2 if layer.conv else 0
    shape = (2, layer.heads, layer.dim_head, layer.dim_head)
    before = torch.randn(shape, dtype=torch.complex128)
    state = GateLoopState(before.real, before.imag, torch.randn(2, taps, 8, dtype=torch.float64))
    gates = layer.gates(x, state, **flags)
    assert gates.shape == (2, 5, layer.heads)
    after = layer(x, state, return_state=True, **flags)[1]
    torch.testing.assert_close(torch.complex(after.real, after.imaginary), gates.prod(1)[..., None, None] * before)
    if flags:
        assert not gates.imag.any()
    if "ablate_state_transition" in flags:
        assert (gates == 1).all()


def test_fixed_gates_are_what_the_state_is_multiplied_by() -> None:
    test_gates_are_what_the_state_is_multiplied_by("ring", {"heads": 4, "fixed_gates": True}, {})
    ids = torch.randint(0, 7, (1, 5))
    _, found = traced(ids, gate="ring", fixed_gates=True)
    assert (found.layers[0].gates == found.layers[0].gates[0]).all()
    assert "do not depend on the text" in found.layers[0].note


def test_gates_in_pieces_are_those_of_the_whole() -> None:
    layer = GateLoopedAttention(8, heads=2, conv_size=4, gate="ring").double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    _, state = layer(x[:, :5], return_state=True)
    torch.testing.assert_close(torch.cat([layer.gates(x[:, :5]), layer.gates(x[:, 5:], state)], 1), layer.gates(x))
    resets = torch.arange(9)[None] == 5
    torch.testing.assert_close(layer.gates(x, resets=resets)[:, 5:], layer.gates(x[:, 5:]))
    bounds = torch.tensor([0, 5, 9])
    torch.testing.assert_close(layer.gates(x, cu_seqlens=bounds), layer.gates(x, resets=resets))
    # The original's second argument.
    torch.testing.assert_close(layer.gates(x, True), layer.gates(x, ablate_complex=True))
    with pytest.raises(ValueError, match="must have shape"):
        layer.gates(x[..., :3])


def traced(ids: Tensor, **options: Any) -> tuple[Transformer, Any]:
    model = Transformer(16, num_tokens=7, depth=2, heads=2, dim_head=8, **options).double()
    return model, trace(model, ids[0].numpy())


def test_a_trace_is_of_every_layer_and_token() -> None:
    ids = torch.randint(0, 7, (1, 12))
    model, found = traced(ids, layer_pattern="gate attention", gate_loop_heads=4, conv_size=3)
    first, second = found.layers
    mixed: list[Tensor] = []
    model.layers[0][0].register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
    logits = model(ids)
    layer: GateLoopedAttention = model.layers[0][0].fn
    np.testing.assert_allclose(first.gates, layer.gates(model.layers[0][0].norm(mixed[0]))[0].detach().numpy())
    assert (first.layer, first.mixer, first.note) == (1, "gate loop, polar gates, 4 heads of size 4", "")
    assert (second.layer, second.mixer, second.gates) == (2, "attention, 2 heads of size 8", None)
    assert "attention has no gates" in second.note
    nats = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").detach().numpy()
    assert math.isnan(found.nats[0])
    np.testing.assert_allclose(found.nats[1:], nats)
    assert found.right.tolist() == [False, *(logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()]
    assert not any(module._forward_hooks for module in model.modules())


def test_gates_of_attention_and_ablations_are_told() -> None:
    ids = torch.randint(0, 7, (1, 5))
    _, found = traced(ids, use_gate_looped_attn=False, data_dependent_rel_pos="gate_loop")
    assert found.layers[0].gates.shape == (5, 2 * 4)
    assert "relative position" in found.layers[0].note
    _, found = traced(ids, use_gate_looped_attn=False, data_dependent_rel_pos=True)
    assert found.layers[0].gates is None
    assert "not over time" in found.layers[0].note
    _, found = traced(ids, ablate_complex=True)
    assert not found.layers[0].gates.imag.any()
    assert "0 or π" in found.layers[0].note
    _, found = traced(ids, ablate_state_transition=True)
    assert (found.layers[0].gates == 1).all()
    assert "nothing is ever forgotten" in found.layers[0].note


def test_too_short_texts_and_broken_models_are_refused() -> None:
    model = Transformer(8, num_tokens=7, depth=1)
    with pytest.raises(ValueError, match="at least 2 tokens is needed, not of 1"):
        trace(model, np.array([3]))
    torch.nn.init.constant_(model.token_emb.weight, math.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        trace(model, np.array([3, 4]))
