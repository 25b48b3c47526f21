"""Which backend computes: the protocol a backend fulfils, the table, and the whole choice policy."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from gateloop_transformer.ops.backends import chunkwise, eager, jax_xla, numba_cpu, triton_gpu
from gateloop_transformer.ops.channels import ChannelBackend, ChannelLoop, elementwise_backward, elementwise_forward
from gateloop_transformer.ops.pairs import Pair
from gateloop_transformer.ops.recurrences import GateLoop, LinearScan


class Backend(Protocol):
    """Numbers only: a forward and a backward per operator, on pairs of real tensors.

    Gradients follow the convention dL/dRe + i·dL/dIm. Arithmetic on gates and states is float32 or
    better whatever the inputs' dtype. Outputs never alias inputs. Shapes as in the public operators.

    A layout has resets at most; documents are only for backends that read them (`FusedBackend`). A step that begins
    anew forgets the state before it by selection, for 0 times NaN is NaN; the gradient of its gate is 0.
    """

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run on such tensors; None when it can."""

    def linear_scan_forward(self, scan: LinearScan) -> Pair:
        """All states."""

    def linear_scan_backward(self, scan: LinearScan, states: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
        """Gradients of gates, inputs and the initial state."""

    def gate_loop_forward(self, loop: GateLoop) -> tuple[Tensor, Pair]:
        """Outputs and the final state."""

    def gate_loop_backward(
        self, loop: GateLoop, grad: Tensor, grad_final: Pair
    ) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
        """Gradients of queries, keys, values, gates and the initial state."""


class FusedBackend(Backend, ChannelBackend, Protocol):
    """A backend whose kernels read documents too, and run in one pass what surrounds the recurrences.

    Its gate loops are those of matrix states; heads of size 1 are channels.
    """

    def reads_layout(self, loop: GateLoop) -> bool:
        """Whether the kernels of such a gate loop know documents."""

    def loop_kept(self, loop: ChannelLoop) -> Tensor:
        """An empty tensor for what the forward pass keeps for the backward pass."""

    def norm_forward(self, x: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
        """The RMS norm of x (..., D) times gamma (D,) or (G, D), in a floating-point type."""

    def norm_backward(self, grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and gamma."""

    def conv_forward(self, inputs: Tensor, weight: Tensor, silu: bool) -> Tensor:
        """The convolution of inputs (B, L, D) by weight (D, taps), through a SiLU if asked for."""

    def conv_backward(self, grad: Tensor, inputs: Tensor, weight: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
        """Gradients of inputs and weight."""

    def gates_forward(self, projections: Tensor, gate: str, bias: Pair | None, real: bool) -> list[Tensor]:
        """Gates (..., H), real and, unless `real`, imaginary part, and for "ring" the scale of the inputs."""

    def gates_backward(
        self, grad: list[Tensor], projections: Tensor, gate: str, bias: Pair | None, real: bool, fraction: float
    ) -> tuple[Tensor, Pair | None]:
        """Gradients of projections and bias."""


# In order of preference: "auto" takes the first that has no reason against. The last, "eager", runs everything.
TABLE: dict[str, Backend] = {
    "numba": numba_cpu,
    "triton": triton_gpu,
    "chunkwise": chunkwise,
    "jax": jax_xla,
    "eager": eager,
}

FUSED: dict[str, FusedBackend] = {"numba": numba_cpu, "triton": triton_gpu}


def reasons_against(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Per backend, why it cannot run on tensors of this device and dtype; None when it can."""
    return {name: backend.unsupported(device, dtype) for name, backend in TABLE.items()}


def check_name(backend: str) -> None:
    """`backend` is "auto" or in the table.

    Raises:
        ValueError: it is not.
    """
    if backend != "auto" and backend not in TABLE:
        raise ValueError(f"unknown backend {backend!r}; there are 'auto', {', '.join(map(repr, TABLE))}")


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that will compute.

    Args:
        backend: "auto" or a name.
        device: of the tensors.
        dtype: of the tensors.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: the backend asked for cannot run these tensors.
    """
    check_name(backend)
    if backend != "auto":
        reason = TABLE[backend].unsupported(device, dtype)
        if reason:
            raise NotImplementedError(f"backend {backend!r} cannot run {dtype} on {device}: {reason}")
        return backend
    for name, candidate in TABLE.items():
        if candidate.unsupported(device, dtype) is None:
            return name
    reasons = "; ".join(f"{name}: {reason}" for name, reason in reasons_against(device, dtype).items())
    raise NotImplementedError(f"no backend can run {dtype} on {device}: {reasons}")


def reads_layout(loop: GateLoop) -> bool:
    """Whether the kernels of a gate loop's backend know documents."""
    return loop.backend in FUSED and FUSED[loop.backend].reads_layout(loop)


def gate_loop_forward(loop: GateLoop) -> tuple[Tensor, Pair]:
    """Outputs and the final state, from the backend that the loop names."""
    if loop.backend in FUSED and loop.elementwise():
        return elementwise_forward(FUSED[loop.backend], loop)
    return TABLE[loop.backend].gate_loop_forward(loop)


def gate_loop_backward(loop: GateLoop, grad: Tensor, grad_final: Pair) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """Gradients of queries, keys, values, gates and the initial state."""
    if loop.backend in FUSED and loop.elementwise():
        return elementwise_backward(FUSED[loop.backend], loop, grad, grad_final)
    return TABLE[loop.backend].gate_loop_backward(loop, grad, grad_final)


def unwatched(*tensors: Tensor) -> bool:
    """Whether a backend may be called past torch's dispatcher, as far as values go.

    So it is where nothing watches (no compiler, tracer, transformation or mode), and where the tensors are what lies
    in memory (no lazy negation).
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(tensor) not in (Tensor, Parameter) or tensor.is_neg() for tensor in tensors)
    )


def direct(*tensors: Tensor) -> bool:
    """Whether numbers may be computed past torch's dispatcher: no gradient can be asked for either."""
    return not torch.is_grad_enabled() and unwatched(*tensors)


def available_backends(example: Tensor) -> list[str]:
    """The backends that can run on tensors of `example`'s device and dtype, the preferred one first.

    Each of them runs every operator with all its options: docs/results/backends.md.

    >>> available_backends(torch.zeros(1))[0]
    'numba'
    """
    return [name for name, reason in reasons_against(example.device, example.dtype).items() if reason is None]
