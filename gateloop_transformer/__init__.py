"""GateLoop: sequence layers whose memory is a linear recurrence with data-controlled complex gates.

Names load on first use: importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateloop_transformer.configuration import TransformerConfig
    from gateloop_transformer.decoding.history import History
    from gateloop_transformer.decoding.speculative import DraftReport
    from gateloop_transformer.layers.attention import CausalFullAttention
    from gateloop_transformer.layers.bidirectional import Bidirectional
    from gateloop_transformer.layers.gate_looped import GateLoopedAttention
    from gateloop_transformer.layers.quantized import quantize
    from gateloop_transformer.layers.simple_gate_loop import SimpleGateLoopLayer
    from gateloop_transformer.layers.state import (
        AttentionState,
        GateLoopState,
        SimpleGateLoopState,
        TransformerState,
        describe_state,
        load_state,
        save_state,
    )
    from gateloop_transformer.model import Transformer
    from gateloop_transformer.runs.folder import load_model, load_tokenizer

__version__ = "1.0.0.dev0"

_HOMES = {
    "AttentionState": "gateloop_transformer.layers.state",
    "Bidirectional": "gateloop_transformer.layers.bidirectional",
    "CausalFullAttention": "gateloop_transformer.layers.attention",
    "DraftReport": "gateloop_transformer.decoding.speculative",
    "GateLoopState": "gateloop_transformer.layers.state",
    "GateLoopedAttention": "gateloop_transformer.layers.gate_looped",
    "History": "gateloop_transformer.decoding.history",
    "SimpleGateLoopLayer": "gateloop_transformer.layers.simple_gate_loop",
    "SimpleGateLoopState": "gateloop_transformer.layers.state",
    "Transformer": "gateloop_transformer.model",
    "TransformerConfig": "gateloop_transformer.configuration",
    "TransformerState": "gateloop_transformer.layers.state",
    "describe_state": "gateloop_transformer.layers.state",
    "load_model": "gateloop_transformer.runs.folder",
    "load_state": "gateloop_transformer.layers.state",
    "load_tokenizer": "gateloop_transformer.runs.folder",
    "quantize": "gateloop_transformer.layers.quantized",
    "save_state": "gateloop_transformer.layers.state",
}

__all__ = [
    "AttentionState",
    "Bidirectional",
    "CausalFullAttention",
    "DraftReport",
    "GateLoopState",
    "GateLoopedAttention",
    "History",
    "SimpleGateLoopLayer",
    "SimpleGateLoopState",
    "Transformer",
    "TransformerConfig",
    "TransformerState",
    "describe_state",
    "load_model",
    "load_state",
    "load_tokenizer",
    "quantize",
    "save_state",
]

# Attributes of the original package, too.
_MODULES = ("associative_scan", "gateloop_transformer", "ops", "simplified_gate_loop")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *_MODULES]
