"""Layers and models where torch is set up in another way: default dtypes, tensors without values, replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gateloop_transformer import (
    Bidirectional,
    CausalFullAttention,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    Transformer,
    quantize,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "channels": lambda: GateLoopedAttention(16, gate="ring", conv_size=3),
    "heads": lambda: GateLoopedAttention(16, heads=4, gate="ring", head_norm=True, qk_norm=True, conv_size=3),
    "gates per rank": lambda: GateLoopedAttention(16, heads=4, gate="paper", gate_rank=4, backend="chunkwise"),
    "simple": lambda: SimpleGateLoopLayer(16),
    "simple, heinsen": lambda: SimpleGateLoopLayer(16, use_heinsen=True),
    "attention": lambda: CausalFullAttention(16, heads=2, dim_head=8, rotary_emb=True),
    "attention, released position": lambda: CausalFullAttention(16, heads=2, data_dependent_rel_pos=True),
    "attention, gate loop position": lambda: CausalFullAttention(16, heads=2, data_dependent_rel_pos="gate_loop"),
    "both ways": lambda: Bidirectional(GateLoopedAttention, 16),
}


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("double")
def test_a_layer_takes_the_default_dtype(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 5, 16)
    y = layer(x)
    assert y.dtype == torch.float64
    y.sum().backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.usefixtures("double")
def test_a_model_takes_the_default_dtype() -> None:
    model = Transformer(dim=16, num_tokens=8, depth=2, layer_pattern="gate attention", rotary_emb=True)
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert model(ids).dtype == torch.float64
    assert model.generate(ids, 3, seed=0).shape == (1, 8)
    assert quantize(model, "int8").generate(ids, 3, seed=0).shape == (1, 8)


def test_a_layer_of_float32_says_that_it_takes_no_float64() -> None:
    with pytest.raises(ValueError, match=r"input is torch.float64 but the layer torch.float32: convert one of them"):
        GateLoopedAttention(16)(torch.zeros(1, 2, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_found_without_memory(name: str) -> None:
    with torch.device("meta"):
        layer, x = LAYERS[name](), torch.randn(2, 5, 16)
        y = layer(x, resets=torch.zeros(2, 5, dtype=torch.bool))
        assert y.is_meta
        assert y.shape[:2] == (2, 5)
        y.sum().backward()
        if name != "both ways":
            y, state = layer(x, return_state=True)
            again, _ = layer(x, state=state, return_state=True)
            assert again.shape == y.shape


def test_a_models_shapes_are_found_without_memory() -> None:
    with torch.device("meta"):
        model = Transformer(dim=16, num_tokens=8, depth=2, layer_pattern="gate attention", rotary_emb=True, conv_size=3)
        ids = torch.zeros(2, 5, dtype=torch.long)
        logits, state = model(ids, return_state=True)
        assert model(ids, state, return_state=True)[0].shape == logits.shape == (2, 5, 8)
        assert model(ids, return_loss=True, resets=torch.zeros(2, 5, dtype=torch.bool)).shape == ()


def replica(module: nn.Module) -> Any:
    """As DataParallel makes them: parameters are plain tensors, and `parameters()` gives none."""
    copy: Any = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        object.__setattr__(copy, name, None if parameter is None else parameter.detach())
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else replica(child)
    return copy


@pytest.mark.parametrize("name", LAYERS)
def test_a_replica_computes_the_same(name: str) -> None:
    layer, x = LAYERS[name]().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    found: Tensor = replica(layer)(x)
    assert not list(replica(layer).parameters())
    assert torch.equal(found, layer(x))
