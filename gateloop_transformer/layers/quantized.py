"""Smaller weights for decoding: bfloat16, or 8-bit integers with one scale per output."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("float32", "bfloat16", "int8")

# Up to this many rows torch's product with 8-bit weights is faster than a bfloat16 product with weights converted for it.
_FEW_ROWS = 8


class SmallLinear(nn.Module):
    """A Linear layer whose weights are kept in bfloat16 or int8; for inference.

    Inputs are rounded to bfloat16, products are summed in float32, the result has the input's dtype. An 8-bit weight
    is an integer in [-127, 127] times its output's scale, max |weight| / 127.

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
        exact = linear.weight.detach().float()
        scale = None
        if kind == "int8":
            # A row of zeros stays one, whatever its scale.
            scale = exact.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
            exact = (exact / scale.unsqueeze(1)).round()
        self.register_buffer("weight", exact.to(torch.int8 if kind == "int8" else torch.bfloat16))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        rows = x.to(torch.bfloat16).flatten(0, -2)
        if self.scale is None:
            y = F.linear(rows, self.weight).to(x.dtype)
        elif x.device.type == "cpu" and rows.shape[0] <= _FEW_ROWS:
            ones = torch.ones(self.out_features, dtype=torch.bfloat16)
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, ones).to(x.dtype) * self.scale.to(x.dtype)
        else:
            # Integers up to 127 are exact in bfloat16; the scale is not, and comes after the product.
            y = F.linear(rows, self.weight.to(torch.bfloat16)).to(x.dtype) * self.scale.to(x.dtype)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, kind={self.kind!r}"
