"""What is special to the Transformer; laws it shares with the layers are in layers/test_layers.py."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_equal
from torch import Tensor

from gateloop_transformer import CausalFullAttention, GateLoopedAttention, Transformer
from gateloop_transformer.arguments import parse_pattern


def build(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(8, **{"num_tokens": 11, "depth": 2, "heads": 2, "dim_head": 4, **options}).double()


def make_ids(B: int = 2, T: int = 9) -> Tensor:
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model, ids = build(), make_ids()
    logits = model(ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_equal([model(ids, True), model(ids, return_loss=True)], [expected, expected])
    assert_equal([model(ids, False)], [logits])


def test_a_loss_is_carried_over_pieces() -> None:
    model, ids = build(layer_pattern="gate attention", conv_size=3), make_ids(T=10)
    whole = model(ids, return_loss=True)
    first, state = model(ids[:, :5], return_loss=True, return_state=True)
    last = model(ids[:, 4:], state, return_loss=True)
    assert_equal([(4 * first + 5 * last) / 9], [whole])


@pytest.mark.parametrize("attention", [False, True])
def test_ablations_of_the_constructor_hold_unless_a_call_says_otherwise(attention: bool) -> None:
    options = {"use_gate_looped_attn": not attention, "data_dependent_rel_pos": "gate_loop" if attention else False}
    plain, ids = build(**options), make_ids()
    for flag in ("ablate_complex", "ablate_state_transition"):
        ablated = build(**options, **{flag: True})
        assert torch.equal(ablated(ids), plain(ids, **{flag: True}))
        assert torch.equal(ablated(ids, **{flag: False}), plain(ids))
        assert not torch.equal(ablated(ids), plain(ids))
    assert torch.equal(plain(ids, False, True, True), plain(ids, ablate_complex=True, ablate_state_transition=True))


def test_a_pattern_mixes_mixers_in_turn() -> None:
    kinds = [type(block[0].fn) for block in build(depth=4, layer_pattern="gate gate attention").layers]
    assert kinds == [GateLoopedAttention, GateLoopedAttention, CausalFullAttention, GateLoopedAttention]
    assert parse_pattern("attention", 2) == ["attention", "attention"]
    for pattern in ("", "gate mamba", "gate,attention"):
        with pytest.raises(ValueError, match="layer_pattern must be words"):
            build(layer_pattern=pattern)


def test_options_reach_their_layers() -> None:
    model = build(
        layer_pattern="gate attention", gate="ring", gate_loop_heads=4, dim_gate_looped_attn=16, sub_ln=True,
        conv_size=3, head_norm=True, qk_norm=True, rotary_emb=True, attn_softmax_normalize=False,
        attn_add_swish_gating=False, frac_gradient_state_transition=0.3, data_dependent_rel_pos="gate_loop",
        backend="eager", ff_mult=3,
    )  # fmt: skip
    gate, attention = (block[0].fn for block in model.layers)
    assert (gate.gate, gate.heads, gate.dim_head, gate.conv.taps) == ("ring", 4, 4, 3)
    assert None not in (gate.head_norm, gate.q_norm, gate.k_norm, attention.q_norm, attention.rotary_emb)
    assert isinstance(gate.maybe_sub_ln, torch.nn.LayerNorm)
    assert gate.to_gates is None
    assert attention.to_gates is None
    assert gate.frac_gradient_state_transition == attention.frac_gradient_data_dependent_rel_pos == 0.3
    assert (attention.softmax_normalize, attention.data_dependent_rel_pos) == (False, "gate_loop")
    assert gate.backend == attention.backend == "eager"
    assert model.layers[0][1].fn[0].out_features == 24


def test_dropout_acts_in_training_only() -> None:
    model, ids = build(dropout=0.5), make_ids()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), build()(ids))


@pytest.mark.parametrize("post", [False, True])
def test_norms_stand_where_asked(post: bool) -> None:
    model, ids = build(post_ln_norm=post, depth=1), make_ids()
    x = model.token_emb(ids)
    for wrapper in model.layers[0]:
        x = wrapper.norm(wrapper.fn(x) + x) if post else wrapper.fn(wrapper.norm(x)) + x
    expected = model.to_logits(x) if post else model.to_logits[1](model.to_logits[0](x))
    assert_equal([model(ids)], [expected])


@pytest.mark.parametrize("ids", [[[0, 11]], [[-1, 3]], [[3, 1 << 40]]], ids=str)
def test_ids_outside_the_vocabulary_are_named(ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=rf"ids must be in \[0, 11\), got {min(ids[0])} to {max(ids[0])}"):
        build()(torch.tensor(ids))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_ids_of_every_integer_type(dtype: torch.dtype) -> None:
    model, ids = build(), make_ids()
    assert torch.equal(model(ids.to(dtype)), model(ids))
    assert torch.equal(model(ids.to(dtype), return_loss=True), model(ids, return_loss=True))


def test_bad_ids_are_named() -> None:
    model, ids = build(), make_ids()
    for wrong in (ids[0], ids[None], ids.double(), ids > 3):
        with pytest.raises(ValueError, match=r"ids must be integers of shape \(B, T\), not "):
            model(wrong)
    for method in (model, partial(model.generate, max_new_tokens=1)):
        with pytest.raises(ValueError, match="must be a torch tensor, not ndarray"):
            method(ids.numpy())
    for short in (ids[:, :1], ids[:0], ids[:, :0]):
        with pytest.raises(ValueError, match="a loss needs B ≥ 1 and T ≥ 2"):
            model(short, return_loss=True)


def test_a_state_of_another_model_is_refused() -> None:
    model, ids = build(), make_ids()
    _, deep = build(depth=3)(ids, return_state=True)
    _, other = build(layer_pattern="attention gate")(ids, return_state=True)
    with pytest.raises(ValueError, match="state has 3 layers, but the model has 2"):
        model(ids, deep)
    with pytest.raises(ValueError, match="must be a GateLoopState, not AttentionState"):
        model(ids, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"depth": True, "num_tokens": 8.0}, "whole numbers of at least 1, not num_tokens=8.0, depth=True"),
        ({"gate_loop_heads": "2"}, "not gate_loop_heads='2'"),
        ({"ff_mult": -1}, "ff_mult must be 0 or more, not -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"gate_loop_heads": 3}, "heads must divide"),
        ({"gate": "square"}, "gate must be one of"),
        ({"heads": 0}, "heads=0"),
        ({"dim_head": -1}, "dim_head=-1"),
        ({"use_gate_looped_attn": False, "gate_loop_heads": 0}, "gate_loop_heads=0"),
        ({"max_memory": 0}, "max_memory must be at least 1 step, not 0"),
        ({"max_memory": math.nan}, "max_memory must be at least 1 step, not nan"),
        ({"frac_gradient_state_transition": math.nan}, r"must be finite, not nan"),
        ({"frac_gradient_state_transition": -math.inf}, r"must be finite, not -inf"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
