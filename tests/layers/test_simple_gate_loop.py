"""What is special to SimpleGateLoopLayer: the original's cache, its scans, reverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_equal, values_and_gradients
from torch import Tensor, nn

from gateloop_transformer import SimpleGateLoopLayer
from gateloop_transformer.layers import simple_gate_loop
from gateloop_transformer.layers.state import SimpleGateLoopState

SCANS = [{}, {"use_heinsen": True}, {"use_jax_associative_scan": True}]


def build(**options: Any) -> SimpleGateLoopLayer:
    torch.manual_seed(0)
    return SimpleGateLoopLayer(6, **options).double()


def make_input(B: int = 2, T: int = 11) -> Tensor:
    return torch.randn(B, T, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(layer: SimpleGateLoopLayer, x: Tensor) -> Tensor:
    x = x / x.norm(dim=-1, keepdim=True) * 6**0.5 * layer.norm.gamma
    q, kv, a = layer.to_qkva[0](x).chunk(3, -1)
    h, ys = torch.zeros_like(kv[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.sigmoid(a[:, t]) * h + kv[:, t]
        ys.append(q[:, t] * h)
    return torch.stack(ys, 1)


@pytest.mark.parametrize("scan", SCANS, ids=str)
def test_every_scan_is_the_formula_by_hand_in_value_and_gradient(scan: dict[str, bool]) -> None:
    results = []
    for function in (lambda layer, x: layer(x), by_hand):
        layer, x = build(**scan), make_input().requires_grad_()
        y = function(layer, x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert_equal(*results)


@pytest.mark.parametrize("scan", SCANS, ids=str)
def test_reverse_is_flip(scan: dict[str, bool]) -> None:
    x = make_input()
    assert_equal([build(reverse=True, **scan)(x)], [build(**scan)(x.flip(1)).flip(1)])


def test_arguments_by_position_are_those_of_the_original() -> None:
    layer = SimpleGateLoopLayer(6, False, True, False, True, True)
    assert isinstance(layer.norm, nn.Identity)
    assert isinstance(layer.maybe_post_ln, nn.LayerNorm)
    assert (layer.use_heinsen, layer.use_jax, layer.reverse) == (True, False, True)
    y, cache = build()(make_input(), None, True)
    assert y.shape == (2, 11, 6)
    assert len(cache) == 2


@pytest.mark.parametrize("scan", SCANS, ids=str)
@pytest.mark.parametrize("sizes", [[11], [4, 7], [1] * 11, [0, 5, 0, 6]], ids=str)
def test_pieces_through_the_cache_are_the_whole(sizes: list[int], scan: dict[str, bool]) -> None:
    layer, x = build(**scan), make_input()
    cache, ys = None, []
    for piece in x.split(sizes, 1):
        y, cache = layer(piece, cache=cache, return_cache=True)
        ys.append(y)
    expected, (product, hidden) = layer(x, return_cache=True)
    assert_equal([torch.cat(ys, 1), *cache], [expected, product, hidden])


def test_the_cache_is_the_product_of_gates_and_the_state_batch_major() -> None:
    layer, x = build(), make_input()
    _, (product, hidden) = layer(x, return_cache=True)
    a = layer.to_qkva(layer.norm(x)).chunk(3, -1)[2]
    _, state = layer(x, return_state=True)
    assert product.shape == hidden.shape == (12, 1)
    assert_equal([product, hidden], [a.sigmoid().prod(1).reshape(12, 1), state.hidden.reshape(12, 1)])
    _, (again, _) = layer(x, cache=(product, hidden), return_cache=True)
    assert_equal([again], [product**2])


def test_the_first_item_of_a_cache_never_affects_the_output() -> None:
    layer, x = build(), make_input()
    h = torch.randn(12, 1, dtype=torch.float64)
    first, (_, hidden) = layer(x, cache=[torch.ones_like(h), h], return_cache=True)
    other, (_, again) = layer(x, cache=[torch.full_like(h, torch.nan), h], return_cache=True)
    assert torch.equal(first, other)
    assert torch.equal(hidden, again)


@pytest.mark.parametrize("scan", SCANS, ids=str)
def test_a_cache_built_by_hand_is_learnt(scan: dict[str, bool]) -> None:
    layer, x = build(**scan), make_input()

    def run(h: Tensor) -> Tensor:
        y: Tensor = layer(x, cache=[torch.ones_like(h), h])
        return y

    def by_state(h: Tensor) -> Tensor:
        y: Tensor = build()(x, state=SimpleGateLoopState(h.view(2, 6)))
        return y

    h = torch.randn(12, 1, dtype=torch.float64)
    results = values_and_gradients(run, [h])
    assert results[1].abs().min() > 1e-6
    assert_equal(results, values_and_gradients(by_state, [h]))


def test_a_state_in_the_place_of_the_cache_is_a_state() -> None:
    layer, x = build(), make_input()
    _, state = layer(x, return_state=True)
    assert torch.equal(layer(x, state), layer(x, state=state))


@pytest.mark.parametrize("use_heinsen", [False, True])
def test_a_stack_of_layers_decodes_through_a_list_of_caches(use_heinsen: bool) -> None:
    class Block(nn.Module):
        """As in downstream code: a list of layers, one cache each, residuals around."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(SimpleGateLoopLayer(dim=6, use_heinsen=use_heinsen) for _ in range(3))

        def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, list[Any]]:
            received = iter(cache or [])
            caches = []
            if x.shape[-2] == 0:
                return x, list(received)
            for layer in self.layers:
                out, new = layer(x, cache=next(received, None), return_cache=True)
                caches.append(new)
                x = out + x
            return x, caches

    block, x = Block().double(), make_input()
    whole, _ = block(x)
    y, caches = block(x[:, :4])
    ys = [y]
    for t in range(4, 11):
        empty, caches = block(x[:, :0], cache=caches)
        assert empty.shape == (2, 0, 6)
        y, caches = block(x[:, t : t + 1], cache=caches)
        ys.append(y)
    assert_equal([torch.cat(ys, 1)], [whole])


