"""Pure functions of tensors: the recurrences of GateLoop and their gates."""

from gateloop_transformer.ops.associative_scan import associative_scan
from gateloop_transformer.ops.channel_loop import channel_gate_loop, simple_gate_loop
from gateloop_transformer.ops.context_parallel import context_parallel
from gateloop_transformer.ops.dispatch import available_backends
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.gates import paper, polar, ring, ring_input_scale
from gateloop_transformer.ops.heinsen import heinsen_scan
from gateloop_transformer.ops.linear_scan import linear_scan
from gateloop_transformer.ops.rms_norm import rms_norm
from gateloop_transformer.ops.surrogate_attention import surrogate_attention

__all__ = [
    "associative_scan",
    "available_backends",
    "channel_gate_loop",
    "context_parallel",
    "gate_loop",
    "heinsen_scan",
    "linear_scan",
    "paper",
    "polar",
    "ring",
    "ring_input_scale",
    "rms_norm",
    "simple_gate_loop",
    "surrogate_attention",
]
