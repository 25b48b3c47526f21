"""The JAX side of the library: operators, gates, layers and the Transformer as functions; it imports no torch.

Layers are descriptions without arrays: `layer.init(key)` gives parameters, `layer.apply(parameters, x)` computes.
`gateloop_transformer.jax.modules` has them as Equinox modules.
"""

from gateloop_transformer.jax.attention import CausalFullAttention
from gateloop_transformer.jax.convert import (
    flatten,
    load_model,
    load_params,
    parameter_groups,
    save_model,
    save_params,
    unflatten,
)
from gateloop_transformer.jax.gates import head_gates, paper, polar, ring, ring_input_scale, ring_start
from gateloop_transformer.jax.generation import generate
from gateloop_transformer.jax.layers import GateLoopedAttention, SimpleGateLoopLayer
from gateloop_transformer.jax.model import Transformer
from gateloop_transformer.jax.ops import channel_gate_loop, gate_loop, linear_scan, simple_gate_loop
from gateloop_transformer.jax.parts import rms_norm
from gateloop_transformer.jax.states import AttentionState, GateLoopState, SimpleGateLoopState, TransformerState

__all__ = [
    "AttentionState",
    "CausalFullAttention",
    "GateLoopState",
    "GateLoopedAttention",
    "SimpleGateLoopLayer",
    "SimpleGateLoopState",
    "Transformer",
    "TransformerState",
    "channel_gate_loop",
    "flatten",
    "gate_loop",
    "generate",
    "head_gates",
    "linear_scan",
    "load_model",
    "load_params",
    "paper",
    "parameter_groups",
    "polar",
    "ring",
    "ring_input_scale",
    "ring_start",
    "rms_norm",
    "save_model",
    "save_params",
    "simple_gate_loop",
    "unflatten",
]
