"""Laws of every layer and of the model, under every option."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import assert_equal, compiled, pieces, rms_ratio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gateloop_transformer import CausalFullAttention, GateLoopedAttention, SimpleGateLoopLayer, Transformer
from gateloop_transformer.layers.norm import RMSNorm
from gateloop_transformer.layers.short_conv import ShortConv
from gateloop_transformer.layers.state import State

# Narrow numbers fill a vector: a scalar kernel of each kind would be compiled for these tests alone.
DIM, VOCABULARY = 16, 11
Gate = partial(GateLoopedAttention, DIM)
Attention = partial(CausalFullAttention, DIM, dim_head=4, heads=2)
Simple = partial(SimpleGateLoopLayer, DIM)
Model = partial(Transformer, DIM, num_tokens=VOCABULARY, depth=2, dim_head=4, heads=2)

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "gate": Gate,
    "gate-heads": partial(Gate, heads=2),
    "gate-inner": partial(Gate, heads=3, dim_inner=12, sub_ln=True, add_swish_gating=False),
    "gate-paper": partial(Gate, heads=2, gate="paper"),
    "gate-ring": partial(Gate, heads=2, gate="ring"),
    "gate-norms": partial(Gate, heads=2, head_norm=True, qk_norm=True),
    "gate-conv": partial(Gate, heads=2, conv_size=4),
    "gate-conv1-rank": partial(Gate, conv_size=1, gate_rank=3),
    "gate-fixed": partial(Gate, gate="ring", fixed_gates=True, conv_size=3, conv_silu=True, qkv_bias=True),
    "gate-fixed-heads": partial(Gate, heads=2, gate="ring", fixed_gates=True, qkv_bias=True),
    "attention": Attention,
    "attention-bare": partial(Attention, softmax_normalize=False),
    "attention-rotary-swish": partial(Attention, rotary_emb=True, add_swish_gating=True),
    "attention-qk_norm": partial(Attention, rotary_emb=True, qk_norm=True),
    "attention-released": partial(Attention, data_dependent_rel_pos=True),
    "attention-released-softmax": partial(Attention, data_dependent_rel_pos=True, softmax_normalize=True),
    "attention-gate_loop": partial(Attention, data_dependent_rel_pos="gate_loop"),
    "attention-gate_loop-softmax": partial(
        Attention, data_dependent_rel_pos="gate_loop", softmax_normalize=True, rotary_emb=True
    ),
    "simple": Simple,
    "simple-heinsen": partial(Simple, use_heinsen=True),
    "simple-no-prenorm": partial(Simple, prenorm=False, post_ln=True),
    "model": Model,
    "model-pattern": partial(
        Model, depth=3, layer_pattern="gate attention", gate="ring", gate_loop_heads=2, head_norm=True,
        qk_norm=True, conv_size=3, rotary_emb=True, dropout=0.5,
    ),
    "model-post-norm": partial(Model, post_ln_norm=True, sub_ln=True, ff_mult=1, attn_add_swish_gating=False),
    "model-no-feedforward": partial(Model, gate="ring", ff_mult=0, conv_size=4, conv_silu=True, qkv_bias=True),
    "model-attention": partial(
        Model, use_gate_looped_attn=False, data_dependent_rel_pos="gate_loop", attn_softmax_normalize=True
    ),
}  # fmt: skip
# One of each kind, for what costs seconds: compilation and export.
FEW = ["gate-conv", "attention-released", "attention-gate_loop-softmax", "simple", "simple-heinsen", "model-pattern",
       # The model has layers of these kinds.
       *(pytest.param(name, marks=pytest.mark.slow) for name in ("gate-ring", "attention-rotary-swish"))]  # fmt: skip
EVERY = list(BUILDERS)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]().to(dtype).eval()


def make_input(name: str, B: int = 2, T: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name.startswith("model"):
        return torch.randint(VOCABULARY, (B, T), generator=generator)
    return torch.randn(B, T, DIM, generator=generator, dtype=dtype)


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for item in state for x in leaves(item)]


def feed(layer: nn.Module, parts: list[Tensor], state: Any = None) -> tuple[Tensor, Any]:
    ys = []
    for part in parts:
        y, state = layer(part, state=state, return_state=True)
        ys.append(y)
    return torch.cat(ys, 1), state


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 11), max_size=4))
def test_a_sequence_in_pieces_is_the_whole(name: str, cuts: list[int]) -> None:
    layer, x = build(name), make_input(name)
    y, state = layer(x, return_state=True)
    assert_equal([y], [layer(x)])
    pieced, last = feed(layer, pieces(x, cuts))
    assert_equal([pieced, *leaves(last)], [y, *leaves(state)])


@pytest.mark.parametrize("name", EVERY)
def test_step_by_step_is_the_whole_in_value_and_gradient(name: str) -> None:
    layer, x = build(name), make_input(name)
    # The released position divides by products of gates clamped at 1e-10: scores of 1e8 lose as many digits.
    tolerance = 1e-5 if "released" in name else 1e-10
    gradients = []
    for parts in ([x], list(x.split(1, 1))):
        layer.zero_grad()
        y, state = feed(layer, parts)
        (y.sin().sum() + sum(leaf.sum() for leaf in leaves(state))).backward()
        gradients.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert_equal(*gradients, tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_the_future_does_not_reach_the_past(name: str) -> None:
    layer, x = build(name), make_input(name)
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCABULARY
    assert_equal([layer(changed)[:, :6]], [layer(x)[:, :6]], 1e-12)
    assert (layer(changed)[:, 6:] - layer(x)[:, 6:]).abs().max() > 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_the_past_reaches_the_future_through_the_state(name: str) -> None:
    layer, x = build(name), make_input(name)
    _, state = layer(x[:, :6], return_state=True)
    assert (layer(x[:, 6:], state=state) - layer(x[:, 6:])).abs().max() > 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_batch_rows_are_independent_and_states_select(name: str) -> None:
    layer, x = build(name), make_input(name, B=3)
    _, state = layer(x[:, :6], return_state=True)
    rows = [2, 0, 0]
    y, last = layer(x[rows, 6:], state=state.select(rows), return_state=True)
    whole, end = layer(x[rows], return_state=True)
    assert_equal([y, *leaves(last)], [whole[:, 6:], *leaves(end)])


@pytest.mark.parametrize("name", EVERY)
def test_nothing_in_is_nothing_out_and_the_state_stays(name: str) -> None:
    layer, x = build(name), make_input(name)
    width = VOCABULARY if name.startswith("model") else DIM
    _, state = layer(x, return_state=True)
    y, after = layer(x[:, :0], state=state, return_state=True)
    assert y.shape == (2, 0, width)
    assert all(torch.equal(new, old) for new, old in zip(leaves(after), leaves(state), strict=True))
    for empty in (x[:0], x[:, :0], x[:0, :0]):
        y, start = layer(empty, return_state=True)
        assert y.shape == (*empty.shape[:2], width)
        assert layer(empty).shape == y.shape
        assert start.batch_size == len(empty)
        y.sum().backward()
    y, _ = feed(layer, [x[:, :0], x])
    assert_equal([y], [layer(x)])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
    ],
)
def test_every_precision_gives_its_own_dtype_and_finite_gradients(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name, dtype), make_input(name, dtype=dtype)
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y, state = layer(leaf, return_state=True)
    assert y.dtype == dtype
    (y.float().square().mean() + 0 * sum(part.float().sum() for part in leaves(state))).backward()
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype == dtype for grad in gradients)
    assert layer(x).dtype == dtype
    if dtype == torch.float16 and "released" in name:
        return  # Its quotients of products of gates reach 1e10, beyond float16.
    assert all(grad.isfinite().all() for grad in gradients)
    tolerance = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    exact = copy.deepcopy(layer).double()
    assert rms_ratio(y, exact(x if name.startswith("model") else x.double())) <= tolerance


@pytest.mark.parametrize("name", EVERY)
def test_states_are_carried_in_half_precision_too(name: str) -> None:
    layer, x = build(name, torch.bfloat16), make_input(name, dtype=torch.bfloat16)
    y, state = feed(layer, list(x.split(3, 1)))
    assert y.dtype == torch.bfloat16
    assert rms_ratio(y, layer(x)) <= 0.1
    if not name.startswith(("attention", "model")):
        assert leaves(state)[0].dtype == torch.float32


@pytest.mark.parametrize("name", EVERY)
def test_autocast_gives_what_a_linear_gives(name: str) -> None:
    layer, x = build(name, torch.float32), make_input(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x, return_state=True)
        layer(x, state=state)
        loss = y.float().square().mean()
    assert y.dtype == torch.bfloat16
    loss.backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert gradients
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients)
    assert rms_ratio(y, layer(x)) <= 0.15


def test_autocast_narrows_what_products_read() -> None:
    norm, conv = RMSNorm(DIM), ShortConv(DIM, 4, silu=True)
    x, past = torch.randn(2, 5, DIM), torch.randn(2, 3, DIM)
    wide = norm(x)
    expected, _ = conv(x.bfloat16().float(), past)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = norm(x)
        y, left = conv(x, past)
        assert norm.double()(x.double()).dtype == torch.float64
    assert torch.equal(narrow, wide.bfloat16())
    assert y.dtype == left.dtype == torch.bfloat16
    assert rms_ratio(y, expected) <= 0.02


@pytest.mark.parametrize("name", FEW)
def test_compiles_into_one_graph(name: str) -> None:
    layer, x = build(name), make_input(name)

    def run(x: Tensor, state: State | None) -> tuple[Tensor, State]:
        result: tuple[Tensor, State] = layer(x, state=state, return_state=True)
        return result

    one_graph = compiled(run)
    results = []
    for function in (run, one_graph):
        layer.zero_grad()
        y, state = function(x[:, :6], None)
        z, state = function(x[:, 6:], state.detach())
        (y.sin().sum() + z.sin().sum()).backward()
        gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        results.append([y, z, *leaves(state), *gradients])
    assert_equal(*results)


@pytest.mark.parametrize("name", FEW)
def test_exports_with_any_length_and_batch(name: str) -> None:
    layer = build(name)
    B, T = torch.export.Dim("B", min=1, max=512), torch.export.Dim("T", min=2, max=4096)
    exported = torch.export.export(layer, (make_input(name),), dynamic_shapes=[{0: B, 1: T}]).module()
    for shape in ((2, 11), (3, 4), (1, 37)):
        x = make_input(name, *shape)
        assert_equal([exported(x)], [layer(x)])


class WithState(nn.Module):
    """A layer as a function of tensors alone."""

    def __init__(self, layer: nn.Module, example: State) -> None:
        super().__init__()
        self.layer, self.example = layer, example

    def forward(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        y, state = self.layer(x, state=self.example.map(lambda _: next(given)), return_state=True)
        return [y, *leaves(state)]


@pytest.mark.parametrize("name", FEW)
def test_exports_with_a_state(name: str) -> None:
    layer, x = build(name), make_input(name)
    state = layer(x[:, :6], return_state=True)[1].detach()
    module = WithState(layer, state)
    T, past = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("past", min=2, max=4096)
    growing = [{2: past} if part.ndim == 4 and part.shape[2] == 6 else {} for part in leaves(state)]
    assert any(growing) == name.startswith(("attention", "model"))
    exported = torch.export.export(
        module, (x[:, 6:].clone(), *leaves(state)), dynamic_shapes={"x": {1: T}, "tensors": tuple(growing)}
    ).module()
    for cut, end in ((6, 11), (4, 8), (3, 11)):
        state = layer(x[:, :cut], return_state=True)[1].detach()
        arguments = x[:, cut:end].clone(), *leaves(state)
        assert_equal(exported(*arguments), module(*arguments))


@pytest.mark.parametrize("name", EVERY)
def test_copies_pickles_and_checkpoints_are_the_same_layer(name: str) -> None:
    layer, x = build(name), make_input(name)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = BUILDERS[name]().double().eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    for other in (copy.deepcopy(layer), loaded, torch.load(whole, weights_only=False)):
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("model")])
def test_inputs_of_another_shape_are_refused(name: str) -> None:
    layer = build(name)
    for shape in ((2, 5, DIM + 1), (5, DIM), (2, 1, 5, DIM)):
        with pytest.raises(ValueError, match=r"input must have shape \(B, T, 16\), not \("):
            layer(torch.ones(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"floating point, not torch.int64"):
        layer(torch.ones(2, 5, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match="input must be a torch tensor, not ndarray"):
        layer(torch.ones(2, 5, DIM).numpy())


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("model")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_wider_than_the_layer_is_refused(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name).to(dtype), torch.ones(2, 5, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"input is torch\.float64 but the layer {dtype}"):
        layer(x)
    assert layer(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.float())
        with pytest.raises(ValueError, match=r"input is torch\.float64"):
            layer(x)


@pytest.mark.parametrize("name", EVERY)
def test_states_of_another_shape_or_kind_are_refused(name: str) -> None:
    layer, x = build(name), make_input(name)
    _, state = layer(x, return_state=True)
    _, wide = layer(torch.cat([x, x]), return_state=True)
    with pytest.raises(ValueError, match=r"must have shape .* not \(4, "):
        layer(x, state=wide)
    other = build("simple" if name != "simple" and not name.startswith("simple") else "gate")
    _, foreign = other(make_input("gate"), return_state=True)
    with pytest.raises(ValueError, match=r"state must be a .*State, not "):
        layer(x, state=foreign)
    with pytest.raises(ValueError, match=r"state must be a .*State, not tuple"):
        layer(x, state=tuple(state))
