"""The gate loop layers as descriptions with two functions: `init(key)` → parameters, `apply(parameters, x)` → y.

A description holds the arguments of the torch layer of its name, in the same order, and no arrays. It can be hashed and
so be static under `jit`. Parameters are trees of dictionaries with torch's names.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gateloop_transformer.arguments import check_fraction, check_rank, check_start
from gateloop_transformer.jax.checks import Layout, array
from gateloop_transformer.jax.gates import check_gate, head_gates, ring_start
from gateloop_transformer.jax.ops import channel_gate_loop, gate_loop, simple_gate_loop
from gateloop_transformer.jax.pairs import Array, compute_dtype
from gateloop_transformer.jax.parts import (
    Params,
    convolution,
    layer_norm,
    linear,
    new_convolution,
    new_layer_norm,
    new_linear,
    rms_norm,
)
from gateloop_transformer.jax.states import GateLoopState, SimpleGateLoopState, check_state


def check_input(layer: str, x: Any, dim: int) -> Array:
    """Check that x is a floating-point array (B, T, dim).

    Raises:
        ValueError: it is not.
    """
    x = array(layer, "input", x)
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{layer}: input must have shape (B, T, {dim}), not {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{layer}: input must be floating point, not {x.dtype}")
    return x


@dataclass(frozen=True)
class GateLoopedAttention:
    """A gate loop layer: y = out(SiLU(gates(x)) · norm(Re(q S))) with S[t] = a(x[t]) S[t-1] + k ⊗ v, per head.

    The defaults are the original's. Memory is linear in T; a sequence may be fed in pieces of any length through
    `state`.

    Args:
        dim: width of input and output.
        heads: number of heads, each with one gate; None: as many as `dim_inner` (head size 1).
        dim_inner: width of q, k and v; None: dim. A multiple of heads.
        checkpoint_gate_looped_attn: accepted for compatibility; memory is linear either way.
        add_swish_gating: multiply by SiLU(Linear(x)) before the output projection.
        sub_ln: LayerNorm over the merged heads.
        frac_gradient_state_transition: factor on the gradient into the gate projection.
        gate: "polar" (the original's, |a| ≥ ½), "paper" (|a| in (0, 1), free phase) or "ring" (starts with memories
            spread up to `max_memory`, inputs scaled by √(1-|a|²)).
        head_norm: RMS norm of each head's output, before the swish gate. Head size above 1.
        qk_norm: RMS norm of each head's queries and keys. Head size above 1.
        conv_size: taps of a causal depthwise convolution before q, k, v and the gate; 0 for none.
        conv_silu: SiLU after the convolution, whose weights then start at random, as in Mamba, instead of near the
            identity.
        qkv_bias: biases of q, k and v; those of q and k start at 1.
        max_memory: the longest memory of a spread start, in steps.
        min_memory: the shortest memory of a spread start, in steps.
        phase_spread: standard deviation of what the data first adds to the phases of a spread start, in radians.
        spread_start: gates start with memories spread log-uniformly up to `max_memory` instead of with a Linear's own
            weights; only "ring" and "paper" can. None: only "ring" does.
        gate_rank: rank of the gate projection, which is then a product of two, (2·heads, gate_rank) and
            (gate_rank, dim), as in Mamba. None: one matrix of full rank, (2·heads, dim).
        fixed_gates: gates are learned but do not depend on the data, as in an LRU; "ring" only.
        reverse: run from the last step to the first, the convolution too; a state then stands for what comes after x.

    Raises:
        ValueError: heads do not divide dim_inner, the gate is unknown, head size 1 rules an option out, or a number is
            out of range.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927.
    """

    dim: int
    heads: int | None = None
    dim_inner: int | None = None
    checkpoint_gate_looped_attn: bool = True
    add_swish_gating: bool = True
    sub_ln: bool = False
    frac_gradient_state_transition: float = 0.9
    _: KW_ONLY
    gate: str = "polar"
    head_norm: bool = False
    qk_norm: bool = False
    conv_size: int = 0
    conv_silu: bool = False
    qkv_bias: bool = False
    max_memory: float = 1024
    min_memory: float = 1
    phase_spread: float = 0.0
    spread_start: bool | None = None
    gate_rank: int | None = None
    fixed_gates: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        """Refuse options that are out of range or do not fit together."""
        dim_inner = self.dim if self.dim_inner is None else self.dim_inner
        heads = dim_inner if self.heads is None else self.heads
        if min(self.dim, dim_inner, heads) < 1 or dim_inner % heads:
            raise ValueError(
                f"GateLoopedAttention: dim, heads and dim_inner must be positive and heads must divide dim_inner, "
                f"got dim={self.dim}, heads={heads}, dim_inner={dim_inner}"
            )
        object.__setattr__(self, "dim_inner", dim_inner)
        object.__setattr__(self, "heads", heads)
        check_gate("GateLoopedAttention", self.gate)
        if self.conv_size < 0:
            raise ValueError(f"GateLoopedAttention: conv_size must be 0 or more taps, not {self.conv_size}")
        if not self.max_memory >= 1:
            raise ValueError(f"GateLoopedAttention: max_memory must be at least 1 step, not {self.max_memory}")
        if self.conv_silu and not self.conv_size:
            raise ValueError("GateLoopedAttention: conv_silu needs a convolution: a conv_size of 1 or more")
        check_start("GateLoopedAttention", self.gate, self.spread_start, self.fixed_gates)
        check_rank("GateLoopedAttention", self.gate_rank, self.fixed_gates)
        if not 0 <= self.phase_spread < math.inf:
            raise ValueError(
                f"GateLoopedAttention: phase_spread must be finite, 0 or more radians, not {self.phase_spread}"
            )
        check_fraction("GateLoopedAttention", "frac_gradient_state_transition", self.frac_gradient_state_transition)
        if (self.head_norm or self.qk_norm) and self.dim_head < 2:
            raise ValueError("normalising heads of size 1 leaves only signs; use fewer heads")

    @property
    def inner(self) -> int:
        """Width of q, k and v."""
        assert self.dim_inner is not None
        return self.dim_inner

    @property
    def count(self) -> int:
        """Number of heads."""
        assert self.heads is not None
        return self.heads

    @property
    def dim_head(self) -> int:
        """Size of a head."""
        return self.inner // self.count

    def init(self, key: Array) -> Params:
        """Draw initial parameters."""
        keys = iter(jax.random.split(key, 8))
        params: Params = {}
        if self.conv_size:
            params["conv"] = new_convolution(next(keys), self.dim, self.conv_size, self.conv_silu)
        params["to_qkv"] = new_linear(next(keys), self.dim, 3 * self.inner, bias=self.qkv_bias)
        if self.qkv_bias:
            params["to_qkv"]["bias"] = (jnp.arange(3 * self.inner) < 2 * self.inner).astype(
                params["to_qkv"]["weight"].dtype
            )
        if not self.fixed_gates:
            params["to_a"] = self._new_projection(next(keys))
        if self.gate == "ring":
            params |= {"ring_logit": jnp.zeros(self.count), "ring_phase": jnp.zeros(self.count)}
        if self.gate == "ring" if self.spread_start is None else self.spread_start:
            self._spread(params, next(keys), next(keys))
        norms = {"q_norm": self.qk_norm, "k_norm": self.qk_norm, "head_norm": self.head_norm}
        params |= {name: {"gamma": jnp.ones((self.count, self.dim_head))} for name, there in norms.items() if there}
        if self.sub_ln:
            params["maybe_sub_ln"] = new_layer_norm(self.inner)
        if self.add_swish_gating:
            params["to_gates"] = {"0": new_linear(next(keys), self.dim, self.inner, bias=False)}
        if self.inner != self.dim or self.add_swish_gating:
            params["to_out"] = new_linear(next(keys), self.inner, self.dim, bias=False)
        return params

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> GateLoopState:
        """The state before the first step: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            dtype: dtype of the layer's inputs.
        """
        real = jnp.zeros((batch, self.count, self.dim_head, self.dim_head), compute_dtype(dtype))
        return GateLoopState(real, real, jnp.zeros((batch, max(self.conv_size - 1, 0), self.dim), dtype))

    def _new_projection(self, key: Array) -> Params:
        """Draw the gate projection; with a `gate_rank`, the numbers in between keep about the inputs' mean square."""
        bias = self.gate != "ring"
        if self.gate_rank is None:
            return {"0": new_linear(key, self.dim, 2 * self.count, bias=bias)}
        first, second = jax.random.split(key)
        down = self.dim**-0.5 * jax.random.normal(first, (self.gate_rank, self.dim))
        return {"0": {"weight": down}, "1": new_linear(second, self.gate_rank, 2 * self.count, bias=bias)}

    def _spread(self, params: Params, key: Array, noise: Array) -> None:
        """Set memories and phases by `ring_start`; phases depend on the data as far as `phase_spread` says."""
        logits, phases = ring_start(key, self.count, self.max_memory, self.min_memory)
        if self.fixed_gates:
            phases = phases + self.phase_spread * jax.random.normal(noise, phases.shape)
        else:
            projection = params["to_a"][max(params["to_a"])]
            wide = projection["weight"].shape[1]
            spread = self.phase_spread / wide**0.5 * jax.random.normal(noise, (self.count, wide))
            projection["weight"] = projection["weight"].at[1::2].set(spread)
            if "bias" in projection:
                projection["bias"] = jnp.stack([logits, phases], -1).reshape(-1)
        if self.gate == "ring":
            params |= {"ring_logit": logits, "ring_phase": phases}

    def apply(
        self,
        params: Params,
        x: Array,
        state: GateLoopState | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Array | None = None,
        cu_seqlens: Array | None = None,
        ablate_complex: bool = False,
        return_state: bool = False,
        axis_name: str | None = None,
    ) -> Any:
        """Mix over time.

        Args:
            params: parameters as `init` gives them.
            x: (B, T, dim), B and T may be 0.
            state: the state that an earlier call returned; None: the start.
            ablate_state_transition: all gates are 1.
            resets: (B, T) booleans, True where the state is cleared before a step; None: nowhere.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone; states have N rows.
            ablate_complex: gates are real: the imaginary projection ("polar") or the phase is dropped.
            return_state: return (y, state) instead of y.
            axis_name: the axis of the mesh along which T is sharded, inside of `jax.shard_map`; states are the same
                everywhere.

        Returns:
            y (B, T, dim) in x's dtype, or (y, state).

        Raises:
            ValueError: x, state, resets or cu_seqlens has the wrong shape or dtype.
        """
        x = check_input("GateLoopedAttention", x, self.dim)
        layout = Layout("GateLoopedAttention", x, resets, cu_seqlens)
        marks = {"resets": resets, "cu_seqlens": cu_seqlens, "reverse": self.reverse, "axis_name": axis_name}
        past = self._past(x, state, layout)
        mixed = x
        if self.conv_size:
            mixed, past = convolution(
                params["conv"], x, past, layout, silu=self.conv_silu, reverse=self.reverse, axis_name=axis_name
            )
        if self.dim_head == 1 and not (ablate_complex or ablate_state_transition):
            y, final = self._channels(params, x, mixed, state, marks)
            real, imaginary = (part[..., None, None] for part in final)
        else:
            y, (real, imaginary) = self._heads(params, mixed, state, marks, ablate_complex, ablate_state_transition)
            y = self._output(params, x, y)
        return (y, GateLoopState(real, imaginary, past)) if return_state else y

    def _past(self, x: Array, state: GateLoopState | None, layout: Layout) -> Array:
        """The inputs before x that the convolution needs."""
        taps = max(self.conv_size - 1, 0)
        if state is None:
            return jnp.zeros((layout.states, taps, self.dim), x.dtype)
        matrix = (layout.states, self.count, self.dim_head, self.dim_head)
        shapes = {"real": matrix, "imaginary": matrix, "inputs": (layout.states, taps, self.dim)}
        check_state("GateLoopedAttention", state, GateLoopState, dict(shapes))
        return state.inputs

    def _channels(
        self, params: Params, x: Array, mixed: Array, state: GateLoopState | None, marks: dict[str, Any]
    ) -> tuple[Array, tuple[Array, Array]]:
        """Mix at head size 1: output and the state's parts (B, heads)."""
        # A norm between the recurrence and its SiLU gate keeps the two apart.
        fused = self.add_swish_gating and not self.sub_ln
        initial = None
        if state is not None:
            initial = state.real[..., 0, 0], state.imaginary[..., 0, 0]
        y, final = channel_gate_loop(
            linear(params["to_qkv"], mixed),
            self._projections(params, mixed),
            initial,
            gate=self.gate,
            bias=self._bias(params),
            swish=linear(params["to_gates"]["0"], x) if fused else None,
            fraction=self.frac_gradient_state_transition,
            **marks,
        )
        return linear(params["to_out"], y) if fused else self._output(params, x, y[..., None]), final

    def _heads(
        self,
        params: Params,
        mixed: Array,
        state: GateLoopState | None,
        marks: dict[str, Any],
        ablate_complex: bool,
        ablate_state_transition: bool,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The heads' outputs (B, T, heads, dim_head) and the state's parts (B, heads, K, V)."""
        shape = (*mixed.shape[:2], self.count, self.dim_head)
        q, k, v = (part.reshape(shape) for part in jnp.split(linear(params["to_qkv"], mixed), 3, -1))
        if self.qk_norm:
            q, k = rms_norm(q, params["q_norm"]["gamma"]), rms_norm(k, params["k_norm"]["gamma"])
        if ablate_state_transition:
            real, imaginary = jnp.ones(shape[:-1], compute_dtype(mixed.dtype)), None
        else:
            real, imaginary, scale = head_gates(
                self._projections(params, mixed),
                gate=self.gate,
                bias=self._bias(params),
                fraction=self.frac_gradient_state_transition,
                real=ablate_complex,
            )
            k = k if scale is None else k * scale.astype(k.dtype)[..., None]
        if state is None and imaginary is None:
            # Real all the way: half of the arithmetic.
            y, final = gate_loop(q, k, v, real, **marks)
            return y, (final, jnp.zeros_like(final))
        gates = real, jnp.zeros_like(real) if imaginary is None else imaginary
        y, parts = gate_loop(q, k, v, gates, None if state is None else (state.real, state.imaginary), **marks)
        return y, parts

    def _projections(self, params: Params, x: Array) -> Array:
        """Project to the pairs that gates are made of, without the bias (B, T, 2·heads)."""
        if self.fixed_gates:
            return jnp.zeros((*x.shape[:2], 2 * self.count), x.dtype)
        for name in sorted(params["to_a"]):
            x = linear(params["to_a"][name], x)
        return x

    def _bias(self, params: Params) -> tuple[Array, Array] | None:
        return (params["ring_logit"], params["ring_phase"]) if self.gate == "ring" else None

    def _output(self, params: Params, x: Array, y: Array) -> Array:
        """Apply norms, swish gate and output projection to the heads' outputs (B, T, heads, dim_head)."""
        if self.head_norm:
            y = rms_norm(y, params["head_norm"]["gamma"])
        y = y.reshape(*y.shape[:2], self.inner)
        if self.sub_ln:
            y = layer_norm(params["maybe_sub_ln"], y)
        if self.add_swish_gating:
            y = jax.nn.silu(linear(params["to_gates"]["0"], x)) * y
        return linear(params["to_out"], y) if "to_out" in params else y


@dataclass(frozen=True)
class SimpleGateLoopLayer:
    """The simple layer: y = q · h with h[t] = σ(a[t]) h[t-1] + kv[t], per channel.

    This is the original's layer: q, kv and a are projections of the normalised input. There is no residual inside.

    Args:
        dim: width.
        prenorm: RMS norm of the input.
        use_heinsen: accepted for compatibility; the scan is the same.
        use_jax_associative_scan: accepted for compatibility.
        post_ln: LayerNorm of the output.
        reverse: run time backwards; a state then stands for what comes after x.

    Raises:
        ValueError: dim is below 1.
    """

    dim: int
    prenorm: bool = True
    use_heinsen: bool = False
    use_jax_associative_scan: bool = False
    post_ln: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        """Refuse a width below 1."""
        if self.dim < 1:
            raise ValueError(f"SimpleGateLoopLayer: dim must be positive, not {self.dim}")

    def init(self, key: Array) -> Params:
        """Draw initial parameters."""
        params: Params = {"norm": {"gamma": jnp.ones(self.dim)}} if self.prenorm else {}
        params["to_qkva"] = {"0": new_linear(key, self.dim, 3 * self.dim, bias=False)}
        return params | ({"maybe_post_ln": new_layer_norm(self.dim)} if self.post_ln else {})

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> SimpleGateLoopState:
        """The state before the first step: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            dtype: dtype of the layer's inputs.
        """
        return SimpleGateLoopState(jnp.zeros((batch, self.dim), compute_dtype(dtype)))

    def apply(
        self,
        params: Params,
        x: Array,
        state: SimpleGateLoopState | None = None,
        *,
        resets: Array | None = None,
        cu_seqlens: Array | None = None,
        return_state: bool = False,
        axis_name: str | None = None,
    ) -> Any:
        """Mix over time.

        Args:
            params: parameters as `init` gives them.
            x: (B, T, dim), B and T may be 0.
            state: the state that an earlier call returned; None: h = 0.
            resets: (B, T) booleans, True where the state is cleared before a step; None: nowhere.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row.
            return_state: return (y, state).
            axis_name: the axis of the mesh along which T is sharded, inside of `jax.shard_map`.

        Returns:
            y (B, T, dim) in x's dtype, or (y, state).

        Raises:
            ValueError: x, state, resets or cu_seqlens has the wrong shape or dtype.
        """
        x = check_input("SimpleGateLoopLayer", x, self.dim)
        layout = Layout("SimpleGateLoopLayer", x, resets, cu_seqlens)
        if state is not None:
            check_state("SimpleGateLoopLayer", state, SimpleGateLoopState, {"hidden": (layout.states, self.dim)})
        normed = rms_norm(x, params["norm"]["gamma"]) if self.prenorm else x
        y, last = simple_gate_loop(
            linear(params["to_qkva"]["0"], normed),
            None if state is None else state.hidden,
            reverse=self.reverse,
            resets=resets,
            cu_seqlens=cu_seqlens,
            axis_name=axis_name,
        )
        y = layer_norm(params["maybe_post_ln"], y) if self.post_ln else y
        return (y, SimpleGateLoopState(last)) if return_state else y
