"""SimpleGateLoopLayer: a real-gated linear recurrence per channel, to add beside attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gateloop_transformer.layers.gate_looped import check_input
from gateloop_transformer.layers.norm import RMSNorm
from gateloop_transformer.layers.padding import over_steps
from gateloop_transformer.layers.pickled import revive
from gateloop_transformer.layers.state import SimpleGateLoopState, check_state, start_of
from gateloop_transformer.ops.backends.jax_xla import INSTALL_HINT, installed
from gateloop_transformer.ops.channel_loop import simple_gate_loop
from gateloop_transformer.ops.context_parallel import refuse
from gateloop_transformer.ops.dispatch import check_name
from gateloop_transformer.ops.heinsen import heinsen_scan
from gateloop_transformer.ops.layout import PLAIN, Layout
from gateloop_transformer.ops.linear_scan import linear_scan
from gateloop_transformer.ops.pairs import compute_dtype
from gateloop_transformer.ops.recurrences import last_states


def least_gate(dtype: torch.dtype) -> float:
    """The gate that smaller ones count as in the original's log space."""
    return 1e-7 if dtype == torch.float16 else 1e-20


def gate_loop_operator(
    q: Tensor,
    kv: Tensor,
    a: Tensor,
    cache: Sequence[Tensor] | None = None,
    heinsen: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q[t] · h[t] with h[t] = a[t] h[t-1] + kv[t]: the original's operator of `SimpleGateLoopLayer`.

    Args:
        q: (B, T, D), in the original's layer (B·dim, T, 1).
        kv: (B, T, D).
        a: gates (B, T, D).
        cache: what an earlier call returned: the product of all gates so far, which has no effect on the output, and h,
            each (B, D).
        heinsen: scan in log space; a is then real, and counts as 1e-20 (float16: 1e-7) where it is less.
        backend: "auto", or a backend's name; without effect in log space.

    Returns:
        q · h (B, T, D), and the cache that the next call takes.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    start = None if cache is None else cache[1]
    if heinsen:
        a = a.clamp(min=least_gate(a.dtype))
        states = heinsen_scan(a, kv, start)
    else:
        states = linear_scan(a, kv, start, backend=backend)
    product = a.prod(1) if cache is None else a.prod(1) * cache[0]
    return q * states, (product, last_states(states, start, False, PLAIN))


def _arguments(original: Mapping[str, Any]) -> dict[str, Any]:
    """What has a layer with these attributes and parts of the original's; its norms are among the parts."""
    return {
        "dim": original["dim"],
        "use_heinsen": original["use_heinsen"],
        "use_jax_associative_scan": original["use_jax"],
        "reverse": original["reverse"],
    }


class SimpleGateLoopLayer(nn.Module):
    """The simple layer: y = q · h with h[t] = σ(a[t]) h[t-1] + kv[t], per channel, to add beside attention.

    q, kv and a are projections of the normalised input. This is the original's layer, initial weights and results
    included. There is no residual inside.

    Args:
        dim: width.
        prenorm: RMS norm of the input.
        use_heinsen: scan in log space (see `heinsen_scan`).
        use_jax_associative_scan: scan in JAX, on CPU tensors; not together with use_heinsen.
        post_ln: LayerNorm of the output.
        reverse: run time backwards; a cache or state then stands for what comes after x, and no cache is returned.
        backend: "auto", or a backend's name.

    Raises:
        ValueError: use_heinsen and use_jax_associative_scan are both given, or dim is below 1.
        ImportError: use_jax_associative_scan is given, but JAX is not installed.
    """

    def __init__(
        self,
        dim: int,
        prenorm: bool = True,
        use_heinsen: bool = False,
        use_jax_associative_scan: bool = False,
        post_ln: bool = False,
        reverse: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"SimpleGateLoopLayer: dim must be positive, not {dim}")
        if use_heinsen and use_jax_associative_scan:
            raise ValueError("SimpleGateLoopLayer: use_heinsen and use_jax_associative_scan exclude each other")
        if use_jax_associative_scan and backend not in ("auto", "jax"):
            raise ValueError(f"SimpleGateLoopLayer: use_jax_associative_scan excludes backend={backend!r}")
        if use_jax_associative_scan and not installed():
            raise ImportError(f"SimpleGateLoopLayer(use_jax_associative_scan=True): {INSTALL_HINT}")
        check_name(backend)
        self.dim, self.reverse = dim, reverse
        self.use_heinsen, self.use_jax = use_heinsen, use_jax_associative_scan
        self.backend = "jax" if use_jax_associative_scan else backend
        self.norm = RMSNorm(dim) if prenorm else nn.Identity()
        self.to_qkva = nn.Sequential(nn.Linear(dim, 3 * dim, bias=False))
        self.maybe_post_ln = nn.LayerNorm(dim) if post_ln else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cache: Sequence[Tensor] | SimpleGateLoopState | None = None,
        return_cache: bool = False,
        *,
        state: SimpleGateLoopState | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Mix over time.

        Args:
            x: (B, T, dim), B and T may be 0.
            cache: the original's state: two tensors (B·dim, 1), batch-major; the first (the product of all gates so
                far) never affects the output, the second is h. Differentiable, and may be built by hand. A
                `SimpleGateLoopState` in this place is taken as `state`.
            return_cache: return (y, cache).
            state: the state that an earlier call returned; None: h = 0.
            resets: (B, T) booleans, True where the state is cleared before a step; None: nowhere.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone; states have N rows.
            mask: (B, T) booleans, False for padding, on whatever side: such steps change no state and give 0.
            return_state: return (y, state).

        Returns:
            y (B, T, dim) in x's dtype (under autocast, that of a Linear's output); (y, cache) or (y, state) on request.

        Raises:
            ValueError: a shape is wrong, a cache is combined with a state, with resets, documents or padding, or one is
                to be returned with reverse=True.
        """
        check_input("SimpleGateLoopLayer", x, self.dim, self)
        if isinstance(cache, SimpleGateLoopState):
            cache, state = None, cache
        if (cache is not None and state is not None) or (return_cache and return_state):
            raise ValueError("SimpleGateLoopLayer: use either cache and return_cache or state and return_state")
        if self.reverse and return_cache:
            raise ValueError("SimpleGateLoopLayer: reverse=True has no cache to return; use return_state")
        if cache is not None or return_cache:
            refuse("SimpleGateLoopLayer: a cache", "use state and return_state")
        marks = [
            name for name, mark in (("resets", resets), ("cu_seqlens", cu_seqlens), ("mask", mask)) if mark is not None
        ]
        if marks and (cache is not None or return_cache):
            raise ValueError(f"SimpleGateLoopLayer: with {' and '.join(marks)} use state and return_state, not a cache")

        def mix(x: Tensor, layout: Layout) -> Any:
            return self._mix(x, cache, state, layout, return_cache, return_state)

        return over_steps("SimpleGateLoopLayer", x, (resets, cu_seqlens, mask), mix, return_state)

    def _mix(
        self,
        x: Tensor,
        cache: Sequence[Tensor] | None,
        state: SimpleGateLoopState | None,
        layout: Layout,
        return_cache: bool,
        return_state: bool,
    ) -> Any:
        initial = self._initial(x, cache, state, layout)
        qkva = self.to_qkva(self.norm(x))
        y, last = self._loop(qkva, initial, layout)
        y = cast(Tensor, self.maybe_post_ln(y))
        if return_state:
            return y, SimpleGateLoopState(last)
        if not return_cache:
            return y
        gates = torch.sigmoid(qkva[..., 2 * self.dim :].to(compute_dtype(qkva.dtype)))
        product = gates.prod(1).reshape(-1, 1)
        return y, (product if cache is None else product * cache[0], last.reshape(-1, 1))

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SimpleGateLoopState:
        """The state before the first step: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            device: device of the layer's inputs; None: that of its weights.
            dtype: dtype of the layer's inputs; None: that of its weights.

        Raises:
            ValueError: batch is not an integer, or is negative.
        """
        device, dtype = start_of(self, batch, device, dtype)
        return SimpleGateLoopState(torch.zeros(batch, self.dim, device=device, dtype=compute_dtype(dtype)))

    def _initial(
        self, x: Tensor, cache: Sequence[Tensor] | None, state: SimpleGateLoopState | None, layout: Layout
    ) -> Tensor | None:
        """The hidden h before the first step (B, dim)."""
        if state is not None:
            rows = layout.states(x.shape[0])
            check_state("SimpleGateLoopLayer", state, SimpleGateLoopState, {"hidden": (rows, self.dim)})
            return state.hidden
        if cache is None:
            return None
        expected = (x.shape[0] * self.dim, 1)
        parts = list(cache) if isinstance(cache, Sequence) else [cache]
        if len(parts) != 2 or any(not isinstance(part, Tensor) or tuple(part.shape) != expected for part in parts):
            shapes = [tuple(part.shape) if isinstance(part, Tensor) else part for part in parts]
            raise ValueError(
                f"SimpleGateLoopLayer: cache must be two tensors of shape (B·dim, 1) = {expected}, not {shapes}"
            )
        return cache[1].reshape(x.shape[0], self.dim)

    def _loop(self, qkva: Tensor, initial: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Compute q · h (B, T, dim) and the last h (B, dim)."""
        if not self.use_heinsen:
            return simple_gate_loop(qkva, initial, reverse=self.reverse, backend=self.backend, **layout.keywords())
        q, kv, a = qkva.chunk(3, dim=-1)
        gates = torch.sigmoid(a.to(compute_dtype(a.dtype)))
        inputs = kv.to(gates.dtype)
        if self.reverse:
            backwards = layout.flipped()
            start = initial if initial is None or layout.cu_seqlens is None else initial.flip(0)
            hidden = heinsen_scan(gates.flip(1), inputs.flip(1), start, **backwards.keywords()).flip(1)
        else:
            hidden = heinsen_scan(gates, inputs, initial, **layout.keywords())
        return (q * hidden).to(q.dtype), last_states(hidden, initial, self.reverse, layout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, also by the original."""
        nn.Module.__setstate__(self, state if "backend" in state else revive(state, SimpleGateLoopLayer, _arguments))

    @property
    def gate_loop_fn(self) -> Callable[..., Any]:
        """The original's attribute: `gate_loop_operator` with this layer's kind of scan. The layer does not call it."""
        return functools.partial(gate_loop_operator, heinsen=self.use_heinsen, backend=self.backend)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B·dim, T, 1) → (B, T, dim), as in the original. The layer does not call it."""
        return x.reshape(-1, self.dim, x.shape[1]).transpose(1, 2)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        how = "heinsen" if self.use_heinsen else self.backend
        return f"dim={self.dim}, scan={how!r}, reverse={self.reverse}"
