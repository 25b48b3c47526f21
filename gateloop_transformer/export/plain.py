"""Programs of torch's own operators alone: in the place of this library's stand plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gateloop_transformer.ops import channel_loop, gate_loop, head_gates, rms_norm, short_convolution  # noqa: F401
from gateloop_transformer.ops.operator import OPERATORS, Operator
from gateloop_transformer.ops.plain import any_length


class PlainOperators(TorchFunctionMode):
    """Inside, this library's operators are computed by plain torch ones: for what is traced, without a backward pass.

    Args:
        max_length: the longest T, where T is not fixed; None: it is.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        self._max_length = max_length
        self.table: dict[Any, Callable[..., Any]] = {
            **{getattr(torch.ops.gateloop, name).default: self._plain(each) for name, each in OPERATORS.items()},
            # Not every compiler of torch looks through the method.
            Tensor.unflatten: torch.unflatten,
            # ONNX has none. Of gate projections, where squares overflow or vanish, the gate is rounded to the same.
            torch.hypot: lambda x, y: torch.sqrt(x * x + y * y),
            # It would become three operators of ONNX.
            torch.addcmul: lambda x, y, z, value=1: x - y * z if value == -1 else x + y * z,
        }

    def _plain(self, operator: Operator[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> list[Tensor]:
            with any_length(self._max_length):
                return operator.plain(operator.unpacked(arguments))

        return run

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of each of its functions."""
        if function not in self.table:
            return function(*args, **kwargs or {})
        # Torch leaves the mode for this call.
        with self:
            return self.table[function](*args, **kwargs or {})
