"""Resets, packed documents and padding in layers and the model; windows and running backwards with states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_equal, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS
from torch import Tensor, nn

from gateloop_transformer import CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, Transformer

DIM = 16
LENGTHS = [0, 5, 1, 33, 0, 18, 7, 2, 40]
EDGES = [0, *itertools.accumulate(LENGTHS)]
BOUNDS = torch.tensor(EDGES)
PAIRS = list(itertools.pairwise(EDGES))
T, N = EDGES[-1], len(LENGTHS)


def attention(**options: Any) -> nn.Module:
    return CausalFullAttention(DIM, dim_head=8, heads=2, **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "heads": lambda: GateLoopedAttention(DIM, heads=4, gate="ring", conv_size=4, head_norm=True, qk_norm=True),
    "channels": lambda: GateLoopedAttention(DIM),
    "convolved channels": lambda: GateLoopedAttention(DIM, gate="ring", conv_size=3),
    "one tap": lambda: GateLoopedAttention(DIM, heads=4, gate="paper", conv_size=1),
    "backwards": lambda: GateLoopedAttention(DIM, heads=4, gate="ring", conv_size=4, reverse=True),
    "channels backwards": lambda: GateLoopedAttention(DIM, reverse=True),
    "simple": lambda: SimpleGateLoopLayer(DIM),
    "simple backwards": lambda: SimpleGateLoopLayer(DIM, reverse=True),
    "heinsen": lambda: SimpleGateLoopLayer(DIM, use_heinsen=True),
    "heinsen backwards": lambda: SimpleGateLoopLayer(DIM, use_heinsen=True, reverse=True),
    "attention": lambda: attention(rotary_emb=True),
    "window": lambda: attention(rotary_emb=True, window=5),
    "window of one": lambda: attention(window=1),
    "gated attention": lambda: attention(data_dependent_rel_pos="gate_loop", rotary_emb=True),
    "gated window": lambda: attention(data_dependent_rel_pos="gate_loop", window=4, softmax_normalize=True),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def warm(layer: nn.Module, rows: int) -> Any:
    """A state that is not empty."""
    _, state = layer(normal(rows, 7, DIM, seed=9), return_state=True)
    return state.detach()


def goes_on(layer: nn.Module, state: Any) -> Tensor:
    """What comes out after a state: two states that agree here are equal to the layer."""
    return layer(normal(state.batch_size, 6, DIM, seed=5), state=state)


def test_documents_give_what_they_give_alone(layer: nn.Module) -> None:
    x, state = normal(1, T, DIM).requires_grad_(), warm(layer, N)
    y, final = layer(x, state=state, cu_seqlens=BOUNDS, return_state=True)
    parts = [layer(x[:, a:b], state=state.select([n]), return_state=True) for n, (a, b) in enumerate(PAIRS)]
    expected = torch.cat([part for part, _ in parts], 1)
    weights = normal(*y.shape, seed=2)
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad((y * weights).sum(), parameters, retain_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, retain_graph=True, materialize_grads=True)
    following = normal(N, 6, DIM, seed=5)
    after = torch.cat([layer(following[n : n + 1], state=last) for n, (_, last) in enumerate(parts)])
    assert_equal([y, goes_on(layer, final), *gradients], [expected, after, *wanted])
    (through,) = torch.autograd.grad(goes_on(layer, final).square().sum(), x)
    (straight,) = torch.autograd.grad(after.square().sum(), x)
    assert_equal([through], [straight])


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_might_as_well_not_be_there(layer: nn.Module, side: str) -> None:
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, length in enumerate((4, 9, 0, 6)):
        places = {
            "left": range(9 - length, 9),
            "right": range(length),
            "anywhere": (8, 1, 3, 0, 5, 6, 2, 4, 7)[:length],
        }
        mask[row, list(places[side])] = True
    state = warm(layer, 4)
    x = normal(4, 9, DIM)
    y, final = layer(x, state=state, mask=mask, return_state=True)
    assert (y[~mask] == 0).all()
    for row in range(4):
        alone, last = layer(x[row : row + 1, mask[row]], state=state.select([row]), return_state=True)
        assert_equal([y[row, mask[row]]], [alone[0]])
        assert_equal([goes_on(layer, final.select([row]))], [goes_on(layer, last)])


def test_a_reset_begins_anew(layer: nn.Module) -> None:
    backwards = getattr(layer, "reverse", False)
    resets = torch.rand(2, 25, generator=torch.Generator().manual_seed(4)) < 0.2
    resets[0, 0] = resets[0, -1] = True
    x, state = normal(2, 25, DIM), warm(layer, 2)
    y, final = layer(x, state=state, resets=resets, return_state=True)
    for row in range(2):
        marks = resets[row].nonzero().flatten() + backwards
        edges = sorted({0, 25, *marks.tolist()})
        for a, b in itertools.pairwise(edges):
            first = (b == 25 and not resets[row, -1]) if backwards else (a == 0 and not resets[row, 0])
            start = state.select([row]) if first else None
            piece, last = layer(x[row : row + 1, a:b], state=start, return_state=True)
            assert_equal([y[row : row + 1, a:b]], [piece])
            if a == 0 if backwards else b == 25:
                assert_equal([goes_on(layer, final.select([row]))], [goes_on(layer, last)])


def test_documents_may_have_resets(layer: nn.Module) -> None:
    resets = torch.rand(1, T, generator=torch.Generator().manual_seed(4)) < 0.2
    x, state = normal(1, T, DIM), warm(layer, N)
    y = layer(x, state=state, cu_seqlens=BOUNDS, resets=resets)
    parts = [layer(x[:, a:b], state=state.select([n]), resets=resets[:, a:b]) for n, (a, b) in enumerate(PAIRS)]
    assert_equal([y], [torch.cat(parts, 1)])


def test_pieces_of_any_length_equal_the_whole(layer: nn.Module) -> None:
    x = normal(2, 40, DIM)
    whole, end = layer(x, return_state=True)
    order = -1 if getattr(layer, "reverse", False) else 1
    state, parts = None, []
    for piece in x.split([3, 0, 1, 20, 1, 15][::order], 1)[::order]:
        y, state = layer(piece, state=state, return_state=True)
        parts.append(y)
    assert_equal([torch.cat(parts[::order], 1), goes_on(layer, state)], [whole, goes_on(layer, end)])


@pytest.mark.parametrize("name", ["heads", "channels", "simple", "heinsen"])
def test_backwards_is_forwards_in_flipped_time(name: str) -> None:
    layer = LAYERS[name]().double()
    x, state = normal(2, 20, DIM), warm(layer, 2)
    y, final = layer(x, state=state, return_state=True)
    layer.reverse = True
    z, last = layer(x.flip(1), state=state, return_state=True)
    assert_equal([z.flip(1), *last], [y, *final])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(2, 5)}, r"mask must be booleans of shape \(B, T\) = \(2, 5\), not torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be booleans of shape"),
        (
            {"mask": torch.ones(2, 5, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 5])},
            "give either a mask or cu_seqlens",
        ),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"packed in one row, not in B = 2"),
        ({"resets": torch.ones(2, 4, dtype=torch.bool)}, "resets must be booleans of shape"),
        (
            {"resets": torch.ones(2, 4, dtype=torch.bool), "mask": torch.ones(2, 5, dtype=torch.bool)},
            "resets must be booleans of shape",
        ),
        ({"resets": [True] * 5, "mask": torch.ones(2, 5, dtype=torch.bool)}, "resets must be a torch tensor, not list"),
    ],
)
def test_wrong_marks_are_refused(layer: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: .*{message}"):
        layer(normal(2, 5, DIM), **options)


def test_a_window_looks_no_further_and_keeps_no_more() -> None:
    torch.manual_seed(0)
    layer = attention(window=4, rotary_emb=True).double()
    x = normal(1, 30, DIM)
    y, state = layer(x, return_state=True)
    assert state.keys.shape[2] == 3
    for t in (3, 11, 29):
        assert_equal([y[:, t]], [layer(x[:, t - 3 : t + 1])[:, -1]], 1e-9)
    full = attention(rotary_emb=True).double()
    full.load_state_dict(layer.state_dict())
    assert_equal([layer(x[:, :4])], [full(x[:, :4])])
    with pytest.raises(ValueError, match="window must be at least 1 step, not 0"):
        attention(window=0)


@pytest.fixture(params=["polar", "window conv", "rotary after"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    return Transformer(DIM, num_tokens=11, depth=2, dim_head=8, **MODELS[request.param]).double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


def test_model_reads_documents_as_if_alone(model: Transformer) -> None:
    ids = tokens(1, T)
    y, state = model(ids, cu_seqlens=BOUNDS, return_state=True)
    parts = [model(ids[:, a:b], return_state=True) for a, b in PAIRS]
    assert_equal([y], [torch.cat([part for part, _ in parts], 1)])
    following = tokens(N, 3)
    after = torch.cat([model(following[n : n + 1], state=last) for n, (_, last) in enumerate(parts)])
    assert_equal([model(following, state=state)], [after])


def test_no_document_is_asked_for_the_start_of_the_next(model: Transformer) -> None:
    ids = tokens(1, T)
    losses = [(b - a - 1, model(ids[:, a:b], return_loss=True)) for a, b in PAIRS if b - a > 1]
    expected = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
    assert_equal([model(ids, cu_seqlens=BOUNDS, return_loss=True)], [expected])
    resets = torch.zeros(1, T, dtype=torch.bool)
    resets[0, [edge for edge in EDGES if edge < T]] = True
    assert_equal([model(ids, resets=resets, return_loss=True)], [expected])
    rows = torch.zeros(N, max(LENGTHS), dtype=torch.long)
    mask = torch.zeros(N, max(LENGTHS), dtype=torch.bool)
    for n, (a, b) in enumerate(PAIRS):
        rows[n, : b - a], mask[n, : b - a] = ids[0, a:b], True
    assert_equal([model(rows, mask=mask, return_loss=True)], [expected])
    with pytest.raises(ValueError, match="a loss needs a document of two tokens or more"):
        model(ids[:, :2], cu_seqlens=torch.tensor([0, 1, 2]), return_loss=True)


def test_model_refuses_wrong_marks(model: Transformer) -> None:
    with pytest.raises(ValueError, match="Transformer: mask must be booleans"):
        model(tokens(2, 5), mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="Transformer: documents given by cu_seqlens are packed in one row"):
        model(tokens(2, 5), cu_seqlens=torch.tensor([0, 5]))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), name=st.sampled_from(sorted(LAYERS)), lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4)
)
def test_any_split_packing_padding_and_reset(data: st.DataObject, name: str, lengths: list[int]) -> None:
    """Sequences fed in random pieces, each time packed or padded together, against each one whole and alone."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    backwards, rows = getattr(layer, "reverse", False), len(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    whole = [torch.randn(1, n, DIM, generator=generator, dtype=torch.float64) for n in lengths]
    marks = [torch.rand(1, n, generator=generator) < 0.15 for n in lengths]
    calls = data.draw(st.integers(1, 3), "calls")
    cuts = [sorted(data.draw(st.lists(st.integers(0, n), min_size=calls - 1, max_size=calls - 1))) for n in lengths]
    edges = [[0, *cut, n] for cut, n in zip(cuts, lengths, strict=True)]
    parts: list[list[Tensor]] = [[] for _ in lengths]
    state = None
    for call in range(calls)[:: -1 if backwards else 1]:
        spans = [(edge[call], edge[call + 1]) for edge in edges]
        xs = [x[:, a:b] for x, (a, b) in zip(whole, spans, strict=True)]
        rs = [r[:, a:b] for r, (a, b) in zip(marks, spans, strict=True)]
        sizes = [b - a for a, b in spans]
        if data.draw(st.booleans(), "packed"):
            bounds = torch.tensor([0, *itertools.accumulate(sizes)])
            y, state = layer(
                torch.cat(xs, 1), state=state, resets=torch.cat(rs, 1), cu_seqlens=bounds, return_state=True
            )
            pieces = list(y.split(sizes, 1))
        else:
            wide = max(sizes) + data.draw(st.integers(0, 2), "padding")
            x, resets = torch.full((rows, wide, DIM), torch.nan).double(), torch.zeros(rows, wide, dtype=torch.bool)
            mask = torch.zeros(rows, wide, dtype=torch.bool)
            for row, size in enumerate(sizes):
                first = data.draw(st.integers(0, wide - size), "first")
                here = slice(first, first + size)
                x[row, here], resets[row, here], mask[row, here] = xs[row][0], rs[row][0], True
            y, state = layer(x, state=state, resets=resets, mask=mask, return_state=True)
            pieces = [y[row : row + 1, mask[row]] for row in range(rows)]
        for row, piece in enumerate(pieces):
            parts[row].insert(0 if backwards else len(parts[row]), piece)
    for row in range(rows):
        expected, last = layer(whole[row], resets=marks[row], return_state=True)
        assert_equal([torch.cat(parts[row], 1), goes_on(layer, state.select([row]))], [expected, goes_on(layer, last)])


