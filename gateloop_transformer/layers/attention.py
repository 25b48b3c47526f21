"""CausalFullAttention: quadratic attention, optionally with the gate loop's relative positions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_transformer.arguments import check_fraction
from gateloop_transformer.layers.earlier import Earlier
from gateloop_transformer.layers.gate_looped import check_input
from gateloop_transformer.layers.norm import HeadRMSNorm
from gateloop_transformer.layers.padding import over_steps
from gateloop_transformer.layers.pickled import revive
from gateloop_transformer.layers.state import AttentionState, check_state, start_of
from gateloop_transformer.ops.dispatch import check_name
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.gates import polar, scale_gradient
from gateloop_transformer.ops.layout import Layout
from gateloop_transformer.ops.packing import groups
from gateloop_transformer.ops.pairs import Pair, compute_dtype, without_autocast

# ablate_complex, ablate_state_transition
_Flags = tuple[bool, bool]


class RotaryEmbedding(nn.Module):
    """Turns the channel pair (2i, 2i+1) at position t by t · 10000^(-2i/dim) radians.

    Args:
        dim: channels of a head, even.

    Source: Su et al., RoFormer (2021), section 3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary embedding needs an even head size, not {dim}")
        self.dim = dim
        self.freqs = nn.Parameter(self._frequencies(), requires_grad=False)

    def _frequencies(self) -> Tensor:
        return 10000.0 ** (-torch.arange(0, self.dim, 2).float() / self.dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, heads, T, dim) at positions (T,) or (B, 1, T)."""
        wide = compute_dtype(x.dtype)
        # In a module of half precision the parameter has lost the digits that positions of a thousand steps need.
        exact = self.freqs.dtype in (torch.float32, torch.float64)
        freqs = self.freqs if exact else self._frequencies().to(x.device)
        angles = positions.to(wide)[..., None] * freqs.to(wide)
        even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return turned.flatten(-2).to(x.dtype)


class View(NamedTuple):
    """Which of the keys, `past` old and T new ones, each of T steps sees.

    positions: positions of the steps in their sequence, (T,) or (B, 1, T); seen: (B,) steps from the start of the
    sequence to the end of the last step; old: (B, past), True for old keys of the current sequence; None: all are;
    segment: (B, T), number of resets up to a step; None: there are none.
    """

    past: int
    positions: Tensor
    seen: Tensor
    old: Tensor | None
    segment: Tensor | None
    window: int | None

    @staticmethod
    def of(x: Tensor, past: int, before: Tensor | None, resets: Tensor | None, window: int | None) -> View:
        """The view of x (B, T, dim) after `before` (B,) steps, of which the last `past` have keys."""
        B, T = x.shape[:2]
        steps = torch.arange(T, device=x.device)
        if before is None:
            positions, old = steps, None
            before = torch.zeros(B, dtype=torch.long, device=x.device)
        else:
            positions = (before[:, None] + steps)[:, None]
            old = torch.arange(past, 0, -1, device=x.device) <= before[:, None]
            # A mask costs more than no mask; whether one is needed, only values tell.
            told = not (torch.compiler.is_compiling() or old.is_meta)
            old = None if told and bool(old.all()) else old
        if resets is None:
            return View(past, positions, before + T, old, None, window)
        segment = resets.cumsum(1)
        latest = torch.where(resets, steps, -1).cummax(1).values if T else steps.expand(B, T)
        since = torch.where(latest < 0, before[:, None] + steps, steps - latest)
        seen = since[:, -1] + 1 if T else before
        return View(past, since[:, None], seen, old, segment, window)

    def causal(self) -> bool:
        """True where every step sees all steps before it, and there are no old keys."""
        T = self.positions.shape[-1]
        return self.past == 0 and self.segment is None and (self.window is None or self.window >= T)

    def all(self) -> Tensor:
        """The mask of all steps and keys."""
        T = self.positions.shape[-1]
        return self.mask(0, T, 0, self.past + T)

    def mask(self, start: int, end: int, first: int, last: int) -> Tensor:
        """The mask (B or 1, 1, end - start, last - first), True where a step sees a key.

        Steps are those from `start` to `end`, keys those from `first` to `last`, where old keys count first.
        """
        device = self.positions.device
        query = torch.arange(start, end, device=device)[:, None]
        key = torch.arange(first - self.past, last - self.past, device=device)
        seen = (key <= query)[None, None]
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.old is not None:
            mine = F.pad(self.old[:, first:last], (0, last - max(first, self.past)), value=True)
            seen = seen & mine[:, None, None]
        if self.segment is not None:
            new = self.segment[:, max(first - self.past, 0) : last - self.past]
            segments = F.pad(new, (max(self.past - first, 0), 0))
            seen = seen & (segments[:, None] == self.segment[:, start:end, None])[:, None]
        return seen


def _last(x: Tensor, beyond: Tensor, count: int) -> Tensor:
    """The last `count` steps of x (n, heads, L, d) but for each row's `beyond` (n,) ones; 0 where there are fewer."""
    places = x.shape[2] - beyond[:, None] + torch.arange(count, device=x.device)
    return F.pad(x, (0, 0, count, 0)).gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _arguments(original: Mapping[str, Any]) -> dict[str, Any]:
    """What has a layer with these attributes and parts of the original's; its norms are among the parts."""
    inner, dim = original["to_qkv"][0].weight.shape
    dim_head = round(original["scale"] ** -2)
    return {
        "dim": dim,
        "dim_head": dim_head,
        "heads": inner // (3 * dim_head),
        "rotary_emb": original["rotary_emb"] is not None,
        "add_swish_gating": original["to_gates"] is not None,
        "data_dependent_rel_pos": original["data_dependent_rel_pos"],
        "frac_gradient_data_dependent_rel_pos": original["frac_gradient_data_dependent_rel_pos"],
        "softmax_normalize": original["softmax_normalize"],
    }


