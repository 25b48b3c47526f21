"""GateLoopedAttention: the gate loop as a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from gateloop_transformer.arguments import check_fraction, check_rank, check_start
from gateloop_transformer.layers.fusing import may_stand_for
from gateloop_transformer.layers.norm import HeadRMSNorm
from gateloop_transformer.layers.padding import over_steps
from gateloop_transformer.layers.pickled import revive
from gateloop_transformer.layers.short_conv import ShortConv
from gateloop_transformer.layers.state import GateLoopState, check_state, start_of
from gateloop_transformer.ops.channel_loop import channel_gate_loop
from gateloop_transformer.ops.dispatch import check_name
from gateloop_transformer.ops.gate_loop import gate_loop
from gateloop_transformer.ops.gates import check_gate, ring_start
from gateloop_transformer.ops.head_gates import head_gates
from gateloop_transformer.ops.layout import Layout, read_layout
from gateloop_transformer.ops.pairs import compute_dtype


def check_input(layer: str, x: Tensor, dim: int, module: nn.Module) -> None:
    """Check that x is floating point (B, T, dim), and float64 only where the module's parameters are.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{layer}: input must be a torch tensor, not {type(x).__name__}")
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{layer}: input must have shape (B, T, {dim}), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{layer}: input must be floating point, not {x.dtype}")
    if x.dtype != torch.float64:
        return
    # Autocast narrows no float64, so this fits nowhere; mixtures of the others are torch's to judge. Some parameters
    # may be constants of a type of their own, and a replica has none.
    own = {parameter.dtype for parameter in module.parameters()}
    if own and x.dtype not in own:
        kinds = " and ".join(sorted(map(str, own)))
        raise ValueError(f"{layer}: input is {x.dtype} but the layer {kinds}: convert one of them")


def _gate_projection(dim: int, rank: int | None, out: int, bias: bool) -> nn.Sequential:
    """Make the gate projection; with a `rank`, the numbers in between keep about the inputs' mean square."""
    if rank is None:
        return nn.Sequential(nn.Linear(dim, out, bias=bias))
    down = nn.Linear(dim, rank, bias=False)
    nn.init.normal_(down.weight, std=dim**-0.5)
    return nn.Sequential(down, nn.Linear(rank, out, bias=bias))


def _arguments(original: Mapping[str, Any]) -> dict[str, Any]:
    """What has a layer with these attributes and parts of the original's; its norms are among the parts."""
    inner, dim = original["to_qkv"].weight.shape
    return {
        "dim": dim,
        "heads": original["heads"],
        "dim_inner": inner // 3,
        "checkpoint_gate_looped_attn": original["checkpoint_gate_looped_attn"],
        "add_swish_gating": original["to_gates"] is not None,
        "frac_gradient_state_transition": original["frac_gradient_state_transition"],
    }


