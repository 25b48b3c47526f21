"""Transformer: token embedding, depth × (time mixer, feed-forward), logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer.arguments import check_fraction, check_rank, check_sizes, check_start, parse_pattern
from gateloop_transformer.generation import generate, stream
from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.feedforward import FeedForward
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.norm import PostNorm, PreNorm, RMSNorm
from gateloop_transformer.layers.padding import over_steps
from gateloop_transformer.layers.state import TransformerState, start_of
from gateloop_transformer.ops.dispatch import check_name
from gateloop_transformer.ops.gates import check_gate
from gateloop_transformer.ops.layout import Layout


class Transformer(nn.Module):
    """A language model of gate loop layers, attention layers or a pattern of both.

    The defaults are the original's, initial weights and results included; what the original lacks has to be asked for.

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
        backend: backend of all operators: "auto", or a backend's name.

    Raises:
        ValueError: a number is out of range, a width is not divisible by its heads, or an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        checkpoint_gate_looped_attn: bool = True,
        use_gate_looped_attn: bool = True,
        gate_loop_heads: int | None = None,
        attn_add_swish_gating: bool = True,
        dim_gate_looped_attn: int | None = None,
        attn_softmax_normalize: bool | None = None,
        data_dependent_rel_pos: bool | str = False,
        frac_gradient_state_transition: float = 0.9,
        ablate_complex: bool = False,
        ablate_state_transition: bool = False,
        rotary_emb: bool = False,
        post_ln_norm: bool = False,
        sub_ln: bool = False,
        layer_pattern: str | None = None,
        gate: str = "polar",
        head_norm: bool = False,
        qk_norm: bool = False,
        conv_size: int = 0,
        conv_silu: bool = False,
        qkv_bias: bool = False,
        max_memory: float = 1024,
        min_memory: float = 1,
        phase_spread: float = 0.0,
        spread_start: bool | None = None,
        gate_rank: int | None = None,
        fixed_gates: bool = False,
        attn_window: int | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(
            "Transformer",
            dim=dim,
            num_tokens=num_tokens,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            gate_loop_heads=gate_loop_heads,
            dim_gate_looped_attn=dim_gate_looped_attn,
            attn_window=attn_window,
        )
        if ff_mult < 0:
            raise ValueError(f"Transformer: ff_mult must be 0 or more, not {ff_mult}")
        if not max_memory >= 1:
            raise ValueError(f"Transformer: max_memory must be at least 1 step, not {max_memory}")
        check_fraction("Transformer", "frac_gradient_state_transition", frac_gradient_state_transition)
        if not 0 <= dropout < 1:
            raise ValueError(f"Transformer: dropout must be in [0, 1), not {dropout}")
        check_gate("Transformer", gate)
        check_start("Transformer", gate, spread_start, fixed_gates)
        check_rank("Transformer", gate_rank, fixed_gates)
        if data_dependent_rel_pos not in (False, True, "gate_loop"):
            raise ValueError(
                "Transformer: data_dependent_rel_pos must be False, True or 'gate_loop', "
                f"not {data_dependent_rel_pos!r}"
            )
        check_name(backend)
        self.num_tokens = num_tokens
        self.ablate_complex, self.ablate_state_transition = ablate_complex, ablate_state_transition
        options: dict[str, dict[str, Any]] = {
            "gate": {
                "heads": gate_loop_heads,
                "dim_inner": dim_gate_looped_attn,
                "checkpoint_gate_looped_attn": checkpoint_gate_looped_attn,
                "add_swish_gating": attn_add_swish_gating,
                "sub_ln": sub_ln,
                "frac_gradient_state_transition": frac_gradient_state_transition,
                "gate": gate,
                "head_norm": head_norm,
                "qk_norm": qk_norm,
                "conv_size": conv_size,
                "conv_silu": conv_silu,
                "qkv_bias": qkv_bias,
                "max_memory": max_memory,
                "min_memory": min_memory,
                "phase_spread": phase_spread,
                "spread_start": spread_start,
                "gate_rank": gate_rank,
                "fixed_gates": fixed_gates,
                "backend": backend,
            },
            "attention": {
                "dim_head": dim_head,
                "heads": heads,
                "rotary_emb": rotary_emb,
                "add_swish_gating": attn_add_swish_gating,
                "data_dependent_rel_pos": data_dependent_rel_pos,
                "frac_gradient_data_dependent_rel_pos": frac_gradient_state_transition,
                "softmax_normalize": attn_softmax_normalize,
                "qk_norm": qk_norm,
                "window": attn_window,
                "backend": backend,
            },
        }
        mixers = {"gate": GateLoopedAttention, "attention": CausalFullAttention}
        default = "gate" if use_gate_looped_attn else "attention"
        pattern = parse_pattern(default if layer_pattern is None else layer_pattern, depth)
        wrapper = PostNorm if post_ln_norm else PreNorm
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    wrapper(dim, mixers[kind](dim, **options[kind]), dropout),
                    wrapper(dim, FeedForward(dim, ff_mult), dropout) if ff_mult else nn.Identity(),
                ]
            )
            for kind in pattern
        )
        to_logits = nn.Linear(dim, num_tokens, bias=False)
        self.to_logits: nn.Module = to_logits if post_ln_norm else nn.Sequential(RMSNorm(dim), to_logits)

    def forward(
        self,
        ids: Tensor,
        state: TransformerState | bool | None = None,
        ablate_complex: bool | None = None,
        ablate_state_transition: bool | None = None,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_loss: bool = False,
        return_state: bool = False,
    ) -> Any:
        """Logits of the next token at every step.

        Args:
            ids: (B, T) integers in [0, num_tokens); B and T may be 0.
            state: the state that an earlier call returned; None: the start. A bool in this place is the original's
                second argument, return_loss.
            ablate_complex: gates are real; None: as constructed.
            ablate_state_transition: gates are 1; None: as constructed.
            resets: (B, T) booleans, True where a token begins a document; None: each row is one document.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone; states have N rows.
            mask: (B, T) booleans, False for padding, on whatever side: such steps change no state and give 0.
            return_loss: return the mean cross entropy (nats) of predicting ids[:, 1:] from ids[:, :-1]; T ≥ 2. A
                returned state has then read ids[:, :-1], or all ids with cu_seqlens or a mask. A document's last token
                does not predict the first token of the next. Inside of `ops.context_parallel` every rank is given its
                part and the first token of the next part, and returns the mean over its own targets: the loss of the
                whole is the mean of these, weighted by how many targets each rank has.
            return_state: return (logits or loss, state).

        Returns:
            Logits (B, T, num_tokens), or the loss, a scalar; with return_state a tuple of that and the state.

        Raises:
            ValueError: ids have the wrong shape or dtype or are outside the vocabulary, or the state does not fit.
        """
        if isinstance(state, int):
            return_loss, state = bool(state), None
        self._check(ids, state)
        ablated = {
            "ablate_complex": self.ablate_complex if ablate_complex is None else ablate_complex,
            "ablate_state_transition": (
                self.ablate_state_transition if ablate_state_transition is None else ablate_state_transition
            ),
        }

        def read(ids: Tensor, layout: Layout) -> Any:
            return self._read(ids, state, layout, ablated, return_loss, return_state)

        return over_steps("Transformer", ids, (resets, cu_seqlens, mask), read, return_state)

    def _read(
        self,
        ids: Tensor,
        state: TransformerState | None,
        layout: Layout,
        ablated: dict[str, bool],
        return_loss: bool,
        return_state: bool,
    ) -> Any:
        rows = layout.cu_seqlens is None
        if return_loss and rows and (ids.shape[1] < 2 or ids.shape[0] < 1):
            raise ValueError(f"Transformer: a loss needs B ≥ 1 and T ≥ 2, not shape {tuple(ids.shape)}")
        # On other devices, reading the ids would make every call wait; there the embedding itself reports a bad id.
        if not torch.compiler.is_compiling() and ids.device.type == "cpu":
            self.check_vocabulary(ids.long())
        ids = ids.long()
        targets = self._targets(ids, layout) if return_loss else None
        if targets is not None and rows:
            ids, targets = ids[:, :-1], targets[:, :-1]
            layout = Layout(None if layout.resets is None else layout.resets[:, :-1])
        # A plain batch passes no marks: a mixer put in by a user may not take them.
        flags = {**ablated, **{name: mark for name, mark in layout.keywords().items() if mark is not None}}
        x = self.token_emb(ids)
        states = []
        for n, block in enumerate(self.layers):
            mixer, feedforward = cast(nn.ModuleList, block)
            past = None if state is None else state.layers[n]
            if return_state:
                x, new = mixer(x, state=past, return_state=True, **flags)
                states.append(new)
            else:
                x = mixer(x, state=past, **flags)
            x = feedforward(x)
        result = self.to_logits(x)
        if targets is not None:
            result = F.cross_entropy(result.flatten(0, 1), targets.flatten())
        return (result, TransformerState(tuple(states))) if return_state else result

    def _targets(self, ids: Tensor, layout: Layout) -> Tensor:
        """The token after each token (B, T); -100, which cross_entropy ignores, where there is none."""
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)
        if layout.resets is not None:
            targets = targets.masked_fill(F.pad(layout.resets[:, 1:], (0, 1)), -100)
        if layout.cu_seqlens is not None:
            ends = layout.cu_seqlens[1:].to(ids.device).long() - 1
            targets = targets.index_fill(1, ends[ends >= 0], -100)
        told = not (torch.compiler.is_compiling() or targets.is_meta)
        if told and not layout.plain() and not bool((targets >= 0).any()):
            raise ValueError("Transformer: a loss needs a document of two tokens or more")
        return targets

    def _check(self, ids: Tensor, state: TransformerState | None) -> None:
        if not isinstance(ids, Tensor):
            raise ValueError(f"Transformer: ids must be a torch tensor, not {type(ids).__name__}")
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"Transformer: ids must be integers of shape (B, T), not {ids.dtype} {tuple(ids.shape)}")
        if state is not None and not isinstance(state, TransformerState):
            raise ValueError(f"Transformer: state must be a TransformerState, not {type(state).__name__}")
        if state is not None and len(state.layers) != len(self.layers):
            raise ValueError(f"Transformer: state has {len(state.layers)} layers, but the model has {len(self.layers)}")

    def check_vocabulary(self, ids: Tensor) -> None:
        """Check that every id is in [0, num_tokens), or in the embedding that took the place of the model's own.

        Raises:
            ValueError: one is not.
        """
        size = getattr(self.token_emb, "num_embeddings", self.num_tokens)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise ValueError(f"Transformer: ids must be in [0, {size}), got {int(ids.min())} to {int(ids.max())}")

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TransformerState:
        """The state before the first token: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            device: device of the state; None: that of the weights.
            dtype: dtype that the layers compute in; None: that of the embedding.

        Raises:
            ValueError: batch is not an integer, or is negative.
        """
        device, dtype = start_of(self, batch, device, dtype)
        mixers = [cast(Any, block)[0].fn for block in self.layers]
        return TransformerState(tuple(mixer.initial_state(batch, device=device, dtype=dtype) for mixer in mixers))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, also by the original, which keeps no size of the vocabulary."""
        nn.Module.__setstate__(self, state)
        if "num_tokens" not in state:
            self.num_tokens = self.token_emb.num_embeddings

    def generate(self, ids: Tensor | Sequence[Tensor], max_new_tokens: int, **options: Any) -> Any:
        """Continue prompts: (B, T + new), or a list of them; see `gateloop_transformer.generation.generate`."""
        return generate(self, ids, max_new_tokens, **options)

    def stream(self, ids: Tensor | Sequence[Tensor], max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Yield new tokens (B,) one step at a time; see `gateloop_transformer.generation.stream`."""
        return stream(self, ids, max_new_tokens, **options)
