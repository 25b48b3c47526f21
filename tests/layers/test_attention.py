"""What is special to CausalFullAttention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import assert_equal, values_and_gradients
from torch import Tensor, nn

from gateloop_transformer import CausalFullAttention
from gateloop_transformer.layers.attention import RotaryEmbedding
from gateloop_transformer.layers.state import AttentionState
from gateloop_transformer.ops import gate_loop, polar


def build(**options: Any) -> CausalFullAttention:
    torch.manual_seed(0)
    return CausalFullAttention(8, dim_head=4, heads=2, **options).double()


def make_input(B: int = 2, T: int = 9) -> Tensor:
    return torch.randn(B, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def heads(x: Tensor) -> Tensor:
    """(B, T, heads·dim_head) → (B, T, heads, dim_head)."""
    return x.unflatten(-1, (2, 4))


def gates_over_time(layer: CausalFullAttention, x: Tensor) -> Tensor:
    z = layer.to_a(x).unflatten(-1, (2, 2, 2))
    return torch.complex(*polar(*z.unbind(-1))).repeat_interleave(2, -1)


def test_softmax_attention_by_hand() -> None:
    layer, x = build(add_swish_gating=True), make_input()
    q, k, v = (heads(part) for part in layer.to_qkv(x).chunk(3, -1))
    scores = torch.einsum("bihc,bjhc->bhij", q, k) * 4**-0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    y = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v).flatten(2)
    assert_equal([layer(x)], [layer.to_out(y * nn.functional.silu(layer.to_gates[0](x)))])


def test_gate_loop_without_softmax_is_the_gate_loop_with_a_gate_per_channel() -> None:
    layer = build(data_dependent_rel_pos="gate_loop", frac_gradient_data_dependent_rel_pos=1)

    def operator(x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in layer.to_qkv(x).chunk(3, -1))
        y, _ = gate_loop(q * 4**-0.5, k, v, gates_over_time(layer, x), backend="eager")
        out: Tensor = layer.to_out(y.flatten(2))
        return out

    assert_equal(*(values_and_gradients(function, [make_input()]) for function in (layer, operator)))


def test_gate_loop_with_softmax_weighs_by_its_scores() -> None:
    layer, x = build(data_dependent_rel_pos="gate_loop", softmax_normalize=True), make_input()
    q, k, v = (heads(part) for part in layer.to_qkv(x).chunk(3, -1))
    a = gates_over_time(layer, x)
    y = torch.zeros_like(v)
    for i in range(9):
        scores = torch.stack(
            [(q[:, i] * k[:, j] * a[:, j + 1 : i + 1].prod(1)).real.sum(-1) * 4**-0.5 for j in range(i + 1)], -1
        )
        y[:, i] = torch.einsum("bhj,bjhc->bhc", scores.softmax(-1), v[:, : i + 1])
    assert_equal([layer(x)], [layer.to_out(y.flatten(2))])


@pytest.mark.parametrize("softmax", [False, True])
def test_gate_loop_with_gates_of_one_is_plain_attention(softmax: bool) -> None:
    gated = build(data_dependent_rel_pos="gate_loop", softmax_normalize=softmax)
    plain = build(softmax_normalize=softmax)
    plain.load_state_dict(gated.state_dict(), strict=False)
    x = make_input()
    assert_equal([gated(x, ablate_state_transition=True)], [plain(x)])
    assert (gated(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [True, "gate_loop"])
def test_real_gates_are_those_of_a_real_projection(kind: bool | str) -> None:
    layer, x = build(data_dependent_rel_pos=kind), make_input()
    real = layer(x, ablate_complex=True)
    with torch.no_grad():
        layer.to_a[0].weight[1::2] = 0
    assert_equal([real], [layer(x)])


def test_the_gradient_into_the_position_projection_is_scaled() -> None:
    gradients = []
    for fraction in (1.0, 0.25):
        layer = build(data_dependent_rel_pos="gate_loop", frac_gradient_data_dependent_rel_pos=fraction)
        layer(make_input()).sum().backward()
        gradients.append([layer.to_a[0].weight.grad, layer.to_qkv[0].weight.grad])
    (gate, other), scaled = gradients
    assert_equal(scaled, [gate / 4, other])


@pytest.mark.parametrize("kind", [False, True, "gate_loop"])
@pytest.mark.parametrize("arguments", [(True,), (True, False), (False, True), (True, True)])
def test_flags_by_position_are_those_by_name(arguments: tuple[bool, ...], kind: bool | str) -> None:
    layer, x = build(data_dependent_rel_pos=kind), make_input()
    names = dict(zip(("ablate_complex", "ablate_state_transition"), arguments, strict=False))
    assert torch.equal(layer(x, *arguments), layer(x, **names))


def test_softmax_is_the_default_unless_the_position_depends_on_data() -> None:
    assert build().softmax_normalize
    assert not build(data_dependent_rel_pos=True).softmax_normalize
    assert not build(data_dependent_rel_pos="gate_loop").softmax_normalize
    assert build(data_dependent_rel_pos=True, softmax_normalize=True).softmax_normalize


def test_rotary_positions_are_relative_and_keep_lengths() -> None:
    rotary = RotaryEmbedding(4).double()
    x, steps = torch.randn(1, 1, 9, 4, dtype=torch.float64), torch.arange(9)
    assert_equal([rotary(x, steps).norm(dim=-1)], [x.norm(dim=-1)])
    scores = [rotary(x, steps + start) @ rotary(x, steps + start).mT for start in (0, 5)]
    assert_equal([scores[0]], [scores[1]])
    assert_equal([rotary(x, steps)[:, :, :1]], [x[:, :, :1]])
    assert rotary.freqs.tolist() == pytest.approx([1.0, 0.01])
    assert not rotary.freqs.requires_grad


def test_states_hold_all_keys_and_values() -> None:
    _, plain = build()(make_input(), return_state=True)
    _, gated = build(data_dependent_rel_pos="gate_loop")(make_input(), return_state=True)
    assert [x.shape[2] for x in plain[:3]] == [9, 0, 9]
    assert [x.shape[2] for x in gated[:3]] == [9, 9, 9]


def test_a_state_of_unequal_lengths_is_refused() -> None:
    for kind in (False, "gate_loop"):
        layer = build(data_dependent_rel_pos=kind)
        _, state = layer(make_input(), return_state=True)
        keys, imaginary, values, seen = state
        for wrong in (
            AttentionState(keys, imaginary, values[:, :, 1:], seen),
            AttentionState(keys, values[:, :, 2:], values, seen),
        ):
            with pytest.raises(ValueError, match=r"must hold 9, . and 9 steps, not 9, "):
                layer(make_input(), wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "must be positive"),
        ({"dim": 8, "heads": 0}, "must be positive"),
        ({"dim": 8, "dim_head": 3, "rotary_emb": True}, "even head size, not 3"),
        ({"dim": 8, "dim_head": 3, "data_dependent_rel_pos": True}, "even dim_head, not 3"),
        ({"dim": 8, "data_dependent_rel_pos": "time"}, "must be False, True or 'gate_loop', not 'time'"),
        ({"dim": 8, "dim_head": 1, "qk_norm": True}, "heads of size 1"),
        ({"dim": 8, "frac_gradient_data_dependent_rel_pos": math.inf}, r"rel_pos must be finite, not inf"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalFullAttention(**options)


@pytest.mark.parametrize("softmax", [True, False])
def test_released_positions_stay_finite_in_half_precision(softmax: bool) -> None:
    layer = CausalFullAttention(32, dim_head=16, heads=2, data_dependent_rel_pos=True, softmax_normalize=softmax)
    x = torch.randn(2, 20, 32)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert layer(x).isfinite().all() or not softmax
    y = layer.half()(x.half())
    assert y.dtype == torch.float16
    if softmax:
        y.float().sum().backward()
        assert y.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
