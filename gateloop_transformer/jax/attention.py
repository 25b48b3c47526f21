"""Causal attention as a description with `init` and `apply`, with the torch layer's arguments and results."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gateloop_transformer.arguments import check_fraction
from gateloop_transformer.jax.checks import Layout
from gateloop_transformer.jax.gates import polar, scale_gradient
from gateloop_transformer.jax.layers import check_input
from gateloop_transformer.jax.ops import gate_loop
from gateloop_transformer.jax.pairs import Array, Pair, compute_dtype
from gateloop_transformer.jax.parts import Params, linear, new_linear, rms_norm
from gateloop_transformer.jax.states import AttentionState, check_state


class View(NamedTuple):
    """Which keys, `past` old and T new ones, each of T steps sees.

    positions: positions of the steps in their sequence, (T,) or (B, 1, T); seen: (B,) steps from the start of the
    sequence to the end of the last step; old: (B, past), True for old keys of the current sequence; None: all are;
    segment: (B, T), number of sequences that began up to a step; None: no sequence began.
    """

    past: int
    positions: Array
    seen: Array
    old: Array | None
    segment: Array | None

    @staticmethod
    def of(x: Array, past: int, before: Array | None, resets: Array | None) -> View:
        """The view of x (B, T, dim) after `before` (B,) steps, of which the last `past` have keys."""
        B, T = x.shape[:2]
        steps = jnp.arange(T)
        if before is None:
            positions, old, before = steps, None, jnp.zeros(B, jnp.int32)
        else:
            positions = (before[:, None] + steps)[:, None]
            old = jnp.arange(past, 0, -1) <= before[:, None]
        if resets is None or not T:
            return View(past, positions, before + T, old, None)
        latest = jax.lax.cummax(jnp.where(resets, steps, -1), axis=1)
        since = jnp.where(latest < 0, before[:, None] + steps, steps - latest)
        return View(past, since[:, None], since[:, -1] + 1, old, resets.cumsum(1))

    def mask(self, window: int | None) -> Array:
        """The mask of scores (B or 1, 1, T, past + T), True where a step sees a key."""
        T = self.positions.shape[-1]
        query, key = jnp.arange(T)[:, None], jnp.arange(-self.past, T)
        seen = (key <= query)[None, None]
        if window is not None:
            seen = seen & (query - key < window)
        if self.old is not None:
            mine = jnp.pad(self.old, ((0, 0), (0, T)), constant_values=True)
            seen = seen & mine[:, None, None]
        if self.segment is not None:
            segments = jnp.pad(self.segment, ((0, 0), (self.past, 0)))
            seen = seen & (segments[:, None] == self.segment[:, :, None])[:, None]
        return seen


def rotary(x: Array, positions: Array, freqs: Array) -> Array:
    """Rotate each channel pair (2i, 2i+1) of x (B, heads, T, dim) by position · freqs[i] radians.

    Source: Su et al., RoFormer (2021), section 3.2.
    """
    wide = compute_dtype(x.dtype)
    angles = positions.astype(wide)[..., None] * freqs.astype(wide)
    pairs = x.astype(wide).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd, cos, sin = pairs[..., 0], pairs[..., 1], jnp.cos(angles), jnp.sin(angles)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return turned.reshape(x.shape).astype(x.dtype)


@dataclass(frozen=True)
class CausalFullAttention:
    """Causal attention over all past steps; the defaults are the original's.

    The scores of all steps with all keys are in memory: T² of them, even with a window. A key that a step does not see
    gets a weight of 0, as in torch's own attention: a key or value that is not finite therefore spoils its whole row,
    including earlier steps and other documents. In the other layers it reaches only the results that depend on it.

    Args:
        dim: width of input and output.
        dim_head: size of a head.
        heads: number of heads.
        rotary_emb: rotary position embedding of queries and keys.
        add_swish_gating: multiply the heads' outputs by SiLU(Linear(x)).
        data_dependent_rel_pos: False; True: as released by the original, a product of gates over channel pairs; or
            "gate_loop": as the paper means it, scores Re(q[i] k[j] Π_{j<m≤i} a[m]) with the product over time and one
            gate per channel pair.
        frac_gradient_data_dependent_rel_pos: factor on the gradient into that gate's projection.
        softmax_normalize: softmax over the scores, or the bare scores; None: softmax unless data_dependent_rel_pos.
        qk_norm: RMS norm of each head's queries and keys, before the rotary embedding.
        window: most steps that a step sees, itself included, so that decoding needs constant memory; None: all.

    Raises:
        ValueError: sizes are not positive, dim_head is odd where pairs of channels are needed, or an option is unknown.
    """

    dim: int
    _: KW_ONLY
    dim_head: int = 64
    heads: int = 8
    rotary_emb: bool = False
    add_swish_gating: bool = False
    data_dependent_rel_pos: bool | str = False
    frac_gradient_data_dependent_rel_pos: float = 0.5
    softmax_normalize: bool | None = None
    qk_norm: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that are out of range or do not fit together."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"CausalFullAttention: window must be at least 1 step, not {self.window}")
        if min(self.dim, self.dim_head, self.heads) < 1:
            raise ValueError(
                f"CausalFullAttention: dim, dim_head and heads must be positive, got {self.dim}, {self.dim_head}, "
                f"{self.heads}"
            )
        if self.data_dependent_rel_pos not in (False, True, "gate_loop"):
            raise ValueError(
                "CausalFullAttention: data_dependent_rel_pos must be False, True or 'gate_loop', "
                f"not {self.data_dependent_rel_pos!r}"
            )
        if self.data_dependent_rel_pos and self.dim_head % 2:
            raise ValueError(f"CausalFullAttention: data_dependent_rel_pos needs an even dim_head, not {self.dim_head}")
        if self.rotary_emb and self.dim_head % 2:
            raise ValueError(f"rotary embedding needs an even head size, not {self.dim_head}")
        check_fraction(
            "CausalFullAttention", "frac_gradient_data_dependent_rel_pos", self.frac_gradient_data_dependent_rel_pos
        )
        if self.softmax_normalize is None:
            object.__setattr__(self, "softmax_normalize", not self.data_dependent_rel_pos)

    @property
    def inner(self) -> int:
        """Width of q, k and v."""
        return self.heads * self.dim_head

    def init(self, key: Array) -> Params:
        """Draw initial parameters."""
        keys = jax.random.split(key, 4)
        params: Params = {}
        if self.rotary_emb:
            freqs = 10000.0 ** (-jnp.arange(0, self.dim_head, 2).astype(jnp.float32) / self.dim_head)
            params["rotary_emb"] = {"freqs": freqs}
        params["to_qkv"] = {"0": new_linear(keys[0], self.dim, 3 * self.inner, bias=False)}
        if self.data_dependent_rel_pos:
            params["to_a"] = {"0": new_linear(keys[1], self.dim, self.inner, bias=False)}
        if self.qk_norm:
            params |= {name: {"gamma": jnp.ones((self.heads, self.dim_head))} for name in ("q_norm", "k_norm")}
        if self.add_swish_gating:
            params["to_gates"] = {"0": new_linear(keys[2], self.dim, self.inner, bias=False)}
        params["to_out"] = {"1": new_linear(keys[3], self.inner, self.dim)}
        return params

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> AttentionState:
        """The state before the first step: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            dtype: dtype of the layer's inputs.
        """
        values = jnp.zeros((batch, self.heads, 0, self.dim_head), dtype)
        # Keys that are multiplied by gates are float32 or better.
        keys = values.astype(compute_dtype(dtype)) if self.data_dependent_rel_pos else values
        imaginary = keys if self.data_dependent_rel_pos == "gate_loop" else values
        return AttentionState(keys, imaginary, values, jnp.zeros(batch, jnp.int32))

    def apply(
        self,
        params: Params,
        x: Array,
        state: AttentionState | None = None,
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
            ablate_state_transition: use no data-dependent position.
            resets: (B, T) booleans, True where a step sees none before it; None: nowhere.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row. It cannot be
                combined with a state, given or returned: where a state is wanted, give documents as rows.
            ablate_complex: make the gates of data-dependent positions real.
            return_state: return (y, state) instead of y.
            axis_name: attention cannot be sharded over time here; anything but None is an error.

        Returns:
            y (B, T, dim) in x's dtype, or (y, state).

        Raises:
            ValueError: x, state, resets or cu_seqlens has the wrong shape or dtype.
            NotImplementedError: states of packed documents, or a sharded time axis.
        """
        x = check_input("CausalFullAttention", x, self.dim)
        if axis_name is not None:
            raise NotImplementedError("CausalFullAttention: attention over a sharded time axis is not implemented")
        layout = Layout("CausalFullAttention", x, resets, cu_seqlens)
        marks = layout.resets
        if layout.packed is not None:
            if state is not None or return_state:
                raise NotImplementedError(
                    "CausalFullAttention: packed documents have no states here; give documents as rows of a batch"
                )
            T = x.shape[1]
            begins = jnp.zeros((1, T), bool).at[0, layout.packed.bounds[:-1]].set(True, mode="drop")
            marks = begins if marks is None else marks | begins
        self._check_state(x, state)
        y, new = self._rows(params, x, state, marks, ablate_complex, ablate_state_transition)
        y = y.swapaxes(1, 2).reshape(*x.shape[:2], self.inner)
        if self.add_swish_gating:
            y = y * jax.nn.silu(linear(params["to_gates"]["0"], x))
        y = linear(params["to_out"]["1"], y)
        return (y, self._recent(new)) if return_state else y

    def _check_state(self, x: Array, state: AttentionState | None) -> None:
        if state is None:
            return
        names = ("keys", "keys_imaginary", "values")
        shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(names, (x.shape[0], self.heads, None, self.dim_head))
        check_state("CausalFullAttention", state, AttentionState, {**shapes, "seen": (x.shape[0],)})
        past = state.keys.shape[2]
        imaginary = past if self.data_dependent_rel_pos == "gate_loop" else 0
        if state.values.shape[2] != past or state.keys_imaginary.shape[2] != imaginary:
            raise ValueError(
                f"CausalFullAttention: the state's keys, keys_imaginary and values must hold {past}, {imaginary} and "
                f"{past} steps, not {past}, {state.keys_imaginary.shape[2]} and {state.values.shape[2]}"
            )

    def _rows(
        self,
        params: Params,
        x: Array,
        state: AttentionState | None,
        resets: Array | None,
        ablate_complex: bool,
        ablate_state_transition: bool,
    ) -> tuple[Array, AttentionState]:
        """Compute the heads' outputs (B, heads, T, dim_head), and the keys and values of all steps, old and new."""
        past = 0 if state is None else state.keys.shape[2]
        view = View.of(x, past, None if state is None else state.seen, resets)
        q, k, v = self._project(params, x, view.positions)
        imaginary = jnp.zeros((x.shape[0], self.heads, 0, self.dim_head), k.dtype)
        values = v if state is None else jnp.concatenate([state.values.astype(v.dtype), v], 2)
        if self.data_dependent_rel_pos == "gate_loop":
            gates = self._time_gates(params, x, ablate_complex, ablate_state_transition)
            scores, keys, imaginary = self._gated_scores(q, k, gates, state)
        else:
            if self.data_dependent_rel_pos and not ablate_state_transition:
                q, k = self._channel_gates(params, x, q, k, ablate_complex)
            keys = k if state is None else jnp.concatenate([state.keys.astype(k.dtype), k], 2)
            wide = compute_dtype(q.dtype)
            scores = jnp.einsum("bhid,bhjd->bhij", q, keys.astype(q.dtype), preferred_element_type=wide)
        return self._attend(scores, values, view), AttentionState(keys, imaginary, values, view.seen)

    def _attend(self, scores: Array, values: Array, view: View) -> Array:
        """Turn the scores of seen keys (B, heads, T, past + T) into weights, and multiply them by the values."""
        seen = view.mask(self.window)
        if not self.softmax_normalize:
            return (jnp.where(seen, scores, 0) @ values.astype(scores.dtype)).astype(values.dtype)
        if not scores.size:
            return jnp.zeros((*scores.shape[:3], self.dim_head), values.dtype)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        return (weights @ values.astype(weights.dtype)).astype(values.dtype)

    def _recent(self, state: AttentionState) -> AttentionState:
        """Drop the keys and values that no later step can see."""
        past = state.keys.shape[2]
        if self.window is None or past < self.window:
            return state
        start = max(past - self.window + 1, 0)
        return state.map_steps(lambda part: part[:, :, max(part.shape[2] - past + start, 0) :])

    def _project(self, params: Params, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries (scaled), keys and values (B, heads, T, dim_head)."""
        shape = (*x.shape[:2], self.heads, self.dim_head)
        q, k, v = (part.reshape(shape) for part in jnp.split(linear(params["to_qkv"]["0"], x), 3, -1))
        if self.qk_norm:
            q, k = rms_norm(q, params["q_norm"]["gamma"]), rms_norm(k, params["k_norm"]["gamma"])
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
        if self.rotary_emb:
            # The frequencies are not trained.
            freqs = jax.lax.stop_gradient(params["rotary_emb"]["freqs"])
            q, k = rotary(q, positions, freqs), rotary(k, positions, freqs)
        return q * self.dim_head**-0.5, k, v

    def _gates(self, params: Params, x: Array, ablate_complex: bool) -> Pair:
        """Polar gates (B, T, heads, dim_head/2), one per pair of channels."""
        z = scale_gradient(linear(params["to_a"]["0"], x), self.frac_gradient_data_dependent_rel_pos)
        z = z.reshape(*x.shape[:2], self.heads, self.dim_head // 2, 2)
        real, imaginary = z[..., 0], z[..., 1]
        return Pair(*polar(real, jnp.zeros_like(imaginary) if ablate_complex else imaginary))

    def _channel_gates(self, params: Params, x: Array, q: Array, k: Array, ablate_complex: bool) -> tuple[Array, Array]:
        """Scale as released: q by the real part of the product of gates over channel pairs, k by its inverse.

        Both in float32 or better: the inverse reaches 1e10.
        """
        gates = self._gates(params, x, ablate_complex).map(lambda part: part.swapaxes(1, 2))
        product = gates.map(lambda part: part[..., 0])
        scales = [product.re]
        for pair in range(1, self.dim_head // 2):
            product = product.times(gates.map(lambda part, pair=pair: part[..., pair]))  # type: ignore[misc]
            scales.append(product.re)
        scale = jnp.repeat(jnp.maximum(jnp.stack(scales, -1), 1e-10), 2, -1)
        return q * scale, k / scale

    def _time_gates(
        self, params: Params, x: Array, ablate_complex: bool, ablate_state_transition: bool
    ) -> tuple[Array, Array]:
        """Gates (B, T, heads, dim_head), both channels of a pair sharing one."""
        if ablate_state_transition:
            ones = jnp.ones((*x.shape[:2], self.heads, self.dim_head), compute_dtype(x.dtype))
            return ones, jnp.zeros_like(ones)
        real, imaginary = (
            jnp.repeat(part, 2, -1) for part in self._gates(params, x, ablate_complex) if part is not None
        )
        return real, imaginary

    def _gated_scores(
        self, q: Array, k: Array, gates: tuple[Array, Array], state: AttentionState | None
    ) -> tuple[Array, Array, Array]:
        """Scores (B, heads, T, all keys) and all keys decayed to the last step, real and imaginary parts.

        A gate loop whose value at step j is the j-th unit vector keeps every key apart in its state: its outputs are
        the scores, its final state the decayed keys.
        """
        B, _, T, _ = q.shape
        past = 0 if state is None else state.keys.shape[2]
        units = jnp.pad(jnp.eye(T, dtype=q.dtype), ((0, 0), (past, 0)))
        units = jnp.broadcast_to(units[None, :, None], (B, T, self.heads, past + T))
        initial = None
        if state is not None:
            parts = (state.keys, state.keys_imaginary)
            initial = tuple(jnp.pad(part.swapaxes(-1, -2), ((0, 0), (0, 0), (0, 0), (0, T))) for part in parts)
        scores, final = gate_loop(q.swapaxes(1, 2), k.swapaxes(1, 2), units, gates, initial)  # type: ignore[arg-type]
        keys, imaginary = (part.swapaxes(-1, -2) for part in final)
        return scores.swapaxes(1, 2), keys, imaginary
