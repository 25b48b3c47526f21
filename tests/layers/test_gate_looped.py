"""What is special to GateLoopedAttention; laws of all layers are in test_layers.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import assert_equal
from torch import Tensor, nn

from gateloop_transformer import GateLoopedAttention
from gateloop_transformer.layers.state import GateLoopState
from gateloop_transformer.ops import gate_loop, polar


def by_hand(layer: GateLoopedAttention, x: Tensor) -> Tensor:
    """The contract of the default layer, step by step, in complex numbers."""
    B, T, _ = x.shape
    H, d = layer.heads, layer.dim_head
    q, k, v = (part.view(B, T, H, d) for part in layer.to_qkv(x).chunk(3, -1))
    z = torch.view_as_complex(layer.to_a(x).view(B, T, H, 2))
    a = torch.sigmoid(z.abs()) * torch.exp(1j * z.angle())
    S = torch.zeros(B, H, d, d, dtype=a.dtype)
    ys = []
    for t in range(T):
        S = a[:, t, :, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        ys.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S.real).flatten(1))
    y: Tensor = layer.to_out(torch.stack(ys, 1) * nn.functional.silu(layer.to_gates[0](x)))
    return y


@pytest.mark.parametrize("heads", [1, 4, None])
def test_is_the_paper_by_hand(heads: int | None) -> None:
    layer = GateLoopedAttention(8, heads=heads).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_equal([layer(x)], [by_hand(layer, x)])


def test_the_gradient_into_the_gate_projection_is_scaled() -> None:
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    gradients = []
    for fraction in (1.0, 0.25):
        torch.manual_seed(1)
        layer = GateLoopedAttention(6, heads=2, frac_gradient_state_transition=fraction).double()
        layer(x).sum().backward()
        gradients.append([layer.to_a[0].weight.grad, layer.to_a[0].bias.grad, layer.to_qkv.weight.grad])
    (weight, bias, other), quarter = gradients
    assert_equal(quarter, [weight / 4, bias / 4, other])


@pytest.mark.parametrize("gate", ["polar", "paper", "ring"])
def test_ablations_make_gates_real_and_one(gate: str) -> None:
    layer = GateLoopedAttention(6, heads=2, gate=gate).double()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    real, one = layer(x, ablate_complex=True), layer(x, ablate_state_transition=True)
    with torch.no_grad():
        layer.to_a[0].weight[1::2] = 0
        if gate == "ring":
            layer.ring_phase.zero_()
        else:
            layer.to_a[0].bias[1::2] = 0
    assert_equal([real], [layer(x)])
    with torch.no_grad():
        layer.to_a[0].weight.zero_()
        if gate != "ring":
            layer.to_a[0].bias[0::2] = 40
    if gate != "ring":
        assert_equal([one], [layer(x)])


@pytest.mark.parametrize("arguments", [(True,), (True, False), (False, True), (True, True)])
def test_flags_by_position_are_those_by_name(arguments: tuple[bool, ...]) -> None:
    layer, x = GateLoopedAttention(6, heads=2), torch.randn(1, 5, 6)
    names = dict(zip(("ablate_complex", "ablate_state_transition"), arguments, strict=False))
    assert torch.equal(layer(x, *arguments), layer(x, **names))
    assert not torch.equal(layer(x, *arguments), layer(x))


def test_all_projections_zero_give_no_nan() -> None:
    layer = GateLoopedAttention(6)
    nn.init.zeros_(layer.to_a[0].weight)
    nn.init.zeros_(layer.to_a[0].bias)
    layer(torch.randn(1, 5, 6)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_the_state_is_that_of_the_formula() -> None:
    layer = GateLoopedAttention(6, heads=2).double()
    x = torch.randn(1, 1, 6, dtype=torch.float64)
    before = torch.randn(1, 2, 3, 3, dtype=torch.complex128)
    _, after = layer(x, GateLoopState(before.real, before.imag, x[:, :0]), return_state=True)
    k, v = (part.view(2, 3) for part in layer.to_qkv(x).chunk(3, -1)[1:])
    a = torch.complex(*polar(*layer.to_a(x).view(2, 2).unbind(-1)))
    expected = a[:, None, None] * before[0] + k[:, :, None] * v[:, None, :]
    assert_equal([torch.complex(after.real, after.imaginary)[0]], [expected])


def test_a_convolution_starts_as_the_identity_and_sees_only_its_taps() -> None:
    layer = GateLoopedAttention(6, heads=2, conv_size=3).double()
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    past = x.new_zeros(1, 2, 6)
    with torch.no_grad():
        assert torch.allclose(layer.conv(x, past)[0], x, atol=0.3)
        layer.conv.weight.copy_(torch.randn_like(layer.conv.weight))
        expected = nn.functional.conv1d(nn.functional.pad(x.mT, (2, 0)), layer.conv.weight, groups=6).mT
        y, taps = layer.conv(x, past)
    assert_equal([y, taps], [expected, x[:, -2:]])


def test_ring_starts_with_long_memories_and_phases_free_of_the_data() -> None:
    layer = GateLoopedAttention(64, gate="ring", max_memory=500)
    memories = 1 / (1 - torch.sigmoid(layer.ring_logit))
    assert memories.max() > 400
    assert not layer.to_a[0].weight[1::2].any()


def test_paper_gates_with_a_spread_start_are_ring_gates_without_the_input_scale() -> None:
    torch.manual_seed(0)
    ring = GateLoopedAttention(6, heads=3, gate="ring", max_memory=50)
    torch.manual_seed(0)
    paper = GateLoopedAttention(6, heads=3, gate="paper", max_memory=50, spread_start=True)
    with torch.no_grad():
        paper.to_a[0].weight.copy_(ring.to_a[0].weight)
        paper.to_a[0].bias.copy_(torch.stack([ring.ring_logit, ring.ring_phase], -1).flatten())
    assert 20 < (1 / (1 - torch.sigmoid(paper.to_a[0].bias[0::2]))).max() < 50
    x, k = torch.randn(2, 5, 6), torch.ones(2, 5, 3, 2)
    (re, im, unscaled), (re_ring, im_ring, scaled) = paper._gates(x, k, False, False), ring._gates(x, k, False, False)
    assert_equal([re, im], [re_ring, im_ring])
    assert torch.equal(unscaled, k)
    assert (scaled < 1).all()


def test_memories_start_within_a_range_and_phases_follow_the_data_where_asked() -> None:
    layer = GateLoopedAttention(64, heads=32, gate="ring", min_memory=100, max_memory=10000, phase_spread=0.5)
    memories = 1 / torch.sigmoid(-layer.ring_logit.double())
    ratios = memories[1:] / memories[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 100 ** (1 / 32)), rtol=1e-2, atol=0)
    assert 100 < memories[0] < 110 < 9000 < memories[-1] < 10000
    phases = (torch.randn(1000, 64) @ layer.to_a[0].weight[1::2].T).detach()
    assert 0.4 < phases.std() < 0.6
    fixed = GateLoopedAttention(64, gate="ring", fixed_gates=True, min_memory=1e4, max_memory=1e5, phase_spread=0.5)
    assert 0.35 < fixed.ring_phase.std() < 0.65


def test_biases_start_a_layer_as_a_gated_sum_of_values() -> None:
    layer = GateLoopedAttention(6, heads=3, qkv_bias=True, add_swish_gating=False, dim_inner=6).double()
    assert layer.to_qkv.bias.tolist() == [1.0] * 12 + [0.0] * 6
    with torch.no_grad():
        layer.to_qkv.weight[:12] = 0
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    ones = torch.ones(1, 5, 3, 2, dtype=torch.float64)
    v = (x @ layer.to_qkv.weight[12:].T).unflatten(-1, (3, 2))
    y, _ = gate_loop(ones, ones, v, layer.gates(x), backend="eager")
    assert_equal([layer(x)], [y.flatten(-2)], 1e-12)


def test_a_convolution_with_silu_starts_at_random_and_streams() -> None:
    layer = GateLoopedAttention(6, heads=3, conv_size=3, conv_silu=True).double()
    plain = GateLoopedAttention(6, heads=3, conv_size=3).double()
    assert layer.conv.weight[..., -1].abs().max() < 0.6
    assert layer.conv.weight[..., 0].abs().max() > 0.1
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    past = torch.zeros(2, 2, 6, dtype=torch.float64)
    assert_equal([layer.conv(x, past)[0]], [nn.functional.silu(plain.conv(x, past)[0])], 1e-12)
    first, state = layer(x[:, :4], return_state=True)
    assert_equal([torch.cat([first, layer(x[:, 4:], state)], 1)], [layer(x)], 1e-12)


@pytest.mark.parametrize(("gate", "heads"), [("ring", 24), ("paper", 6), ("polar", 24)])
def test_gates_of_a_rank_are_those_of_the_product_of_their_projections(gate: str, heads: int) -> None:
    layer = GateLoopedAttention(24, heads=heads, gate=gate, gate_rank=3, conv_size=2).double()
    whole = GateLoopedAttention(24, heads=heads, gate=gate, conv_size=2).double()
    weights = layer.state_dict()
    second, first = weights.pop("to_a.1.weight"), weights.pop("to_a.0.weight")
    assert (first.shape, second.shape) == ((3, 24), (2 * heads, 3))
    bias = {"to_a.0.bias": weights.pop("to_a.1.bias")} if gate != "ring" else {}
    whole.load_state_dict({**weights, **bias, "to_a.0.weight": second @ first})
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    assert_equal([layer(x)], [whole(x)], 1e-12)
    layer(x).square().sum().backward()
    assert {id(p) for p in layer.to_a.parameters()} <= {id(p) for p in layer.gate_parameters()}
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_gates_of_a_rank_start_as_gates_of_full_rank_do() -> None:
    x = torch.randn(4096, 256)
    for options in ({}, {"gate_rank": 8}):
        layer = GateLoopedAttention(256, gate="ring", phase_spread=0.5, **options)
        z = layer.to_a(x).detach()
        assert 0.4 < z[:, 0::2].std() < 0.75
        assert 0.35 < z[:, 1::2].std() < 0.65


def test_without_a_spread_start_ring_gates_forget_within_two_steps() -> None:
    layer = GateLoopedAttention(64, gate="ring", spread_start=False)
    assert not layer.ring_logit.any()
    assert layer.to_a[0].weight[1::2].any()


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_fixed_gates_are_those_of_a_time_invariant_recurrence(heads: int) -> None:
    layer = GateLoopedAttention(
        6, heads=heads, gate="ring", fixed_gates=True, add_swish_gating=False, dim_inner=6, max_memory=20
    ).double()
    K = 6 // heads
    a = torch.polar(torch.sigmoid(layer.ring_logit), layer.ring_phase)
    scale = torch.sqrt(1 - a.abs() ** 2)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (heads, K)) for part in layer.to_qkv(x).chunk(3, -1))
    state, expected = torch.zeros(2, heads, K, K, dtype=torch.complex128), []
    for t in range(7):
        state = a[:, None, None] * state + torch.einsum("bhk,bhv->bhkv", scale[:, None] * k[:, t], v[:, t])
        expected.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.real).flatten(1))
    assert_equal([layer(x)], [torch.stack(expected, 1)], 1e-10)
    layer(x).sum().backward()
    assert {id(p) for p in layer.gate_parameters()} == {id(layer.ring_logit), id(layer.ring_phase)}
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 6, "heads": 4}, r"heads must divide dim_inner.*heads=4, dim_inner=6"),
        ({"dim": 6, "heads": 0}, "must be positive"),
        ({"dim": 0}, "must be positive"),
        ({"dim": 6, "gate": "round"}, "gate must be one of polar, paper, ring, not 'round'"),
        ({"dim": 6, "conv_size": -1}, "conv_size"),
        ({"dim": 6, "head_norm": True}, "heads of size 1"),
        ({"dim": 6, "qk_norm": True}, "heads of size 1"),
        ({"dim": 6, "gate": "ring", "max_memory": 1}, "above 1 step"),
        (
            {"dim": 6, "gate": "ring", "min_memory": 9, "max_memory": 9},
            "below max_memory=9, not 9",
        ),
        ({"dim": 6, "gate": "ring", "min_memory": 0}, "min_memory must be at least 1 step"),
        ({"dim": 6, "gate": "ring", "phase_spread": -1}, "phase_spread must be finite, 0 or more"),
        ({"dim": 6, "max_memory": 0}, "max_memory must be at least 1 step, not 0"),
        ({"dim": 6, "conv_silu": True}, "conv_silu needs a convolution"),
        ({"dim": 6, "spread_start": True}, "spread_start needs gate 'ring' or 'paper'"),
        ({"dim": 6, "gate": "paper", "fixed_gates": True}, "fixed_gates needs gate 'ring', not 'paper'"),
        ({"dim": 6, "gate": "ring", "fixed_gates": True, "spread_start": False}, "fixed_gates need a spread start"),
        ({"dim": 6, "gate_rank": 0}, "sizes must be whole numbers of at least 1, not gate_rank=0"),
        ({"dim": 6, "gate_rank": 2.5}, "sizes must be whole numbers of at least 1, not gate_rank=2.5"),
        ({"dim": 6, "gate": "ring", "fixed_gates": True, "gate_rank": 2}, "do not depend on the data"),
        ({"dim": 6, "frac_gradient_state_transition": math.inf}, r"frac_gradient_state_transition must be finite"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateLoopedAttention(**options)
