"""Smaller weights: close to the original, which stays as it is; gates keep their precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gateloop_transformer import CausalFullAttention, GateLoopedAttention, Transformer, quantize
from gateloop_transformer.layers import quantized
from gateloop_transformer.layers.quantized import SmallLinear

KINDS = ["bfloat16", "int8"]


def build(**options: Any) -> Transformer:
    torch.manual_seed(0)
    pattern = {"layer_pattern": "gate attention", "heads": 2, "dim_head": 8, "rotary_emb": True}
    return Transformer(32, num_tokens=31, depth=2, gate="ring", gate_loop_heads=4, **{**pattern, **options})


def test_an_8_bit_weight_is_within_half_a_step_of_the_weight() -> None:
    linear = nn.Linear(50, 20)
    with torch.no_grad():
        linear.weight *= torch.logspace(-20, 5, 20).unsqueeze(1)
        linear.weight[3] = 0
    small = SmallLinear(linear, "int8")
    assert small.weight.dtype == torch.int8
    assert small.scale is not None
    assert small.scale.shape == (20,)
    step = small.scale.float().unsqueeze(1)
    largest = linear.weight.abs().amax(1, keepdim=True)
    # The largest may lie up to 1/256 outside where the scale was rounded down.
    limit = torch.maximum(step * 0.501, largest / 250)
    assert ((small.weight * step - linear.weight).abs() <= limit).all()
    assert (small.weight[3] == 0).all()
    assert small.weight.abs().amax(1)[torch.arange(20) != 3].min() >= 126
    x = torch.randn(3, 50)
    assert torch.equal(small(x)[:, 3], linear.bias[3].expand(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (9,), (2, 50), (0, 4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 37, 48])
def test_products_are_those_of_the_rounded_weights(kind: str, shape: tuple[int, ...], bias: bool, width: int) -> None:
    linear, x = nn.Linear(width, 21, bias=bias), torch.randn(*shape, width)
    small = SmallLinear(linear, kind)
    weight = small.weight.double() * (1 if small.scale is None else small.scale.double().unsqueeze(1))
    expected = x.bfloat16().double() @ weight.T + (linear.bias if bias else 0)
    assert small(x).shape == (*shape, 21)
    assert small(x).dtype == torch.float32
    assert torch.allclose(small(x).double(), expected, rtol=0.01, atol=0.01)
    assert f"in_features={width}" in repr(small)
    assert kind in repr(small)


def test_few_and_many_rows_give_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    small, x = SmallLinear(nn.Linear(64, 32), "int8"), torch.randn(5, 64)
    few = small(x)
    monkeypatch.setattr(quantized, "_FEW_ROWS", 0)
    assert torch.allclose(few, small(x), rtol=0.02, atol=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_close_and_the_original_untouched(kind: str) -> None:
    model, ids = build().eval(), torch.randint(31, (2, 40))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(ids)
    small = quantize(model, kind)
    assert type(small) is Transformer
    error = (small(ids) - logits).square().mean().sqrt() / logits.std()
    assert 0 < error < 0.03
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_that_make_no_gates_are_small(kind: str) -> None:
    small = quantize(build(data_dependent_rel_pos="gate_loop"), kind)
    gate, attention = (block[0].fn for block in small.layers)
    assert isinstance(gate, GateLoopedAttention)
    assert isinstance(attention, CausalFullAttention)
    for module in (gate.to_a[0], attention.to_a[0]):
        assert type(module) is nn.Linear
    linear = [module for module in small.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 2
    assert sum(isinstance(module, SmallLinear) for module in small.modules()) == 3 + 3 + 4 + 1
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions_become_float32(kind: str, dtype: torch.dtype) -> None:
    small = quantize(build().to(dtype), kind)
    assert small(torch.randint(31, (1, 4))).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_decodes_and_carries_its_state(kind: str) -> None:
    small, ids = quantize(build(), kind).eval(), torch.randint(31, (2, 20))
    whole = small(ids)
    first, state = small(ids[:, :13], return_state=True)
    rest = [small(ids[:, 13:14], state=state, return_state=True)]
    for step in range(14, 20):
        rest.append(small(ids[:, step : step + 1], state=rest[-1][1], return_state=True))
    assert torch.allclose(torch.cat([first, *(logits for logits, _ in rest)], 1), whole, atol=0.05)
    assert small.generate(ids, 5, seed=0).shape == (2, 25)


def test_float32_changes_nothing() -> None:
    model, ids = build(), torch.randint(31, (1, 9))
    small = quantize(model, "float32")
    assert small is not model
    assert torch.equal(small(ids), model(ids))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="one of float32, bfloat16, int8, not 'int4'"):
        quantize(build(), "int4")
    with pytest.raises(ValueError, match="must be a torch module, not int"):
        quantize(3, "int8")  # type: ignore[type-var]