class GateLoopedAttention(nn.Module):
    """A gate loop layer: y = out(SiLU(gates(x)) · norm(Re(q S))) with S[t] = a(x[t]) S[t-1] + k ⊗ v, per head.

    The defaults are the original's, initial weights and results included. Memory is linear in T; a sequence may be
    fed in pieces of any length through `state`.

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
        qkv_bias: biases of q, k and v; those of q and k start at 1, so that the layer starts near a gated sum of its
            values, and the past affects y from the first step of training.
        max_memory: the longest memory of a spread start, in steps.
        min_memory: the shortest memory of a spread start, in steps.
        phase_spread: standard deviation, over inputs of mean square 1, of what the data first adds to the phases of a
            spread start (over heads, where gates are fixed), in radians; 0: nothing.
        spread_start: gates start with memories spread log-uniformly up to `max_memory` and phases that do not depend
            on the data, instead of with a Linear's own weights, which give memories of about two steps; only "ring"
            and "paper" can. None: only "ring" does.
        gate_rank: rank of the gate projection, which is then a product of two, (2·heads, gate_rank) and
            (gate_rank, dim), as in Mamba. None: one matrix of full rank, (2·heads, dim).
        fixed_gates: gates are learned but do not depend on the data, as in an LRU; "ring" only. With a learning rate of
            0 for `gate_parameters` they stay where they start, as in RetNet.
        reverse: run from the last step to the first, the convolution too; a state then stands for what comes after x.
        backend: "auto", or a backend's name.

    Raises:
        ValueError: heads do not divide dim_inner, the gate is unknown, head size 1 rules an option out, or a number is
            out of range.

    Source: T. Katsch, GateLoop (2023), arXiv 2311.01927.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        dim_inner: int | None = None,
        checkpoint_gate_looped_attn: bool = True,
        add_swish_gating: bool = True,
        sub_ln: bool = False,
        frac_gradient_state_transition: float = 0.9,
        *,
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
        reverse: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim_inner = dim if dim_inner is None else dim_inner
        heads = dim_inner if heads is None else heads
        if min(dim, dim_inner, heads) < 1 or dim_inner % heads:
            raise ValueError(
                f"GateLoopedAttention: dim, heads and dim_inner must be positive and heads must divide dim_inner, "
                f"got dim={dim}, heads={heads}, dim_inner={dim_inner}"
            )
        check_gate("GateLoopedAttention", gate)
        if conv_size < 0:
            raise ValueError(f"GateLoopedAttention: conv_size must be 0 or more taps, not {conv_size}")
        if not max_memory >= 1:
            raise ValueError(f"GateLoopedAttention: max_memory must be at least 1 step, not {max_memory}")
        if conv_silu and not conv_size:
            raise ValueError("GateLoopedAttention: conv_silu needs a convolution: a conv_size of 1 or more")
        check_start("GateLoopedAttention", gate, spread_start, fixed_gates)
        check_rank("GateLoopedAttention", gate_rank, fixed_gates)
        if not 0 <= phase_spread < math.inf:
            raise ValueError(f"GateLoopedAttention: phase_spread must be finite, 0 or more radians, not {phase_spread}")
        check_fraction("GateLoopedAttention", "frac_gradient_state_transition", frac_gradient_state_transition)
        check_name(backend)
        self.dim, self.heads, self.gate, self.backend = dim, heads, gate, backend
        self.dim_head, self.reverse = dim_inner // heads, reverse
        self.checkpoint_gate_looped_attn = checkpoint_gate_looped_attn
        self.frac_gradient_state_transition = frac_gradient_state_transition
        self.conv = ShortConv(dim, conv_size, silu=conv_silu, backend=backend) if conv_size else None
        self.to_qkv = nn.Linear(dim, 3 * dim_inner, bias=qkv_bias)
        if qkv_bias:
            with torch.no_grad():
                self.to_qkv.bias.copy_(torch.arange(3 * dim_inner) < 2 * dim_inner)
        self.to_a = None if fixed_gates else _gate_projection(dim, gate_rank, 2 * heads, bias=gate != "ring")
        if gate == "ring":
            self.ring_logit, self.ring_phase = (nn.Parameter(torch.zeros(heads)) for _ in range(2))
        if gate == "ring" if spread_start is None else spread_start:
            self._spread(max_memory, min_memory, phase_spread)
        self.q_norm = HeadRMSNorm(heads, self.dim_head) if qk_norm else None
        self.k_norm = HeadRMSNorm(heads, self.dim_head) if qk_norm else None
        self.head_norm = HeadRMSNorm(heads, self.dim_head) if head_norm else None
        self.maybe_sub_ln = nn.LayerNorm(dim_inner) if sub_ln else nn.Identity()
        self.to_gates = nn.Sequential(nn.Linear(dim, dim_inner, bias=False), nn.SiLU()) if add_swish_gating else None
        projected = dim_inner != dim or add_swish_gating
        self.to_out = nn.Linear(dim_inner, dim, bias=False) if projected else nn.Identity()

    @torch.no_grad()
    def _spread(self, max_memory: float, min_memory: float, phase_spread: float) -> None:
        """Set memories and phases by `ring_start`; phases depend on the data as far as `phase_spread` says."""
        logits, phases = ring_start(self.heads, max_memory, min_memory)
        if self.to_a is None:
            phases = phases + phase_spread * torch.randn_like(phases) if phase_spread else phases
        else:
            projection = cast(nn.Linear, self.to_a[-1])
            projection.weight[1::2].zero_()
            if phase_spread:
                projection.weight[1::2].normal_(std=phase_spread / projection.in_features**0.5)
            if projection.bias is not None:
                projection.bias.copy_(torch.stack([logits, phases], -1).flatten())
        if self.gate == "ring":
            self.ring_logit.copy_(logits)
            self.ring_phase.copy_(phases)

    @overload
    def forward(
        self,
        x: Tensor,
        state: GateLoopState | bool | None = None,
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
        state: GateLoopState | bool | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        ablate_complex: bool = False,
        return_state: Literal[True],
    ) -> tuple[Tensor, GateLoopState]: ...

    def forward(
        self,
        x: Tensor,
        state: GateLoopState | bool | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        ablate_complex: bool = False,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, GateLoopState]:
        """Mix over time.

        Args:
            x: (B, T, dim), B and T may be 0.
            state: the state that an earlier call returned; None: the start. A bool in this place is the original's
                second argument, ablate_complex.
            ablate_state_transition: set all gates to 1.
            resets: (B, T) booleans, True where the state is cleared before a step; None: nowhere.
            cu_seqlens: (N + 1,) integers from 0 to T, ascending: documents packed in a batch of one row, document n
                being steps cu_seqlens[n] to cu_seqlens[n + 1]. Each is computed as if alone; states have N rows.
            mask: (B, T) booleans, False for padding, on whatever side: such steps change no state and give 0.
            ablate_complex: make gates real: the imaginary projection ("polar") or the phase is dropped.
            return_state: return (y, state) instead of y.

        Returns:
            y (B, T, dim) in x's dtype (under autocast, that of a Linear's output), or (y, state).

        Raises:
            ValueError: x, state, resets, cu_seqlens or mask has the wrong shape or dtype.
        """
        if isinstance(state, int):
            ablate_complex, state = bool(state), None
        check_input("GateLoopedAttention", x, self.dim, self)

        def mix(x: Tensor, layout: Layout) -> Any:
            return self._mix(x, state, layout, ablate_complex, ablate_state_transition, return_state)

        result: Any = over_steps("GateLoopedAttention", x, (resets, cu_seqlens, mask), mix, return_state)
        return cast(Tensor, result)

    def _mix(
        self,
        x: Tensor,
        state: GateLoopState | None,
        layout: Layout,
        ablate_complex: bool,
        ablate_state_transition: bool,
        return_state: bool,
    ) -> Any:
        past = self._past(x, state, layout)
        mixed = x
        if self.conv is not None:
            mixed, past = self._convolve(self.conv, x, past, layout)
        if self.dim_head == 1 and not (ablate_complex or ablate_state_transition):
            y, (re, im) = self._channels(x, mixed, state, layout)
            return (y, GateLoopState(re[..., None, None], im[..., None, None], past)) if return_state else y
        q, k, v = (part.unflatten(-1, (self.heads, self.dim_head)) for part in self.to_qkv(mixed).chunk(3, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        real, imaginary, k = self._gates(mixed, k, ablate_complex, ablate_state_transition)
        if state is None and imaginary is None and not return_state:
            y, _ = gate_loop(q, k, v, real, reverse=self.reverse, backend=self.backend, **layout.keywords())
            return self._output(x, y)
        gates = real, torch.zeros_like(real) if imaginary is None else imaginary
        initial = None if state is None else (state.real, state.imaginary)
        y, final = gate_loop(q, k, v, gates, initial, reverse=self.reverse, backend=self.backend, **layout.keywords())
        y = self._output(x, y)
        return (y, GateLoopState(*final, past)) if return_state else y

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GateLoopState:
        """The state before the first step: a call with it computes the same as a call without a state.

        Args:
            batch: B, or the number of documents.
            device: device of the layer's inputs; None: that of its weights.
            dtype: dtype of the layer's inputs; None: that of its weights.

        Raises:
            ValueError: batch is not an integer, or is negative.
        """
        device, dtype = start_of(self, batch, device, dtype)
        shape = (batch, self.heads, self.dim_head, self.dim_head)
        real, imaginary = (torch.zeros(shape, device=device, dtype=compute_dtype(dtype)) for _ in range(2))
        taps = 0 if self.conv is None else self.conv.taps - 1
        return GateLoopState(real, imaginary, torch.zeros(batch, taps, self.dim, device=device, dtype=dtype))

    def _convolve(self, conv: ShortConv, x: Tensor, past: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        if not self.reverse:
            return conv(x, past, layout)  # type: ignore[no-any-return]
        # The other way round: the last step first, and the last document first.
        packed = layout.cu_seqlens is not None
        y, past = conv(x.flip(1), past.flip(0) if packed else past, layout.flipped(), backwards=True)
        return y.flip(1), past.flip(0) if packed else past

    def _channels(
        self, x: Tensor, mixed: Tensor, state: GateLoopState | None, layout: Layout
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Mix at head size 1, gates and recurrence in one pass: output and the state's parts (B, heads)."""
        swish, qkv = self._swish(), self.to_qkv(mixed)
        y, final = channel_gate_loop(
            qkv,
            self._projections(mixed, qkv.dtype),
            None if state is None else (state.real.flatten(1), state.imaginary.flatten(1)),
            gate=self.gate,
            bias=self._bias(),
            swish=None if swish is None else swish(x),
            fraction=self.frac_gradient_state_transition,
            reverse=self.reverse,
            backend=self.backend,
            **layout.keywords(),
        )
        return self._output(x, y.unsqueeze(-1)) if swish is None else cast(Tensor, self.to_out(y)), final

    def _swish(self) -> nn.Module | None:
        """The projection before the SiLU, where the SiLU and its product may be left to the fused operator."""
        # A norm between the recurrence and its gate keeps the two apart.
        if not (may_stand_for(nn.Sequential, self.to_gates) and may_stand_for(nn.Identity, self.maybe_sub_ln)):
            return None
        parts = list(cast(nn.Sequential, self.to_gates)._modules.values())
        return parts[0] if len(parts) == 2 and may_stand_for(nn.SiLU, parts[1]) else None

    def _past(self, x: Tensor, state: GateLoopState | None, layout: Layout) -> Tensor:
        """The inputs before x that the convolution needs."""
        rows = layout.states(x.shape[0])
        taps = 0 if self.conv is None else self.conv.taps - 1
        if state is None:
            return x.new_zeros(rows, taps, self.dim)
        matrix = (rows, self.heads, self.dim_head, self.dim_head)
        shapes = {"real": matrix, "imaginary": matrix, "inputs": (rows, taps, self.dim)}
        check_state("GateLoopedAttention", state, GateLoopState, shapes)
        return state.inputs

    def _gates(
        self, x: Tensor, k: Tensor, ablate_complex: bool, ablate_state_transition: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gates (B, T, heads), the imaginary part None where all are real, and the keys that go with them."""
        if ablate_state_transition:
            return x.new_ones(*x.shape[:2], self.heads, dtype=compute_dtype(x.dtype)), None, k
        real, imaginary, scale = head_gates(
            self._projections(x, k.dtype),
            gate=self.gate,
            bias=self._bias(),
            fraction=self.frac_gradient_state_transition,
            real=ablate_complex,
            backend=self.backend,
        )
        return real, imaginary, k if scale is None else k * scale.to(k.dtype).unsqueeze(-1)

    def _projections(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Project to the pairs that gates are made of, without the bias (B, T, 2·heads); `dtype` is that of q, k, v."""
        if self.to_a is None:
            return x.new_zeros(*x.shape[:2], 2 * self.heads, dtype=dtype)
        return cast(Tensor, self.to_a(x))

    def gates(
        self,
        x: Tensor,
        state: GateLoopState | bool | None = None,
        ablate_state_transition: bool = False,
        *,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ablate_complex: bool = False,
    ) -> Tensor:
        """The gates a[t] that `forward` multiplies its state by, given the same arguments; it takes no mask.

        Returns:
            (B, T, heads), complex; real gates have phases of 0 or π. A reset is not a gate, and does not show here.

        Raises:
            ValueError: an argument has the wrong shape or dtype, as in `forward`.
        """
        if isinstance(state, int):
            ablate_complex, state = bool(state), None
        check_input("GateLoopedAttention", x, self.dim, self)
        layout = read_layout("GateLoopedAttention", x, resets, cu_seqlens)
        past = self._past(x, state, layout)
        mixed = x if self.conv is None else self._convolve(self.conv, x, past, layout)[0]
        no_keys = mixed.new_empty(*mixed.shape[:2], self.heads, 0)
        real, imaginary, _ = self._gates(mixed, no_keys, ablate_complex, ablate_state_transition)
        return torch.complex(real, torch.zeros_like(real) if imaginary is None else imaginary)

    def _bias(self) -> tuple[Tensor, Tensor] | None:
        """The bias that is added to the gate projections; None: there is none."""
        return (self.ring_logit, self.ring_phase) if self.gate == "ring" else None

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        """Apply norms, swish gate and output projection to the heads' outputs (B, T, heads, dim_head)."""
        if self.head_norm is not None:
            y = self.head_norm(y)
        y = self.maybe_sub_ln(y.flatten(-2))
        if self.to_gates is not None:
            y = self.to_gates(x) * y
        return cast(Tensor, self.to_out(y))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, also by the original."""
        nn.Module.__setstate__(self, state if "gate" in state else revive(state, GateLoopedAttention, _arguments))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, dim_inner) → (B·heads, T, dim_head), as in the original. The layer does not call it."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2).flatten(0, 1)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B·heads, T, dim_head) → (B, T, dim_inner), as in the original. The layer does not call it."""
        rows: Tensor = x.unflatten(0, (-1, self.heads))
        return rows.transpose(1, 2).flatten(-2)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that only make gates, to be trained with a lower learning rate and no weight decay."""
        ring = [self.ring_logit, self.ring_phase] if self.gate == "ring" else []
        return [*(self.to_a.parameters() if self.to_a is not None else ()), *ring]

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}, gate={self.gate!r}" + (
            ", reverse=True" if self.reverse else ""
        )
