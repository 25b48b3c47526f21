"""The JAX side of the library: functions of arrays, importing no torch."""

from gateloop_transformer.jax.ops import gate_loop, linear_scan

__all__ = ["gate_loop", "linear_scan"]
