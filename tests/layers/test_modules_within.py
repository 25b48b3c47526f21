"""The modules in a layer are what it computes with: what takes their place or is hooked onto them has its effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from gateloop_transformer import (
    Bidirectional,
    CausalFullAttention,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    Transformer,
    quantize,
)
from gateloop_transformer.layers.feedforward import FeedForward
from gateloop_transformer.layers.norm import PostNorm, PreNorm

DIM = 6
Make = Callable[[], nn.Module]
LAYERS: dict[str, Make] = {
    "gate": lambda: GateLoopedAttention(DIM),
    "gate-norm": lambda: GateLoopedAttention(DIM, sub_ln=True),
    "gate-plain": lambda: GateLoopedAttention(DIM, add_swish_gating=False, dim_inner=4),
    "gate-heads": lambda: GateLoopedAttention(DIM, heads=2, head_norm=True, qk_norm=True, conv_size=2),
    "gate-ring": lambda: GateLoopedAttention(DIM, gate="ring", gate_rank=2, conv_size=2, reverse=True),
    "attention": lambda: CausalFullAttention(DIM, heads=2, dim_head=4, rotary_emb=True, add_swish_gating=True),
    "attention-position": lambda: CausalFullAttention(
        DIM, heads=2, dim_head=4, data_dependent_rel_pos="gate_loop", qk_norm=True
    ),
    "simple": lambda: SimpleGateLoopLayer(DIM, post_ln=True),
    "simple-heinsen": lambda: SimpleGateLoopLayer(DIM, prenorm=False, use_heinsen=True),
    "bidirectional": lambda: Bidirectional(GateLoopedAttention, DIM),
    "feedforward": lambda: FeedForward(DIM),
    "prenorm": lambda: PreNorm(DIM, FeedForward(DIM)),
    "postnorm": lambda: PostNorm(DIM, FeedForward(DIM)),
}
WITHIN = [(name, part) for name, make in LAYERS.items() for part, _ in make().named_modules() if part]


def changed(layer: nn.Module, change: Callable[[nn.Module], object]) -> bool:
    """Whether the output of a layer is another after a change."""
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        return not torch.equal(before, layer(x))


def twice(output: Any) -> Any:
    return (twice(output[0]), *output[1:]) if isinstance(output, tuple) else output * 2 + 1


@pytest.mark.parametrize(("name", "part"), WITHIN)
def test_hooks_on_every_module_have_their_effect(name: str, part: str) -> None:
    layer = LAYERS[name]()
    module, seen = layer.get_submodule(part), []
    # One at a time, for each alone has to be noticed.
    for register in (
        module.register_forward_pre_hook,
        module.register_forward_hook,
        module.register_full_backward_pre_hook,
        module.register_full_backward_hook,
    ):
        with register(lambda *_: seen.append(part)):
            layer(torch.randn(2, 5, DIM, requires_grad=True)).sum().backward()
        assert seen, register
        seen.clear()
    assert changed(layer, lambda _: module.register_forward_hook(lambda _m, _x, y: twice(y)))


@pytest.mark.parametrize(("name", "part"), WITHIN)
def test_a_forward_put_onto_a_module_is_called(name: str, part: str) -> None:
    def change(layer: nn.Module) -> None:
        module: Any = layer.get_submodule(part)
        forward = module.forward
        module.forward = lambda *x, **options: twice(forward(*x, **options))

    assert changed(LAYERS[name](), change)


@pytest.mark.parametrize(("name", "part"), WITHIN)
def test_hooks_on_all_modules_reach_every_one(name: str, part: str) -> None:
    layer, called = LAYERS[name](), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    with handle:
        layer(torch.randn(2, 5, DIM))
    assert layer.get_submodule(part) in called


WEIGHTS = [(name, weight) for name, make in LAYERS.items() for weight, _ in make().named_parameters()]


@pytest.mark.parametrize(("name", "weight"), WEIGHTS)
def test_parametrised_weights_have_their_effect(name: str, weight: str) -> None:
    class Uneven(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values + torch.linspace(0, 1, values.numel()).view_as(values)

    layer, (part, _, own) = LAYERS[name](), weight.rpartition(".")
    assert changed(layer, lambda _: parametrize.register_parametrization(layer.get_submodule(part), own, Uneven()))


LINEAR = [(name, part) for name, part in WITHIN if isinstance(LAYERS[name]().get_submodule(part), nn.Linear)]


@pytest.mark.parametrize(("name", "part"), LINEAR)
def test_normed_weights_are_trained(name: str, part: str) -> None:
    layer = LAYERS[name]()
    parametrizations.weight_norm(layer.get_submodule(part))
    layer(torch.randn(2, 5, DIM)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.get_submodule(part).parameters())


ACTIVATIONS = ["gate", "gate-norm", "gate-heads", "gate-ring", "attention"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_modules_put_into_the_place_of_others_are_called(name: str) -> None:
    layer: Any = LAYERS[name]()

    assert changed(layer, lambda _: layer.to_gates.append(nn.Tanh()))

    def change(_: nn.Module) -> None:
        layer.to_gates[1] = nn.Sigmoid()

    assert changed(layer, change)
    layer.to_gates = nn.Linear(DIM, layer.to_qkv[0].out_features // 3 if name == "attention" else DIM)
    layer(torch.randn(2, 5, DIM)).sum().backward()
    assert layer.to_gates.weight.grad is not None


@pytest.mark.parametrize("name", ["gate", "gate-heads"])
def test_subclasses_of_what_is_fused_are_called(name: str) -> None:
    class Doubled(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    assert changed(LAYERS[name](), lambda layer: setattr(layer, "maybe_sub_ln", Doubled()))


def test_what_is_fused_equals_what_is_called() -> None:
    layer, x = GateLoopedAttention(DIM).double(), torch.randn(2, 9, DIM, dtype=torch.float64)
    fused, state = layer(x, return_state=True)
    layer.maybe_sub_ln.register_forward_hook(lambda *_: None)
    called, after = layer(x, return_state=True)
    assert torch.allclose(fused, called, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.real, after.real)


@pytest.mark.parametrize("name", ["gate", "gate-heads", "attention", "simple", "bidirectional", "model"])
def test_hooks_on_a_layer_run_once_with_padding_too(name: str) -> None:
    layer = Transformer(DIM, num_tokens=7, depth=1) if name == "model" else LAYERS[name]()
    x = torch.randint(7, (2, 5)) if name == "model" else torch.randn(2, 5, DIM)
    shapes: list[torch.Size] = []
    layer.register_forward_hook(lambda _m, _x, y: shapes.append(y.shape))
    layer(x, mask=torch.rand(2, 5) < 0.7)
    assert [shape[:2] for shape in shapes] == [(2, 5)]


def test_smaller_weights_leave_what_is_no_plain_product_and_parametrised_gates() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    layer: Any = GateLoopedAttention(DIM)
    layer.to_out = Scaled(DIM, DIM)
    parametrizations.weight_norm(layer.to_a[0])
    parametrizations.weight_norm(layer.to_qkv)
    small: Any = quantize(layer, "bfloat16")
    kinds = [type(module).__name__ for module in (small.to_out, small.to_a[0], small.to_qkv, small.to_gates[0])]
    assert kinds == ["Scaled", "ParametrizedLinear", "SmallLinear", "SmallLinear"]
    x = torch.randn(2, 5, DIM)
    assert torch.allclose(small(x), layer(x), rtol=0.05, atol=0.05)


def test_ids_are_held_against_the_embedding_that_is_there() -> None:
    model: Any = Transformer(DIM, num_tokens=5, depth=1)
    model.token_emb, model.to_logits[1] = nn.Embedding(9, DIM), nn.Linear(DIM, 9)
    assert model(torch.tensor([[8]])).shape == (1, 1, 9)
    with pytest.raises(ValueError, match=r"in \[0, 9\), got 9 to 9"):
        model(torch.tensor([[9]]))