def test_documents_that_are_none_do_not_crash_compiled_layers() -> None:
    layer = GateLoopedAttention(DIM, heads=2, conv_size=3)
    call = compiled(lambda x, bounds: layer(x, cu_seqlens=bounds))
    x = torch.randn(1, 40, DIM)
    with torch.no_grad():
        call(x, torch.tensor([0, 20, 40]))
        for wrong in (50, 4_000_000, 2**40, -7):
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                call(x, torch.tensor([0, wrong, 40]))


def test_states_do_not_keep_what_they_were_computed_from(layer: nn.Module) -> None:
    _, state = layer(normal(1, 2000, DIM), return_state=True)
    if isinstance(layer, CausalFullAttention) and layer.window is None:
        return
    held = sum(part.untyped_storage().nbytes() for part in state)
    assert held <= 4 * sum(part.nbytes for part in state) + 1000


def test_counts_survive_narrow_types() -> None:
    state = warm(attention().double(), 2)._replace(seen=torch.tensor([1001, 70001]))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert state.to(dtype).seen.tolist() == [1001, 70001]
        assert state.to(dtype).keys.dtype == dtype
    assert state.to("meta").seen.device.type == "meta"


def test_a_window_is_linear_in_memory() -> None:
    """No mask of all steps by all keys."""
    layer, shapes = attention(window=20), []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shapes.append((q.shape[2], k.shape[2], options["attn_mask"].shape[-2:]))
        return original(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        layer(torch.randn(1, 5000, DIM))
    assert max(q * k for q, k, _ in shapes) <= 128 * 147
    assert all(tuple(mask) == (q, k) for q, k, mask in shapes)


def test_padding_may_hold_any_ids(model: Transformer) -> None:
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    expected = model(ids, mask=mask)
    ids[0, :2] = -100
    assert torch.equal(model(ids, mask=mask), expected)
    new = model.generate(ids, 3, mask=mask, temperature=0)
    assert new.shape == (2, 9)
    with pytest.raises(ValueError, match="a loss needs a document of two tokens or more"):
        model(ids, mask=mask & False, return_loss=True)
