"""Bidirectional: two layers, one of which runs backwards, in sequences of every layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import assert_equal, compiled, rms_ratio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateloop_transformer import Bidirectional, CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, quantize
from gateloop_transformer.runs.config import TrainingConfig
from gateloop_transformer.training.optimizer import parameter_groups

DIM = 16
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "heads": (GateLoopedAttention, {"heads": 2, "gate": "ring", "conv_size": 4, "head_norm": True}),
    "channels": (GateLoopedAttention, {"conv_size": 3}),
    "simple": (SimpleGateLoopLayer, {}),
    "heinsen": (SimpleGateLoopLayer, {"use_heinsen": True}),
}
# For what costs seconds: compilation and export. How the two are put together does not depend on what they are.
FEW = [
    pytest.param(name, merge, marks=[pytest.mark.slow] * (name in ("channels", "simple")))
    for name, merge in zip(LAYERS, ("sum", "concat") * 2, strict=True)
]
MARKS = st.lists(st.booleans(), min_size=18, max_size=18)


def build(name: str, merge: str, dtype: torch.dtype = torch.float64) -> Bidirectional:
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    return Bidirectional(kind, DIM, merge=merge, **options).to(dtype)


@pytest.fixture(params=["sum", "concat"])
def merge(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layer(name: str, merge: str) -> Bidirectional:
    return build(name, merge)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(marks: list[bool], rows: int) -> Tensor:
    return torch.tensor(marks).view(rows, -1)


def merged(layer: Bidirectional, y: Tensor, z: Tensor) -> Tensor:
    return y + z if layer.merge == "sum" else torch.cat([y, z], -1)


def one_by_one(layer: Bidirectional, x: Tensor, first: Tensor) -> Tensor:
    """Of a row x (T, dim), every sequence by itself; `first` (T,) marks where they begin."""
    edges = [0, *(t for t in range(1, len(x)) if first[t]), len(x)]
    return torch.cat([layer(x[None, a:b])[0] for a, b in itertools.pairwise(edges)])


def assert_same(layer: Bidirectional, x: Tensor, y: Tensor, expected: Tensor) -> None:
    """Two outputs, and the gradients of x and of all parameters through them."""
    leaves, weights = [x, *layer.parameters()], normal(*y.shape, seed=2)
    gradients = torch.autograd.grad((y * weights).sum(), leaves, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, materialize_grads=True)
    assert_equal([y, *gradients], [expected, *wanted])


def test_each_direction_is_the_layer_alone(name: str, merge: str) -> None:
    layer, x = build(name, merge), normal(2, 17, DIM).requires_grad_()
    kind, options = LAYERS[name]
    ahead, back = kind(DIM, **options).double(), kind(DIM, reverse=True, **options).double()
    layer.forward_layer.load_state_dict(ahead.state_dict())
    layer.backward_layer.load_state_dict(back.state_dict())
    y = layer(x)
    assert y.shape == (2, 17, DIM if merge == "sum" else 2 * DIM)
    assert_same(layer, x, y, merged(layer, layer.forward_layer(x), layer.backward_layer(x)))
    assert_equal([y], [merged(layer, ahead(x), back(x))])
    ahead.load_state_dict(back.state_dict())
    assert_equal([y], [merged(layer, layer.forward_layer(x), ahead(x.flip(1)).flip(1))])


def test_the_two_have_parameters_of_their_own(layer: Bidirectional) -> None:
    ahead, back = (list(part.parameters()) for part in (layer.forward_layer, layer.backward_layer))
    assert not {id(p) for p in ahead} & {id(p) for p in back}
    assert {id(p) for p in layer.parameters()} == {id(p) for p in ahead + back}


@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=8, deadline=None)
@given(first=MARKS)
def test_resets_separate_sequences(name: str, merge: str, first: list[bool]) -> None:
    layer, x, resets = build(name, merge), normal(2, 9, DIM).requires_grad_(), table(first, 2)
    expected = torch.stack([one_by_one(layer, x[row], resets[row]) for row in range(2)])
    assert_same(layer, x, layer(x, resets=resets), expected)


@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 18), max_size=6), first=MARKS | st.none())
def test_documents_give_what_they_give_alone(name: str, merge: str, cuts: list[int], first: list[bool] | None) -> None:
    layer, x, bounds = build(name, merge), normal(1, 18, DIM).requires_grad_(), [0, *sorted(cuts), 18]
    resets = None if first is None else table(first, 1)
    marks = torch.zeros(1, 18, dtype=torch.bool) if resets is None else resets
    parts = [one_by_one(layer, x[0, a:b], marks[0, a:b]) for a, b in itertools.pairwise(bounds)]
    y = layer(x, cu_seqlens=torch.tensor(bounds), resets=resets)
    assert_same(layer, x, y, torch.cat(parts)[None])


@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=8, deadline=None)
@given(there=MARKS, first=MARKS | st.none())
def test_padding_might_as_well_not_be_there(name: str, merge: str, there: list[bool], first: list[bool] | None) -> None:
    layer, mask = build(name, merge), table(there, 2)
    resets = None if first is None else table(first, 2)
    marks = torch.zeros(2, 9, dtype=torch.bool) if resets is None else resets
    x = normal(2, 9, DIM).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y = layer(x, mask=mask, resets=resets)
    expected = torch.zeros_like(y)
    for row in range(2):
        expected[row, mask[row]] = one_by_one(layer, x[row, mask[row]], marks[row, mask[row]])
    assert_same(layer, x, y, expected)


def test_flipped_time_and_swapped_layers_flip_the_output(layer: Bidirectional, name: str) -> None:
    x, bounds = normal(1, 18, DIM), torch.tensor([0, 0, 5, 6, 18])
    swapped = build(name, layer.merge)
    swapped.forward_layer.load_state_dict(layer.backward_layer.state_dict())
    swapped.backward_layer.load_state_dict(layer.forward_layer.state_dict())
    for given_, flipped in ((None, None), (bounds, 18 - bounds.flip(0))):
        y = layer(x, cu_seqlens=given_)
        if layer.merge == "concat":
            y = y.roll(DIM, -1)
        assert_equal([swapped(x.flip(1), cu_seqlens=flipped)], [y.flip(1)])


def test_every_step_sees_every_other(layer: Bidirectional) -> None:
    x = normal(1, 6, DIM).requires_grad_()
    y = layer(x)
    for t in range(6):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        assert (gradient[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("B", [0, 2])
def test_nothing_in_is_nothing_out(layer: Bidirectional, B: int) -> None:
    width = DIM if layer.merge == "sum" else 2 * DIM
    for T in (0, 3) if B == 0 else (0,):
        x, marks = normal(B, T, DIM), torch.ones(B, T, dtype=torch.bool)
        for options in ({}, {"resets": marks}, {"mask": marks}, {"resets": marks, "mask": marks}):
            y = layer(x, **options)
            assert y.shape == (B, T, width)
            y.sum().backward()
    for bounds in ([0], [0, 0, 0]):
        assert layer(normal(1, 0, DIM), cu_seqlens=torch.tensor(bounds)).shape == (1, 0, width)
    hidden = layer(normal(B, 3, DIM), mask=torch.zeros(B, 3, dtype=torch.bool))
    assert torch.equal(hidden, torch.zeros(B, 3, width, dtype=torch.float64))


@pytest.mark.parametrize(("name", "merge"), FEW)
def test_compiles_into_one_graph(layer: Bidirectional, name: str) -> None:
    x = normal(2, 9, DIM).requires_grad_()
    resets = torch.rand(2, 9, generator=torch.Generator().manual_seed(4)) < 0.3
    one_graph = compiled(layer)
    for marks in (None, resets):
        assert_same(layer, x, one_graph(x, resets=marks), layer(x, resets=marks))
    if name == "heinsen":
        return  # Its documents become rows outside the operator, by numbers no tracer knows.
    document, bounds = normal(1, 9, DIM).requires_grad_(), torch.tensor([0, 4, 4, 9])
    y = one_graph(document, cu_seqlens=bounds)
    assert_same(layer, document, y, layer(document, cu_seqlens=bounds))


@pytest.mark.parametrize(("name", "merge"), FEW)
def test_exports_with_any_length_and_batch(layer: Bidirectional) -> None:
    B, T = torch.export.Dim("B", min=1, max=512), torch.export.Dim("T", min=2, max=4096)

    def arguments(B: int, T: int) -> tuple[Tensor, dict[str, Tensor]]:
        return normal(B, T, DIM), {"resets": torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.3}

    x, options = arguments(2, 11)
    plain = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: B, 1: T}}).module()
    marked = torch.export.export(
        layer, (x,), options, dynamic_shapes={"x": {0: B, 1: T}, "resets": {0: B, 1: T}}
    ).module()
    for shape in ((2, 11), (3, 4), (1, 37)):
        x, options = arguments(*shape)
        assert_equal([plain(x), marked(x, **options)], [layer(x), layer(x, **options)])


@pytest.mark.parametrize(("name", "merge"), FEW)
def test_autocast_gives_what_a_linear_gives(name: str, merge: str) -> None:
    layer, x = build(name, merge, torch.float32), normal(2, 11, DIM).float()
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :3] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        z = layer(x, mask=mask)
    assert y.dtype == z.dtype == torch.bfloat16
    assert rms_ratio(y, layer(x)) <= 0.15
    assert rms_ratio(z, layer(x, mask=mask)) <= 0.15
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(2, 5)}, r"mask must be booleans of shape \(B, T\) = \(2, 5\), not torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must be booleans of shape"),
        (
            {"mask": torch.ones(2, 5, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 5])},
            "give either a mask or cu_seqlens",
        ),
        ({"cu_seqlens": torch.tensor([0, 5])}, "packed in one row, not in B = 2"),
        ({"resets": torch.ones(2, 5)}, "resets must be booleans of shape"),
        ({"resets": torch.ones(2, 4, dtype=torch.bool)}, "resets must be booleans of shape"),
        ({"resets": [True] * 5}, "resets must be a torch tensor, not list"),
        (
            {"resets": [True] * 5, "mask": torch.ones(2, 5, dtype=torch.bool)},
            "resets must be a torch tensor, not list",
        ),
        (
            {"resets": torch.ones(2, 4, dtype=torch.bool), "mask": torch.ones(2, 5, dtype=torch.bool)},
            "resets must be booleans of shape",
        ),
    ],
)
def test_wrong_marks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Bidirectional: .*{message}"):
        build("channels", "sum")(normal(2, 5, DIM), **options)


def test_wrong_input_is_refused() -> None:
    layer = build("channels", "sum")
    for shape in ((2, 5, DIM + 1), (5, DIM), (2, 1, 5, DIM)):
        with pytest.raises(ValueError, match=r"Bidirectional: input must have shape \(B, T, 16\), not \("):
            layer(torch.ones(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="Bidirectional: input must be floating point"):
        layer(torch.ones(2, 5, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Bidirectional: input is torch\.float64 but the layer torch\.float32"):
        layer.float()(normal(2, 5, DIM))


def test_there_is_no_state() -> None:
    layer, x = build("channels", "sum"), normal(2, 5, DIM)
    for options in ({"state": None}, {"return_state": True}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            layer(x, **options)


def test_only_layers_that_run_backwards_are_taken() -> None:
    kinds: list[Any] = [CausalFullAttention, torch.nn.GRU]
    for kind in kinds:
        with pytest.raises(ValueError, match=rf"GateLoopedAttention or SimpleGateLoopLayer.* not {kind.__name__}$"):
            Bidirectional(kind, DIM)
    made: Any = GateLoopedAttention(DIM)
    with pytest.raises(ValueError, match=r"not an object of GateLoopedAttention$"):
        Bidirectional(made, DIM)
    with pytest.raises(ValueError, match="merge must be 'sum' or 'concat', not 'mean'"):
        Bidirectional(GateLoopedAttention, DIM, merge="mean")
    with pytest.raises(ValueError, match="reverse is not an option"):
        Bidirectional(GateLoopedAttention, DIM, reverse=True)
    with pytest.raises(ValueError, match="heads must divide dim_inner"):
        Bidirectional(GateLoopedAttention, DIM, heads=3)


def test_gates_of_both_directions_are_found() -> None:
    layer = build("heads", "concat", torch.float32)
    gates = layer.gate_parameters()
    assert gates == [*layer.forward_layer.gate_parameters(), *layer.backward_layer.gate_parameters()]
    assert {id(p) for p in parameter_groups(layer, TrainingConfig())[-1]["params"]} == {id(p) for p in gates}
    small = quantize(layer, "int8")
    for direction in (small.forward_layer, small.backward_layer):
        assert isinstance(direction.to_a[0], torch.nn.Linear)
        assert not isinstance(direction.to_qkv, torch.nn.Linear)
    assert small(normal(2, 5, DIM).float()).shape == (2, 5, 2 * DIM)
    assert build("simple", "sum").gate_parameters() == []
