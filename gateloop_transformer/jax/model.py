"""The Transformer as a description with `init` and `apply`: token embedding, depth × (mixer, feed-forward), logits."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gateloop_transformer.arguments import check_fraction, check_rank, check_sizes, check_start, parse_pattern
from gateloop_transformer.configuration import TransformerConfig
from gateloop_transformer.jax.attention import CausalFullAttention
from gateloop_transformer.jax.checks import Layout, array
from gateloop_transformer.jax.gates import check_gate
from gateloop_transformer.jax.layers import GateLoopedAttention
from gateloop_transformer.jax.pairs import Array
from gateloop_transformer.jax.parts import Params, layer_norm, linear, new_layer_norm, new_linear, rms_norm
from gateloop_transformer.jax.states import TransformerState


@dataclass(frozen=True)
class Transformer:
    """A language model of gate loop layers, attention layers or a pattern of both.

    The defaults are the original's; what the original lacks has to be asked for. `Transformer.of(config)` takes a
    `TransformerConfig`, for example `TransformerConfig.recommended(512, 6)`.

    Args:
        dim: width.
        num_tokens: size of the vocabulary.
        depth: number of blocks, each a time mixer and a feed-forward.
        dim_head: size of an attention head.
        heads: number of attention heads.
        ff_mult: inner width of the feed-forward as a multiple of dim; 0: blocks have no feed-forward.
        checkpoint_gate_looped_attn: accepted for compatibility; memory is linear either way.
        use_gate_looped_attn: mix time by gate loop layers; False: by attention layers.
        gate_loop_heads: heads of the gate loop layers; None: as many as their inner width.
        attn_add_swish_gating: SiLU gate on the output of every time mixer.
        dim_gate_looped_attn: inner width of the gate loop layers; None: dim.
        attn_softmax_normalize: softmax in attention; None: softmax unless data_dependent_rel_pos is set.
        data_dependent_rel_pos: relative positions in attention: False, True (as released) or "gate_loop" (over time).
        frac_gradient_state_transition: factor on the gradient into the gate projections.
        ablate_complex: gates are real, unless a call says otherwise.
        ablate_state_transition: gates are 1, unless a call says otherwise.
        rotary_emb: rotary position embedding in attention.
        post_ln_norm: LayerNorm after each residual instead of RMSNorm before each layer.
        sub_ln: LayerNorm on the merged heads of gate loop layers.
        layer_pattern: mixers in turn, repeated up to depth, for example "gate gate attention"; None: all alike, as
            use_gate_looped_attn says.
        gate: kind of gate in gate loop layers: "polar" (the original's), "paper" or "ring".
        head_norm: RMS norm on each gate loop head's output.
        qk_norm: RMS norm on queries and keys of every mixer.
        conv_size: taps of the causal convolution in gate loop layers; 0 for none.
        conv_silu: SiLU after that convolution, whose weights then start at random.
        qkv_bias: biases of q, k and v in gate loop layers; those of q and k start at 1.
        max_memory: the longest memory that gates with a spread start begin with, in steps.
        min_memory: the shortest memory that they begin with, in steps.
        phase_spread: how far the data first turns the phases of gates with a spread start, in radians.
        spread_start: gates begin with memories spread up to max_memory; None: only "ring" gates do.
        gate_rank: rank of the gate projection in gate loop layers: how many numbers, computed from each input, the
            gates depend on; None: full rank.
        fixed_gates: "ring" gates are learned but do not depend on the data, as in an LRU.
        attn_window: most steps that attention layers see, so that decoding needs constant memory; None: all steps.
        dropout: probability of zeroing an element of what a layer adds, in training.

    Raises:
        ValueError: a number is out of range, a width is not divisible by its heads, or an option is unknown.
    """

    dim: int
    _: KW_ONLY
    num_tokens: int
    depth: int
    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    checkpoint_gate_looped_attn: bool = True
    use_gate_looped_attn: bool = True
    gate_loop_heads: int | None = None
    attn_add_swish_gating: bool = True
    dim_gate_looped_attn: int | None = None
    attn_softmax_normalize: bool | None = None
    data_dependent_rel_pos: bool | str = False
    frac_gradient_state_transition: float = 0.9
    ablate_complex: bool = False
    ablate_state_transition: bool = False
    rotary_emb: bool = False
    post_ln_norm: bool = False
    sub_ln: bool = False
    layer_pattern: str | None = None
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
    attn_window: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse options that are out of range or do not fit together."""
        names = (
            *("dim", "num_tokens", "depth", "dim_head", "heads"),
            *("gate_loop_heads", "dim_gate_looped_attn", "attn_window"),
        )
        check_sizes("Transformer", **{name: getattr(self, name) for name in names})
        if self.ff_mult < 0:
            raise ValueError(f"Transformer: ff_mult must be 0 or more, not {self.ff_mult}")
        if not self.max_memory >= 1:
            raise ValueError(f"Transformer: max_memory must be at least 1 step, not {self.max_memory}")
        check_fraction("Transformer", "frac_gradient_state_transition", self.frac_gradient_state_transition)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Transformer: dropout must be in [0, 1), not {self.dropout}")
        check_gate("Transformer", self.gate)
        check_start("Transformer", self.gate, self.spread_start, self.fixed_gates)
        check_rank("Transformer", self.gate_rank, self.fixed_gates)
        # The mixers are built once here, so that options that do not fit are refused here.
        _ = self.mixers

    @classmethod
    def of(cls, config: TransformerConfig, num_tokens: int = 256) -> Transformer:
        """The model that a configuration describes, with a vocabulary of that size.

        Raises:
            ValueError: an option is out of range or unknown, as in the constructor.
        """
        return cls(**config.arguments(num_tokens))

    @property
    def config(self) -> TransformerConfig:
        """The configuration of this model, without its vocabulary."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(TransformerConfig)}
        words = {False: "none", True: "released", "gate_loop": "gate_loop"}
        return TransformerConfig(**(values | {"data_dependent_rel_pos": words[self.data_dependent_rel_pos]}))

    @functools.cached_property
    def mixers(self) -> list[GateLoopedAttention | CausalFullAttention]:
        """The time mixer of each block."""
        default = "gate" if self.use_gate_looped_attn else "attention"
        pattern = parse_pattern(default if self.layer_pattern is None else self.layer_pattern, self.depth)
        made = {kind: self._gate_loop() if kind == "gate" else self._attention() for kind in set(pattern)}
        return [made[kind] for kind in pattern]

    def _gate_loop(self) -> GateLoopedAttention:
        return GateLoopedAttention(
            self.dim,
            self.gate_loop_heads,
            self.dim_gate_looped_attn,
            self.checkpoint_gate_looped_attn,
            self.attn_add_swish_gating,
            self.sub_ln,
            self.frac_gradient_state_transition,
            gate=self.gate,
            head_norm=self.head_norm,
            qk_norm=self.qk_norm,
            conv_size=self.conv_size,
            conv_silu=self.conv_silu,
            qkv_bias=self.qkv_bias,
            max_memory=self.max_memory,
            min_memory=self.min_memory,
            phase_spread=self.phase_spread,
            spread_start=self.spread_start,
            gate_rank=self.gate_rank,
            fixed_gates=self.fixed_gates,
        )

    def _attention(self) -> CausalFullAttention:
        return CausalFullAttention(
            self.dim,
            dim_head=self.dim_head,
            heads=self.heads,
            rotary_emb=self.rotary_emb,
            add_swish_gating=self.attn_add_swish_gating,
            data_dependent_rel_pos=self.data_dependent_rel_pos,
            frac_gradient_data_dependent_rel_pos=self.frac_gradient_state_transition,
            softmax_normalize=self.attn_softmax_normalize,
            qk_norm=self.qk_norm,
            window=self.attn_window,
        )

    def init(self, key: Array) -> Params:
        """Draw initial parameters."""
        keys = jax.random.split(key, self.depth + 2)
        to_logits = new_linear(keys[-1], self.dim, self.num_tokens, bias=False)
        return {
            "token_emb": {"weight": jax.random.normal(keys[-2], (self.num_tokens, self.dim))},
            "layers": {str(n): self._new_block(keys[n], mixer) for n, mixer in enumerate(self.mixers)},
            "to_logits": to_logits if self.post_ln_norm else {"0": {"gamma": jnp.ones(self.dim)}, "1": to_logits},
        }

    def _new_block(self, key: Array, mixer: GateLoopedAttention | CausalFullAttention) -> Params:
        first, second, third = jax.random.split(key, 3)
        block = {"0": {"fn": mixer.init(first), "norm": self._new_norm()}}
        if self.ff_mult:
            inner = self.ff_mult * self.dim
            wide, narrow = new_linear(second, self.dim, inner), new_linear(third, inner, self.dim)
            block["1"] = {"fn": {"0": wide, "2": narrow}, "norm": self._new_norm()}
        return block

    def _new_norm(self) -> Params:
        return new_layer_norm(self.dim) if self.post_ln_norm else {"gamma": jnp.ones(self.dim)}

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> TransformerState:
        """The state before the first token: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            dtype: dtype that the layers compute in.
        """
        return TransformerState(tuple(mixer.initial_state(batch, dtype) for mixer in self.mixers))

    def apply(
        self,
        params: Params,
        ids: Array,
        state: TransformerState | None = None,
        ablate_complex: bool | None = None,
        ablate_state_transition: bool | None = None,
        *,
        resets: Array | None = None,
        cu_seqlens: Array | None = None,
        return_state: bool = False,
        axis_name: str | None = None,
        dtype: Any = None,
        key: Array | None = None,
    ) -> Any:
        """Logits of the next token at every step.

        Args:
            params: parameters as `init` gives them.
            ids: (B, T) integers in [0, num_tokens); B and T may be 0.
            state: the state that an earlier call returned; None: the start.
            ablate_complex: gates are real; None: as constructed.
            ablate_state_transition: gates are 1; None: as constructed.
            resets: (B, T) booleans, True where a token begins a document; None: each row is one document.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone; states have N rows, and
                models with attention layers take and return none.
            return_state: return (logits, state).
            axis_name: the axis of the mesh along which T is sharded, inside of `jax.shard_map`.
            dtype: dtype that layers compute in, for example jnp.bfloat16; gates, states and norms stay float32 or
                better, and parameters stay as they are. None: that of the embedding.
            key: key of JAX's random numbers, for dropout; None: nothing is dropped.

        Returns:
            Logits (B, T, num_tokens), or (logits, state).

        Raises:
            ValueError: ids have the wrong shape or dtype or are outside the vocabulary (not checked under `jit`), or
                the state does not fit.
        """
        ids = self._check(ids, state)
        Layout("Transformer", ids, resets, cu_seqlens)
        options: dict[str, Any] = {
            "ablate_complex": self.ablate_complex if ablate_complex is None else ablate_complex,
            "ablate_state_transition": (
                self.ablate_state_transition if ablate_state_transition is None else ablate_state_transition
            ),
            "resets": resets,
            "cu_seqlens": cu_seqlens,
            "axis_name": axis_name,
            "return_state": return_state,
        }
        weight = params["token_emb"]["weight"]
        x = (weight if dtype is None else weight.astype(dtype))[ids]
        keys = [None] * 2 * self.depth if key is None or not self.dropout else jax.random.split(key, 2 * self.depth)
        states = []
        for n, mixer in enumerate(self.mixers):
            block = params["layers"][str(n)]
            past = None if state is None else state.layers[n]
            mixed = mixer.apply(block["0"]["fn"], self._before(block["0"], x), past, **options)
            y, new = mixed if return_state else (mixed, None)
            states.append(new)
            x = self._after(block["0"], x, y, keys[2 * n])
            if self.ff_mult:
                inner = linear(block["1"]["fn"]["0"], self._before(block["1"], x))
                y = linear(block["1"]["fn"]["2"], jax.nn.gelu(inner, approximate=False))
                x = self._after(block["1"], x, y, keys[2 * n + 1])
        if self.post_ln_norm:
            logits = linear(params["to_logits"], x)
        else:
            logits = linear(params["to_logits"]["1"], rms_norm(x, params["to_logits"]["0"]["gamma"]))
        return (logits, TransformerState(tuple(states))) if return_state else logits

    def _before(self, block: Params, x: Array) -> Array:
        return x if self.post_ln_norm else rms_norm(x, block["norm"]["gamma"])

    def _after(self, block: Params, x: Array, y: Array, key: Array | None) -> Array:
        """Add the residual, and apply the norm after it where there is one."""
        if key is not None:
            kept = jax.random.bernoulli(key, 1 - self.dropout, y.shape)
            y = jnp.where(kept, y / (1 - self.dropout), 0).astype(y.dtype)
        return layer_norm(block["norm"], y + x) if self.post_ln_norm else y + x

    def _check(self, ids: Any, state: Any) -> Array:
        ids = array("Transformer", "ids", ids)
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"Transformer: ids must be integers of shape (B, T), not {ids.dtype} {ids.shape}")
        if state is not None and not isinstance(state, TransformerState):
            raise ValueError(f"Transformer: state must be a TransformerState, not {type(state).__name__}")
        if state is not None and len(state.layers) != self.depth:
            raise ValueError(f"Transformer: state has {len(state.layers)} layers, but the model has {self.depth}")
        # JAX would silently take the last row of a table for an index beyond it.
        if ids.size and not isinstance(ids, jax.core.Tracer):
            known = np.asarray(ids)
            low, high = int(known.min()), int(known.max())
            if low < 0 or high >= self.num_tokens:
                raise ValueError(f"Transformer: ids must be in [0, {self.num_tokens}), got {low} to {high}")
        return ids

    def loss(
        self,
        params: Params,
        ids: Array,
        state: TransformerState | None = None,
        *,
        resets: Array | None = None,
        cu_seqlens: Array | None = None,
        dtype: Any = None,
        key: Array | None = None,
        return_state: bool = False,
    ) -> Any:
        """Compute the mean cross entropy (nats) of predicting ids[:, 1:] from ids[:, :-1].

        Arguments are those of `apply`. A document's last token does not predict the first token of the next. A returned
        state has read ids[:, :-1], or all ids with cu_seqlens.

        Returns:
            The loss, a scalar in float32 or better, or (loss, state).

        Raises:
            ValueError: arguments do not fit, as in `apply`, or ids are shorter than two steps.
        """
        ids = self._check(ids, state)
        B, T = ids.shape
        if B < 1 or T < 2:
            raise ValueError(f"Transformer: a loss needs B ≥ 1 and T ≥ 2, not shape {ids.shape}")
        layout = Layout("Transformer", ids, resets, cu_seqlens)
        counted = jnp.ones((B, T - 1), bool) if layout.resets is None else ~layout.resets[:, 1:]
        given = ids
        if layout.packed is None:
            given, resets = ids[:, :-1], None if layout.resets is None else layout.resets[:, :-1]
        else:
            ends = layout.packed.bounds[1:-1] - 1
            # Empty documents at the start end before the first step.
            counted = counted.at[0, jnp.where(ends < 0, T, ends)].set(False, mode="drop")
        result = self.apply(
            params, given, state, resets=resets, cu_seqlens=cu_seqlens, dtype=dtype, key=key, return_state=return_state
        )
        logits = result[0] if return_state else result
        wide = logits[:, : T - 1].astype(jnp.promote_types(logits.dtype, jnp.float32))
        chances = jax.nn.log_softmax(wide)
        losses = -jnp.take_along_axis(chances, ids[:, 1:, None], -1)[..., 0]
        mean = jnp.where(counted, losses, 0).sum() / counted.sum()
        return (mean, result[1]) if return_state else mean
