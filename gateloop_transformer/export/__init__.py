"""Models for other runtimes: programs of `torch.export`, and ONNX files with a runner that needs no torch.

Names load on first use: the runner imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateloop_transformer.export.onnx import export_onnx
    from gateloop_transformer.export.onnx_runtime import OnnxGenerator
    from gateloop_transformer.export.program import export_program

_HOMES = {"OnnxGenerator": "onnx_runtime", "export_onnx": "onnx", "export_program": "program"}

__all__ = ["OnnxGenerator", "export_onnx", "export_program"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
