"""JAX and XLA under torch: tensors handed over by DLPack without a copy, gradients by JAX's vjp.

The numbers are those of `gateloop_transformer.jax.ops`; here is only the bridge. Complex values cross it as
pairs of real arrays. Contiguous tensors are shared, others are copied once. CPU only.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from gateloop_transformer.ops.pairs import Pair, compute_dtype
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan

INSTALL_HINT = "JAX is not installed; `pip install gateloop-transformer[jax]`"


def installed() -> bool:
    """Whether JAX can be imported."""
    return importlib.util.find_spec("jax") is not None


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Needs JAX, tensors on the CPU, floating point or complex."""
    if device.type != "cpu":
        return "the bridge to JAX is for tensors on the CPU"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128):
        return "needs floating point or complex tensors"
    return None if installed() else INSTALL_HINT


def _to_jax(value: Any) -> Any:
    """Tensors in any nesting of tuples as JAX arrays, sharing memory where contiguous."""
    import jax

    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_to_jax(item) for item in value)
    return jax.dlpack.from_dlpack(value.detach().contiguous())


def _to_torch(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_to_torch(item) for item in value)
    return torch.utils.dlpack.from_dlpack(value)


def _join(pair: Any) -> Any:
    import jax

    if pair is None:
        return None
    re, im = pair
    return re if im is None else jax.lax.complex(re, im)


def _split(value: Any) -> Any:
    import jax.numpy as jnp

    return (value.real, value.imag) if jnp.iscomplexobj(value) else (value, None)


def _linear_scan(reverse: bool, resets: Any, gates: Any, inputs: Any, initial: Any) -> Any:
    from gateloop_transformer.jax.ops import linear_scan

    return _split(linear_scan(_join(gates), _join(inputs), _join(initial), reverse=reverse, resets=resets))


def _gate_loop(reverse: bool, resets: Any, q: Any, k: Any, v: Any, gates: Any, initial: Any) -> Any:
    from gateloop_transformer.jax.ops import gate_loop

    y, final = gate_loop(q, k, v, _join(gates), _join(initial), reverse=reverse, resets=resets)
    return y, _split(final)


@functools.cache
def _compiled(function: Callable[..., Any], reverse: bool, backward: bool) -> Callable[..., Any]:
    import jax

    forward = functools.partial(function, reverse)

    def gradient(resets: Any, primals: Any, cotangents: Any) -> Any:
        return jax.vjp(functools.partial(forward, resets), *primals)[1](cotangents)

    return jax.jit(gradient if backward else forward)


def _run(function: Callable[..., Any], reverse: bool, *arguments: Any, backward: bool = False) -> Any:
    """The jitted function (or its vjp) on torch tensors. Waits: torch may write to shared memory afterwards."""
    import jax

    with _in_64_bits():
        results = _compiled(function, reverse, backward)(*_to_jax(arguments))
        return _to_torch(jax.block_until_ready(results))


def _in_64_bits() -> AbstractContextManager[None]:
    """Inside, JAX takes 64-bit values as they are."""
    import jax
    import jax.experimental

    # JAX before 0.8 has it among its experimental names only.
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    context: AbstractContextManager[None] = home.enable_x64(True)
    return context


def _one_precision(*pairs: Pair | None) -> list[Any]:
    """All in float64 if one is, else in float32: JAX has no complex type below it, and mixes none."""
    dtype = compute_dtype(*(pair.re.dtype for pair in pairs if pair is not None))
    return [None if pair is None else pair.map(lambda x: x.to(dtype)) for pair in pairs]


def linear_scan_forward(scan: LinearScan) -> Pair:
    """h[t] = a[t] h[t-1] + x[t]."""
    pairs = _one_precision(scan.gates, scan.inputs, scan.initial)
    return Pair(*_run(_linear_scan, scan.reverse, scan.layout.resets, *pairs))


def linear_scan_backward(scan: LinearScan, states: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
    """JAX's vjp of the forward."""
    start = scan.initial or Pair(torch.zeros_like(scan.inputs.re[:, 0]))
    *primals, grad = _one_precision(scan.gates, scan.inputs, start, grad)
    arguments = scan.reverse, scan.layout.resets, tuple(primals), tuple(grad)
    gradients = _run(_linear_scan, *arguments, backward=True)
    d_gates, d_inputs, d_initial = (Pair(*gradient) for gradient in gradients)
    return d_gates, d_inputs, d_initial


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """S[t] = a[t] S[t-1] + k[t] ⊗ v[t], y[t] = Re(q[t]ᵀ S[t])."""
    pairs = _one_precision(loop.gates, loop.initial)
    y, final = _run(_gate_loop, loop.reverse, loop.layout.resets, *loop[:3], *pairs)
    return y, Pair(*final)


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """JAX's vjp of the forward."""
    start = loop.initial or Pair(torch.zeros_like(grad_final.re))
    if grad_final.im is not None and loop.gates.im is None:
        start = start.as_complex()
    gates, start, grad_final = _one_precision(loop.gates, start, grad_final)
    arguments = loop.reverse, loop.layout.resets, (*loop[:3], gates, start), (grad, tuple(grad_final))
    dq, dk, dv, d_gates, d_initial = _run(_gate_loop, *arguments, backward=True)
    return dq, dk, dv, Pair(*d_gates), Pair(*d_initial)
