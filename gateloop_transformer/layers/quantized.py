"""Smaller weights for decoding: bfloat16, or 8-bit integers with one scale per output."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer.arguments import WEIGHT_KINDS

Model = TypeVar("Model", bound=nn.Module)

# Up to this many rows torch's product with 8-bit weights is faster than converting them for a bfloat16 product.
_FEW_ROWS = 8
# That product reads its operands in pieces of this many columns, and so past the end of a narrower last piece.
_COLUMNS = 16


class SmallLinear(nn.Module):
    """A Linear layer whose weight is kept in bfloat16 or int8; for inference.

    Inputs and results are rounded to bfloat16, sums are float32, the bias is added in the input's dtype. An 8-bit
    weight stands for itself, in [-127, 127], times its output's scale: max |weight| / 127, rounded to bfloat16.

    Args:
        linear: the layer to copy.
        kind: "bfloat16" or "int8".
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        weight, scale = linear.weight.detach(), None
        if kind == "int8":
            # The scale is rounded before the weight is divided by it, so that its rounding adds no error. A row of
            # zeros stays a row of zeros, whatever its scale.
            scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-30).to(torch.bfloat16)
            weight = (weight.float() / scale.float().unsqueeze(1)).round().clamp(-127, 127)
        self.register_buffer("weight", weight.to(torch.int8 if kind == "int8" else torch.bfloat16))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias: (..., in_features) → (..., out_features)."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        if self.scale is None:
            y = F.linear(rows, self.weight)
        elif rows.device.type == "cpu" and rows.shape[0] <= _FEW_ROWS and self.in_features % _COLUMNS == 0:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            # Integers up to 127 are exact in bfloat16.
            y = F.linear(rows, self.weight.to(torch.bfloat16)) * self.scale
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, kind={self.kind!r}"


def check_kind(kind: str) -> None:
    """Check that kind is one of WEIGHT_KINDS.

    Raises:
        ValueError: it is not.
    """
    if kind not in WEIGHT_KINDS:
        raise ValueError(f"quantize: kind must be one of {', '.join(WEIGHT_KINDS)}, not {kind!r}")


def quantize(model: Model, kind: str) -> Model:
    """Copy a model with smaller weights, which decodes faster; the original stays as it is.

    Linear layers become `SmallLinear`, except those that make gates: a gate near 1 is a long memory, and bfloat16 has
    no number between 0.996 and 1. Gates, states, embeddings, convolutions and norms are float32. The copy is for
    inference: its small layers have no gradients, and their weights are not parameters.

    Args:
        model: a `Transformer`, or any module whose method `gate_parameters` lists its gate projections.
        kind: "int8", "bfloat16", or "float32", which changes no layer.

    Raises:
        ValueError: kind has another value, or model is not a torch module.
    """
    check_kind(kind)
    if not isinstance(model, nn.Module):
        raise ValueError(f"quantize: model must be a torch module, not {type(model).__name__}")
    small = copy.deepcopy(model).float()
    if kind == "float32":
        return small
    gates = {parameter for module in small.modules() for parameter in getattr(module, "gate_parameters", list)()}
    for module in list(small.modules()):
        for name, child in list(module.named_children()):
            # A subclass that computes something else stays; one with parametrised weights is of a class of its own.
            if (
                isinstance(child, nn.Linear)
                and type(child).forward is nn.Linear.forward
                and gates.isdisjoint(child.parameters())
            ):
                setattr(module, name, SmallLinear(child, kind))
    return small