def test_bad_caches_are_named() -> None:
    layer, x = build(), make_input()
    h = torch.ones(12, 1, dtype=torch.float64)
    for cache in ([h], [h, h, h], [h, h.view(2, 6)], [h[1:], h], [h.view(-1), h.view(-1)]):
        with pytest.raises(ValueError, match=r"two tensors of shape \(B·dim, 1\) = \(12, 1\), not \["):
            layer(x, cache=cache)
    with pytest.raises(ValueError, match="either cache"):
        layer(x, cache=[h, h], state=SimpleGateLoopState(h.view(2, 6)))
    with pytest.raises(ValueError, match="either cache"):
        layer(x, return_cache=True, return_state=True)


def test_reverse_has_no_cache_to_return() -> None:
    with pytest.raises(ValueError, match="reverse=True has no cache"):
        build(reverse=True)(make_input(), return_cache=True)


def test_a_cache_knows_no_documents() -> None:
    resets = torch.zeros(make_input().shape[:2], dtype=torch.bool)
    with pytest.raises(ValueError, match="with resets use state and return_state, not a cache"):
        build()(make_input(), return_cache=True, resets=resets)


def test_two_scans_at_once_and_no_width_are_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        SimpleGateLoopLayer(6, use_heinsen=True, use_jax_associative_scan=True)
    with pytest.raises(ValueError, match="dim must be positive, not 0"):
        SimpleGateLoopLayer(0)


def test_a_missing_jax_is_an_import_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple_gate_loop, "installed", lambda: False)
    with pytest.raises(ImportError, match=r"pip install gateloop-transformer\[jax\]"):
        SimpleGateLoopLayer(6, use_jax_associative_scan=True)
    SimpleGateLoopLayer(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_jax_gives_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer, x = build(use_jax_associative_scan=True).to(dtype), make_input().to(dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert torch.allclose(y, build(backend="eager").to(dtype)(x), atol=0.05)
