"""The original's modules under their names: they hold this package's, with the original's shapes and numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import assert_equal, make_gates, values_and_gradients
from torch import Tensor, nn

import gateloop_transformer
from gateloop_transformer import associative_scan as scans
from gateloop_transformer import gateloop_transformer as original
from gateloop_transformer import simplified_gate_loop as simple
from gateloop_transformer.ops import heinsen_scan, linear_scan

PARITY = Path(__file__).parent / "recorded" / "parity"


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_modules_are_attributes_and_hold_the_classes_of_the_package() -> None:
    assert gateloop_transformer.gateloop_transformer is original
    assert gateloop_transformer.simplified_gate_loop is simple
    assert gateloop_transformer.associative_scan is scans
    for name in ("Transformer", "GateLoopedAttention", "CausalFullAttention"):
        assert getattr(original, name) is getattr(gateloop_transformer, name)
    assert simple.SimpleGateLoopLayer is gateloop_transformer.SimpleGateLoopLayer
    assert {"gateloop_transformer", "simplified_gate_loop", "associative_scan"} <= set(dir(gateloop_transformer))


def test_sequential_leaves_out_what_is_none() -> None:
    one = nn.SiLU()
    assert type(original.Sequential(None)) is nn.Identity
    assert original.Sequential(None, one) is one
    assert [type(child) for child in original.Sequential(one, None, nn.Tanh()).children()] == [nn.SiLU, nn.Tanh]


@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
@pytest.mark.parametrize("gates", [(1, 1), (3, 1), (1, 5), (3, 5)], ids=["head", "keys", "values", "both"])
def test_the_operator_is_the_formula_for_gates_of_any_kind(gates: tuple[int, int], real: bool) -> None:
    q, k, v = normal(2, 9, 3), normal(2, 9, 3), normal(2, 9, 5)
    a = make_gates(2, 9, *gates, is_complex=not real)

    def formula(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        state, y = torch.zeros(2, 3, 5, dtype=a.dtype), []
        for t in range(9):
            state = a[:, t] * state + k[:, t, :, None] * v[:, t, None]
            y.append((q[:, t, :, None] * (state if real else state.real)).sum(1))
        return torch.stack(y, 1)

    results = values_and_gradients(original.gate_loop_operator, [q, k, v, a])
    assert_equal(results, values_and_gradients(formula, [q, k, v, a]))


def test_the_operator_gives_recorded_numbers() -> None:
    arrays = np.load(PARITY / "op_gate_loop_n33.npz")
    y = original.gate_loop_operator(*(torch.from_numpy(arrays[f"in:{name}"]) for name in "qkva"))
    assert (y - torch.from_numpy(arrays["out:y"])).abs().max() <= 2e-4 * np.abs(arrays["out:y"]).max()


def test_gates_of_another_shape_are_refused() -> None:
    x = normal(2, 4, 3)
    for shape in ((2, 4, 1), (2, 4, 2, 1), (2, 3, 1, 1)):
        with pytest.raises(ValueError, match="a must have shape"):
            original.gate_loop_operator(x, x, x, normal(*shape))


@pytest.mark.parametrize("cached", [False, True], ids=["start", "cached"])
@pytest.mark.parametrize("heinsen", [False, True], ids=["plain", "heinsen"])
def test_the_simple_operator_and_its_cache(heinsen: bool, cached: bool) -> None:
    q, kv, a = normal(3, 7, 2), normal(3, 7, 2), torch.rand(3, 7, 2, dtype=torch.float64)
    cache = (torch.rand(3, 2, dtype=torch.float64), normal(3, 2)) if cached else ()

    def formula(q: Tensor, kv: Tensor, a: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        states = linear_scan(a, kv, cache[1] if cache else None, backend="eager")
        return q * states, a.prod(1) * cache[0] if cache else a.prod(1), states[:, -1]

    def operator(q: Tensor, kv: Tensor, a: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        y, after = simple.gate_loop_operator(q, kv, a, cache or None, heinsen)
        return y, *after

    inputs = [q, kv, a, *cache]
    assert_equal(values_and_gradients(operator, inputs), values_and_gradients(formula, inputs))


def test_pieces_through_the_cache_are_the_whole() -> None:
    q, kv, a = normal(3, 7, 2), normal(3, 7, 2), torch.rand(3, 7, 2, dtype=torch.float64)
    whole, last = simple.gate_loop_operator(q, kv, a)
    first, cache = simple.gate_loop_operator(q[:, :3], kv[:, :3], a[:, :3])
    rest, cache = simple.gate_loop_operator(q[:, 3:], kv[:, 3:], a[:, 3:], cache)
    assert_equal([torch.cat([first, rest], 1), *cache], [whole, *last])


def test_jax_computes_the_simple_operator() -> None:
    q, kv, a, start = normal(2, 5, 3), normal(2, 5, 3), torch.rand(2, 5, 3, dtype=torch.float64), normal(2, 3)

    def run(operator: object) -> list[Tensor]:
        assert callable(operator)
        return values_and_gradients(lambda *x: operator(*x[:3], cache=(torch.ones_like(x[3]), x[3])), [q, kv, a, start])

    assert_equal(run(simple.get_jax_gate_loop_operator()), run(simple.gate_loop_operator))


def test_without_jax_its_operator_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple, "installed", lambda: False)
    with pytest.raises(ImportError, match=r"pip install gateloop-transformer\[jax\]"):
        simple.get_jax_gate_loop_operator()


def test_scans_of_the_original_agree() -> None:
    a, kv = torch.rand(2, 9, 3, dtype=torch.float64), normal(2, 9, 3)
    states = linear_scan(a, kv)
    assert_equal(scans.associative_scan(simple.binary_operator, (a, kv)), [a.cumprod(1), states])
    assert_equal(simple.heinsen_associative_scan(a, kv), [a.cumprod(1), states])
    least = a.clamp(min=0.5)
    assert_equal(simple.heinsen_associative_scan(a, kv, eps=0.5), [least.cumprod(1), heinsen_scan(least, kv)])
    deep = normal(2, 9, 3, 2)
    many = simple.heinsen_associative_scan(a.unsqueeze(-1), deep)[1]
    assert_equal([many], [torch.stack([linear_scan(a, deep[..., n]) for n in range(2)], -1)])


def test_small_numbers_move_off_zero() -> None:
    t = torch.tensor([-1e-30, 0.0, 1e-30, -2.0])
    assert simple.abs_clamp_eps(t).tolist() == [t.new_tensor(x).item() for x in (-1e-20, 0.0, 1e-20, -2.0)]
    assert simple.abs_clamp_eps(t, 3.0).tolist() == [-3.0, 0.0, 3.0, -3.0]
    assert simple.abs_clamp_eps(t.half()[3:]).item() == -2.0


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
def test_padding_stands_around_its_dimension(dim: int) -> None:
    t = normal(2, 3, 4)
    padded = scans.pad_at_dim(t, (2, 1), dim, 7.0)
    assert padded.shape[dim] == t.shape[dim] + 3
    assert_equal([padded.narrow(dim, 2, t.shape[dim])], [t])
    assert (padded == 7).sum() == 3 * t.numel() // t.shape[dim]


def test_heads_are_split_and_merged_as_in_the_original() -> None:
    layer, x = original.GateLoopedAttention(6, heads=2, dim_inner=8), normal(3, 5, 8)
    rows = layer.split_heads(x)
    assert_equal([rows[1]], [x[0, :, 4:]])
    assert_equal([layer.merge_heads(rows)], [x])
    channels = normal(6, 5, 1)
    assert_equal([simple.SimpleGateLoopLayer(2).split_heads(channels)[0, :, 1:]], [channels[1]])


@pytest.mark.parametrize("options", [{}, {"use_heinsen": True}, {"use_jax_associative_scan": True}], ids=str)
def test_a_simple_layer_is_its_gate_loop_function(options: dict[str, bool]) -> None:
    layer, x = simple.SimpleGateLoopLayer(3, **options).double(), normal(2, 6, 3)
    q, kv, a = (part.transpose(1, 2).reshape(6, 6, 1) for part in layer.to_qkva(layer.norm(x)).chunk(3, -1))
    y, (product, last) = layer.gate_loop_fn(q, kv, a.sigmoid())
    expected, cache = layer(x, return_cache=True)
    assert_equal([layer.split_heads(y), product, last], [expected, *cache])
