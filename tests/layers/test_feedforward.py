"""What is special to the channel mixer; laws of all layers are in test_layers.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import compiled

from gateloop_transformer.layers.feedforward import _FEW, GELU, FeedForward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 50, _FEW, _FEW + 1])
@pytest.mark.parametrize("grad", [False, True])
def test_gelu_is_that_of_torch(dtype: torch.dtype, size: int, grad: bool) -> None:
    x = 4 * torch.randn(1, size, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        y = GELU()(x.to(dtype))
    exact = F.gelu(x.to(dtype).double())
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_few_numbers_are_not_handed_to_torch_s_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("torch's own")

    monkeypatch.setattr(torch.nn.GELU, "forward", forward)
    layer = FeedForward(8)
    with torch.no_grad():
        layer(torch.ones(1, 1, 8))
    with pytest.raises(AssertionError, match="torch's own"):
        layer(torch.ones(1, 1, 8))


def test_compiles_into_one_graph_without_gradients() -> None:
    layer, x = FeedForward(8), torch.randn(1, 3, 8)
    with torch.no_grad():
        assert torch.allclose(compiled(layer)(x), layer(x), atol=1e-6)


def test_the_original_s_parameter_names_stay() -> None:
    assert list(FeedForward(4).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