class CausalFullAttention(nn.Module):
    """Causal attention over all past steps; the defaults are the original's, initial weights and results included.

    Inside of `ops.context_parallel` keys and values of all ranks are gathered, so communication grows with T.

    As in torch's own attention, values that a step must not see are multiplied by 0: one that is not finite makes the
    outputs of earlier steps, and of steps after a reset, NaN. It does not reach other packed documents (`cu_seqlens`).

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
        backend: backend of the gate loop in data_dependent_rel_pos="gate_loop".

    Raises:
        ValueError: sizes are not positive, dim_head is odd where pairs of channels are needed, or an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        rotary_emb: bool = False,
        add_swish_gating: bool = False,
        data_dependent_rel_pos: bool | str = False,
        frac_gradient_data_dependent_rel_pos: float = 0.5,
        softmax_normalize: bool | None = None,
        qk_norm: bool = False,
        window: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"CausalFullAttention: window must be at least 1 step, not {window}")
        self.window = window
        if min(dim, dim_head, heads) < 1:
            raise ValueError(
                f"CausalFullAttention: dim, dim_head and heads must be positive, got {dim}, {dim_head}, {heads}"
            )
        if data_dependent_rel_pos not in (False, True, "gate_loop"):
            raise ValueError(
                "CausalFullAttention: data_dependent_rel_pos must be False, True or 'gate_loop', "
                f"not {data_dependent_rel_pos!r}"
            )
        if data_dependent_rel_pos and dim_head % 2:
            raise ValueError(f"CausalFullAttention: data_dependent_rel_pos needs an even dim_head, not {dim_head}")
        check_fraction(
            "CausalFullAttention", "frac_gradient_data_dependent_rel_pos", frac_gradient_data_dependent_rel_pos
        )
        check_name(backend)
        inner = heads * dim_head
        self.dim, self.heads, self.dim_head, self.backend = dim, heads, dim_head, backend
        self.data_dependent_rel_pos = data_dependent_rel_pos
        self.frac_gradient_data_dependent_rel_pos = frac_gradient_data_dependent_rel_pos
        self.softmax_normalize = not data_dependent_rel_pos if softmax_normalize is None else softmax_normalize
        self.rotary_emb = RotaryEmbedding(dim_head) if rotary_emb else None
        self.to_qkv = nn.Sequential(nn.Linear(dim, 3 * inner, bias=False))
        if data_dependent_rel_pos:
            self.to_a = nn.Sequential(nn.Linear(dim, inner, bias=False))
        self.q_norm = HeadRMSNorm(heads, dim_head) if qk_norm else None
        self.k_norm = HeadRMSNorm(heads, dim_head) if qk_norm else None
        self.to_gates = nn.Sequential(nn.Linear(dim, inner, bias=False), nn.SiLU()) if add_swish_gating else None
        self.to_out = nn.Sequential(nn.Identity(), nn.Linear(inner, dim))

    @overload
    def forward(
        self,
        x: Tensor,
        state: AttentionState | bool | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        ablate_complex: bool = False,
        return_state: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: AttentionState | bool | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        ablate_complex: bool = False,
        return_state: Literal[True],
    ) -> tuple[Tensor, AttentionState]: ...

    def forward(
        self,
        x: Tensor,
        state: AttentionState | bool | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        ablate_complex: bool = False,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionState]:
        """Mix over time.

        Args:
            x: (B, T, dim), B and T may be 0.
            state: the state that an earlier call returned; None: the start. A bool in this place is the original's
                second argument, ablate_complex.
            ablate_state_transition: use no data-dependent position.
            resets: (B, T) booleans, True where a step sees none before it; None: nowhere.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone; states have N rows.
            mask: (B, T) booleans, False for padding, on whatever side: such steps change no state and give 0.
            ablate_complex: make the gates of data-dependent positions real.
            return_state: return (y, state) instead of y.

        Returns:
            y (B, T, dim) in x's dtype (under autocast, that of a Linear's output), or (y, state).

        Raises:
            ValueError: x, state, resets, cu_seqlens or mask has the wrong shape or dtype.
        """
        if isinstance(state, int):
            ablate_complex, state = bool(state), None
        check_input("CausalFullAttention", x, self.dim, self)
        flags = ablate_complex, ablate_state_transition

        def mix(x: Tensor, layout: Layout) -> Any:
            return self._mix(x, state, layout, flags, return_state)

        result: Any = over_steps("CausalFullAttention", x, (resets, cu_seqlens, mask), mix, return_state)
        return cast(Tensor, result)

    def _mix(self, x: Tensor, state: AttentionState | None, layout: Layout, flags: _Flags, return_state: bool) -> Any:
        self._check_state(x, state, layout)
        if layout.cu_seqlens is not None:
            y, new = self._documents(x, state, layout, flags, return_state)
        else:
            y, new = self._rows(x, state, layout.resets, None, flags)
            new = self._recent(new)
        y = self._output(x, y)
        return (y, new) if return_state else y

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """The state before the first step: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            device: device of the layer's inputs; None: that of its weights.
            dtype: dtype of the layer's inputs; None: that of its weights.

        Raises:
            ValueError: batch is not an integer, or is negative.
        """
        device, dtype = start_of(self, batch, device, dtype)
        shape = (batch, self.heads, 0, self.dim_head)
        values = torch.zeros(shape, device=device, dtype=dtype)
        # Keys that are multiplied by gates are float32 or better.
        keys = values.to(compute_dtype(dtype)) if self.data_dependent_rel_pos else values
        imaginary = keys if self.data_dependent_rel_pos == "gate_loop" else values
        return AttentionState(keys, imaginary, values, torch.zeros(batch, device=device, dtype=torch.int64))

    def _rows(
        self, x: Tensor, state: AttentionState | None, resets: Tensor | None, there: Tensor | None, flags: _Flags
    ) -> tuple[Tensor, AttentionState]:
        """Compute the heads' outputs (B, heads, T, dim_head), and the keys and values of all steps, old and new.

        `there` (B, T) is False after the end of a row.
        """
        earlier = Earlier.of(x, state, resets)
        view = View.of(x, earlier.past, earlier.before, resets, self.window)
        q, k, v = self._project(x, view.positions)
        # Over ranks there are keys of later parts too: they belong to the state.
        seen = slice(earlier.past + x.shape[1])
        imaginary = k.new_empty(x.shape[0], self.heads, 0, self.dim_head)
        if self.data_dependent_rel_pos == "gate_loop":
            gates = self._time_gates(x, *flags)
            if there is not None:
                # Keys are decayed to the last step of a row, not to what fills it up.
                behind = ~there[..., None, None]
                gates = gates[0].masked_fill(behind, 1), gates[1].masked_fill(behind, 0)
            scores, keys, imaginary = self._gated_scores(q, k, gates, state, earlier)
            (values,) = earlier.join(None if state is None else [state.values], [v])
            y = self._attend(scores[..., seen], values[:, :, seen], view)
        else:
            if self.data_dependent_rel_pos and not flags[1]:
                q, k = self._channel_gates(x, q, k, flags[0])
            keys, values = earlier.join(None if state is None else [state.keys, state.values], [k, v])
            # The released position makes scores of 1e8: a fused backward that computes them again rounds otherwise.
            if self.softmax_normalize and not self.data_dependent_rel_pos:
                y = self._softmax_attention(q, keys[:, :, seen], values[:, :, seen], view)
            else:
                with without_autocast(x):
                    scores = q @ keys[:, :, seen].transpose(-1, -2).to(q.dtype)
                    y = self._attend(scores, values[:, :, seen], view)
        return y, AttentionState(keys, imaginary, values, view.seen if earlier.after is None else earlier.after)

    def _recent(self, state: AttentionState) -> AttentionState:
        """Drop the keys and values that no later step can see."""
        past = state.keys.shape[2]
        if self.window is None or past < self.window:
            return state
        stored = (state.keys, state.keys_imaginary, state.values)
        keys, imaginary, values = (part[:, :, max(part.shape[2] - self.window + 1, 0) :].clone() for part in stored)
        return AttentionState(keys, imaginary, values, state.seen)

    def _documents(
        self, x: Tensor, state: AttentionState | None, layout: Layout, flags: _Flags, return_state: bool
    ) -> tuple[Tensor, AttentionState]:
        """Compute packed documents as rows of batches, each of documents of similar length.

        The state, if wanted, has a row for each document, as long as the longest needs.
        """
        N, T = layout.states(1), x.shape[1]
        bounds = layout.bounds(T)
        past = 0 if state is None else state.keys.shape[2]
        longest = max([b - a for a, b in itertools.pairwise(bounds)], default=0)
        kept = past + longest if self.window is None else min(past + longest, self.window - 1)
        if state is None:
            state = self.initial_state(N, device=x.device, dtype=x.dtype)
        outputs, order, states, documents = [], [], [], []
        for group in groups(bounds, x.device):
            resets = None if layout.resets is None else group.rows(layout.resets, False)
            own = state.select(group.documents)
            y, own = self._rows(group.rows(x, 0.0), own, resets, group.there, flags)
            outputs.append(y.transpose(1, 2)[group.there])
            order.append(group.steps[group.there])
            beyond = (~group.there).sum(1)
            if not return_state:
                continue
            counts = kept, kept if self.data_dependent_rel_pos == "gate_loop" else 0, kept
            parts = [_last(part, beyond, count) for part, count in zip(own[:3], counts, strict=True)]
            states.append((*parts, own.seen - beyond))
            documents.append(group.documents)
        y = torch.cat(outputs)[torch.cat(order).argsort()].unsqueeze(0).transpose(1, 2)
        if not return_state:
            return y, state
        numbers = torch.cat(documents).argsort()
        return y, AttentionState(*(torch.cat(part)[numbers] for part in zip(*states, strict=True)))

    def _check_state(self, x: Tensor, state: AttentionState | None, layout: Layout) -> None:
        if state is None:
            return
        rows = layout.states(x.shape[0])
        names = ("keys", "keys_imaginary", "values")
        shapes = dict.fromkeys(names, (rows, self.heads, None, self.dim_head))
        check_state("CausalFullAttention", state, AttentionState, {**shapes, "seen": (rows,)})
        if state.seen.dtype != torch.int64:
            raise ValueError(f"CausalFullAttention: state.seen must be of torch.int64, not {state.seen.dtype}")
        past = state.keys.shape[2]
        imaginary = past if self.data_dependent_rel_pos == "gate_loop" else 0
        if state.values.shape[2] != past or state.keys_imaginary.shape[2] != imaginary:
            raise ValueError(
                f"CausalFullAttention: the state's keys, keys_imaginary and values must hold {past}, {imaginary} and "
                f"{past} steps, not {past}, {state.keys_imaginary.shape[2]} and {state.values.shape[2]}"
            )

    def _heads(self, x: Tensor) -> Tensor:
        """Split heads: (B, T, heads·dim_head) → (B, heads, T, dim_head)."""
        heads: Tensor = x.unflatten(-1, (self.heads, self.dim_head))
        return heads.transpose(1, 2)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled), keys and values (B, heads, T, dim_head)."""
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            shape = (self.heads, self.dim_head)
            q = self.q_norm(q.unflatten(-1, shape)).flatten(-2).to(v.dtype)
            k = self.k_norm(k.unflatten(-1, shape)).flatten(-2).to(v.dtype)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q, positions), self.rotary_emb(k, positions)
        return q * self.dim_head**-0.5, k, v

    def _gates(self, x: Tensor, ablate_complex: bool) -> Pair:
        """Polar gates (B, T, heads, dim_head/2), one per pair of channels."""
        z = scale_gradient(self.to_a(x), self.frac_gradient_data_dependent_rel_pos)
        real, imaginary = z.unflatten(-1, (self.heads, self.dim_head // 2, 2)).unbind(-1)
        return Pair(*polar(real, torch.zeros_like(imaginary) if ablate_complex else imaginary))

    def _channel_gates(self, x: Tensor, q: Tensor, k: Tensor, ablate_complex: bool) -> tuple[Tensor, Tensor]:
        """Scale as released: q by the real part of the product of gates over channel pairs, k by its inverse.

        Both in float32 or better: the inverse reaches 1e10.
        """
        gates = self._gates(x, ablate_complex).map(lambda part: part.transpose(1, 2))
        product = gates.select(-1, 0)
        scales = [product.re]
        for pair in range(1, self.dim_head // 2):
            product = product.times(gates.select(-1, pair))
            scales.append(product.re)
        scale = torch.stack(scales, -1).clamp(min=1e-10).repeat_interleave(2, -1)
        return q * scale, k / scale

    def _time_gates(self, x: Tensor, ablate_complex: bool, ablate_state_transition: bool) -> tuple[Tensor, Tensor]:
        """Gates (B, T, heads, dim_head), both channels of a pair sharing one."""
        if ablate_state_transition:
            ones = x.new_ones(*x.shape[:2], self.heads, self.dim_head, dtype=compute_dtype(x.dtype))
            return ones, torch.zeros_like(ones)
        real, imaginary = (part.repeat_interleave(2, -1) for part in self._gates(x, ablate_complex).parts())
        return real, imaginary

    def _gated_scores(
        self, q: Tensor, k: Tensor, gates: tuple[Tensor, Tensor], state: AttentionState | None, earlier: Earlier
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, heads, T, all keys) and all keys decayed to the last step, real and imaginary parts.

        A gate loop whose value at step j is the j-th unit vector keeps every key apart in its state: its outputs are
        the scores, its final state the decayed keys.
        """
        T = q.shape[2]
        units = F.pad(torch.eye(T, dtype=q.dtype, device=q.device), (earlier.past, earlier.total - earlier.past - T))
        units = units[None, :, None, :].expand(q.shape[0], T, self.heads, earlier.total)
        initial = None
        if state is not None:
            parts = (state.keys, state.keys_imaginary)
            room = earlier.total - state.keys.shape[2]
            initial = tuple(F.pad(part.transpose(-1, -2), (0, room)) for part in parts)
        scores, final = gate_loop(
            q.transpose(1, 2),
            k.transpose(1, 2),
            units,
            gates,
            cast("tuple[Tensor, Tensor] | None", initial),
            backend=self.backend,
        )
        keys, imaginary = (part.transpose(-1, -2) for part in final)
        return scores.transpose(1, 2), keys, imaginary

    def _attend(self, scores: Tensor, values: Tensor, view: View) -> Tensor:
        """Turn the scores of seen keys (B, heads, T, past + T) into weights, and multiply them by the values."""
        seen = view.all()
        if not self.softmax_normalize:
            return (scores.masked_fill(~seen, 0) @ values.to(scores.dtype)).to(values.dtype)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ values.to(weights.dtype)).to(values.dtype)

    def _softmax_attention(self, q: Tensor, keys: Tensor, values: Tensor, view: View) -> Tensor:
        if view.causal():
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=1.0)
        # A trace with a length that may change cannot unroll the stretches.
        if self.window is not None and not torch.compiler.is_compiling():
            return self._local_attention(q, keys, values, view, self.window)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=view.all(), scale=1.0)

    def _local_attention(self, q: Tensor, keys: Tensor, values: Tensor, view: View, window: int) -> Tensor:
        """Attend by stretches of queries to the keys that they can see, linear in time and memory."""
        parts, length = [], min(max(window, 128), 1024)
        for start in range(0, max(q.shape[2], 1), length):
            end = min(start + length, q.shape[2])
            first = max(view.past + start - window + 1, 0)
            mask = view.mask(start, end, first, view.past + end)
            stretch = slice(first, view.past + end)
            part = F.scaled_dot_product_attention(
                q[:, :, start:end], keys[:, :, stretch], values[:, :, stretch], attn_mask=mask, scale=1.0
            )
            parts.append(part)
        return torch.cat(parts, 2)

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        """Apply swish gate and output projection to the heads' outputs (B, heads, T, dim_head)."""
        y = y.transpose(1, 2).flatten(-2)
        if self.to_gates is not None:
            y = y * self.to_gates(x)
        return cast(Tensor, self.to_out(y))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, also by the original."""
        if "backend" not in state:
            state = revive(state, CausalFullAttention, _arguments)
            if (rotary := state["_modules"].get("rotary_emb")) is not None:
                # Of a package of its own there; the frequencies are all that it has in common.
                state["_modules"]["rotary_emb"] = own = RotaryEmbedding(2 * rotary.freqs.shape[0])
                own.freqs = rotary.freqs
        nn.Module.__setstate__(self, state)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that only make gates, to be trained with a lower learning rate and no weight decay."""
        return list(self.to_a.parameters()) if self.data_dependent_rel_pos else []

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return (
            f"dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}, softmax_normalize="
            f"{self.softmax_normalize}, data_dependent_rel_pos={self.data_dependent_rel_pos!r}"
        )
