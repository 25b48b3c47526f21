"""A sequence split over ranks gives what one rank does: values and all gradients, in float64.

The ranks are started once, as processes of their own, and run every case; the tests ask what came of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch._dynamo  # as the first DistributedDataParallel does: once, not in every rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gateloop_transformer import (
    Bidirectional,
    CausalFullAttention,
    GateLoopedAttention,
    SimpleGateLoopLayer,
    Transformer,
)
from gateloop_transformer.ops import (
    associative_scan,
    channel_gate_loop,
    context_parallel,
    gate_loop,
    heinsen_scan,
    linear_scan,
    simple_gate_loop,
    surrogate_attention,
)

WORLD = 4
TOLERANCE = 1e-10
# Steps of each part. The first ranks of the world make the group.
LENGTHS = {
    "2": (5, 8),
    "3": (4, 1, 7),
    "3 with an empty part": (6, 0, 3),
    "3 of which two empty": (0, 9, 0),
    "no steps": (0, 0),
}


class Place:
    """One rank in a group: its part of whole sequences."""

    def __init__(self, group: Any, lengths: Sequence[int]) -> None:
        self.group, self.size = group, len(lengths)
        self.rank = dist.get_rank(group)
        edges = [0, *itertools.accumulate(lengths)]
        self.second = min(edges[1], edges[-1] - 1)
        self.T, self.steps = edges[-1], slice(edges[self.rank], edges[self.rank + 1])

    def summed(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        parts = (torch.view_as_real(x) if x.is_complex() else x).detach().clone()
        dist.all_reduce(parts, group=self.group)
        return torch.view_as_complex(parts) if x.is_complex() else parts


Case = Callable[[Place], None]


def normal(seed: int, *shape: int, is_complex: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if is_complex else torch.float64
    return torch.randn(*shape, generator=generator, dtype=dtype)


def some_gates(seed: int, *shape: int, is_complex: bool = False) -> Tensor:
    """Of size below 1, some exactly 0."""
    gates = normal(seed, *shape, is_complex=is_complex) * 0.7
    return gates.masked_fill(normal(seed + 1, *shape) > 1.2, 0)


def close(name: str, found: Tensor | None, expected: Tensor | None) -> None:
    found, expected = (torch.zeros(()) if x is None else x for x in (found, expected))
    if 0 in (found.numel(), expected.numel()):
        return
    error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error < TOLERANCE, f"{name} differs by {error}"


def loss_of(outputs: Sequence[Tensor], states: Sequence[Tensor], steps: slice, share: float) -> Tensor:
    """A weighted sum of outputs and of final states, the latter weighted by what this rank has of them."""
    total = torch.zeros((), dtype=torch.float64)
    for n, y in enumerate(outputs):
        total = total + (y * normal(70 + n, y.shape[0], 64, *y.shape[2:])[:, steps]).abs().square().sum()
        total = total + (y * normal(80 + n, y.shape[0], 64, *y.shape[2:])[:, steps]).real.sum()
    for n, x in enumerate(states):
        total = total + share * (x * normal(90 + n, *x.shape)).real.sum() + share * x.abs().square().sum()
    return total


def compare(
    place: Place,
    function: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]],
    split: dict[str, Tensor],
    initial: dict[str, Tensor] | None = None,
    shared: dict[str, Tensor] | None = None,
    reverse: bool = False,
) -> None:
    """`function` of whole tensors, and of parts of those in `split` inside of context_parallel."""

    def leaves(tensors: dict[str, Tensor], steps: slice) -> dict[str, Tensor]:
        return {
            name: x[:, steps].detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())
            for name, x in tensors.items()
        }

    everything = slice(None)
    others = {**(initial or {}), **(shared or {})}
    whole = leaves(split, everything) | leaves({n: x[None] for n, x in others.items()}, everything)
    outputs, states = function(**{n: x[0] if n in others else x for n, x in whole.items()})
    loss_of(outputs, states, slice(place.T), 1.0).backward()
    part = leaves(split, place.steps) | leaves({n: x[None] for n, x in others.items()}, everything)
    with context_parallel(place.group):
        own, own_states = function(**{n: x[0] if n in others else x for n, x in part.items()})
    share = (place.rank + 1) * 2 / (place.size * (place.size + 1))
    loss_of(own, own_states, place.steps, share).backward()
    for n, (found, y) in enumerate(zip(own, outputs, strict=True)):
        close(f"output {n}", found, y[:, place.steps])
    for n, (found, x) in enumerate(zip(own_states, states, strict=True)):
        close(f"state {n}", found, x)
    first = place.rank == (place.size - 1 if reverse else 0)
    for name, x in part.items():
        expected, found = whole[name].grad, x.grad
        if not x.requires_grad:
            continue
        if name in split:
            close(f"gradient of {name}", found, None if expected is None else expected[:, place.steps])
        elif name in (initial or {}):
            close(f"gradient of {name}", found, expected if first else None)
        elif expected is not None:
            close(f"gradient of {name}", place.summed(torch.zeros_like(x) if found is None else found), expected)


def marks(seed: int, place: Place, B: int) -> Tensor:
    """Some resets; in one row at the first step of the second part."""
    resets = normal(seed, B, place.T) > 1.3
    if place.T:
        resets[0, place.second] = True
    return resets


def scan_case(kinds: str, reverse: bool, backend: str, resets: bool, start: bool) -> Case:
    def case(place: Place) -> None:
        B, D = 2, 3
        gates, inputs, initial = (kind == "c" for kind in kinds)
        split = {
            "gates": some_gates(1, B, place.T, D, is_complex=gates),
            "inputs": normal(2, B, place.T, D, is_complex=inputs),
        }
        if resets:
            split["resets"] = marks(3, place, B)
        options: dict[str, Any] = {"reverse": reverse, "backend": backend}
        before = {"initial": normal(4, B, D, is_complex=initial)} if start else {}
        compare(place, lambda **x: ([linear_scan(**x, **options)], []), split, before, reverse=reverse)

    return case


def loop_case(per_channel: bool, is_complex: bool, reverse: bool, backend: str, resets: bool, start: bool) -> Case:
    def case(place: Place) -> None:
        B, H, K, V = 2, 2, 3, 2
        shape = (B, place.T, H, K) if per_channel else (B, place.T, H)
        split = {
            "queries": normal(1, B, place.T, H, K),
            "keys": normal(2, B, place.T, H, K),
            "values": normal(3, B, place.T, H, V),
            "gates": some_gates(4, *shape, is_complex=is_complex),
        }
        if resets:
            split["resets"] = marks(6, place, B)

        def function(**x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            y, final = gate_loop(**x, reverse=reverse, backend=backend)
            return [y], [final]

        before = {"initial": normal(7, B, H, K, V, is_complex=is_complex)} if start else {}
        compare(place, function, split, before, reverse=reverse)

    return case


def channel_case(gate: str, reverse: bool, backend: str, resets: bool, start: bool) -> Case:
    def case(place: Place) -> None:
        B, D = 2, 3
        split = {"qkv": normal(1, B, place.T, 3 * D), "projections": normal(2, B, place.T, 2 * D)}
        if start:
            split["swish"] = normal(3, B, place.T, D)
        if resets:
            split["resets"] = marks(4, place, B)
        shared = {"logit": normal(5, D), "phase": normal(6, D)} if gate == "ring" else {}
        before = {"re": normal(7, B, D), "im": normal(8, B, D)} if start else {}

        def function(**x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            bias = (x.pop("logit"), x.pop("phase")) if gate == "ring" else None
            initial = (x.pop("re"), x.pop("im")) if start else None
            y, final = channel_gate_loop(
                **x, initial=initial, gate=gate, bias=bias, fraction=0.9, reverse=reverse, backend=backend
            )
            return [y], list(final)

        compare(place, function, split, before, shared, reverse=reverse)

    return case


def simple_case(reverse: bool, backend: str, resets: bool, start: bool) -> Case:
    def case(place: Place) -> None:
        split = {"qkva": normal(1, 2, place.T, 9)}
        if resets:
            split["resets"] = marks(2, place, 2)
        before = {"initial": normal(3, 2, 3)} if start else {}

        def function(**x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            y, final = simple_gate_loop(**x, reverse=reverse, backend=backend)
            return [y], [final]

        compare(place, function, split, before, reverse=reverse)

    return case


def forgetting_case(tensors: dict[str, Sequence[int]], function: Callable[..., Any]) -> Case:
    """What is not finite, forwards and backwards, ends at a reset.

    One row has it about the start of the second part, the other a step later.

    tensors: the shapes behind (B, T) of what `function` takes besides resets.
    """

    def case(place: Place) -> None:
        at = max(place.second, 1)
        if at + 3 > place.T:
            return
        whole = {name: normal(n, 2, place.T, *shape) for n, (name, shape) in enumerate(tensors.items())}
        for x in whole.values():
            x[:, 0] = torch.nan
        resets = torch.zeros(2, place.T, dtype=torch.bool)
        resets[0, at] = resets[1, at + 1] = True
        part = {name: x[:, place.steps].clone().requires_grad_() for name, x in whole.items()}
        whole = {name: x.requires_grad_() for name, x in whole.items()}
        y = function(**whole, resets=resets)
        given = normal(9, *y.shape)
        given[:, -1] = torch.nan
        y.backward(given)
        with context_parallel(place.group):
            own = function(**part, resets=resets[:, place.steps])
        own.backward(given[:, place.steps])
        found = {"output": own} | {f"gradient of {name}": x.grad for name, x in part.items()}
        expected = {"output": y} | {f"gradient of {name}": x.grad for name, x in whole.items()}
        assert bool(y[0, at:].isfinite().all() and y[1, at + 1 :].isfinite().all())
        for name, x in found.items():
            other = expected[name][:, place.steps]
            assert torch.equal(x.isfinite(), other.isfinite()), name
            close(name, x.nan_to_num(), other.nan_to_num())

    return case


OPERATORS: dict[str, Case] = {
    "a scan forgets": forgetting_case({"gates": [3], "inputs": [3]}, linear_scan),
    "a loop forgets": forgetting_case(
        {"queries": [2, 3], "keys": [2, 3], "values": [2, 4], "gates": [2]}, lambda **x: gate_loop(**x)[0]
    ),
    "channels forget": forgetting_case({"qkv": [9], "projections": [6]}, lambda **x: channel_gate_loop(**x)[0]),
    "a simple loop forgets": forgetting_case({"qkva": [9]}, lambda **x: simple_gate_loop(**x)[0]),
}
for way, back in (("", False), (" backwards", True)):
    for chosen in ("numba", "chunkwise", "eager"):
        given = chosen != "eager"
        for kinds in ("rrr", "crr", "ccc", "rcr", "rrc"):
            OPERATORS[f"scan {kinds} {chosen}{way}"] = scan_case(kinds, back, chosen, given, given)
        for per_channel, is_complex in itertools.product((False, True), repeat=2):
            name = f"loop {'complex' if is_complex else 'real'} {'channel' if per_channel else 'head'} gates"
            OPERATORS[f"{name} {chosen}{way}"] = loop_case(per_channel, is_complex, back, chosen, given, given)
        for gate in ("polar", "paper", "ring"):
            OPERATORS[f"{gate} channels {chosen}{way}"] = channel_case(gate, back, chosen, given, given)
        OPERATORS[f"simple loop {chosen}{way}"] = simple_case(back, chosen, given, given)


def layer_case(make: Callable[[], nn.Module], resets: bool, start: bool, inputs: float = 1.0) -> Case:
    """A layer, from its own state and with resets, or from nothing."""

    def case(place: Place) -> None:
        torch.manual_seed(0)
        layer = make().double()
        split = {"x": normal(1, 2, place.T, DIM) * inputs}
        if resets:
            split["resets"] = marks(2, place, 2)
        stateful = not isinstance(layer, Bidirectional)
        before: dict[str, Tensor] = {}
        kind: Any = None
        if start and stateful:
            with torch.no_grad():
                _, state = layer(normal(3, 2, 6, DIM), return_state=True)
            before, kind = state._asdict(), type(state)

        def function(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            mine = {name: given.pop(name) for name in before}
            parameters = {name: given.pop(name) for name in shared}
            options: dict[str, Any] = dict(given)
            if stateful:
                options |= {"return_state": True, "state": kind(**mine) if mine else None}
            result = torch.func.functional_call(layer, parameters, options.pop("x"), options)
            if not stateful:
                return [result], []
            return [result[0]], [x for x in result[1] if x.is_floating_point()]

        shared = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        compare(place, function, split, before, shared, reverse=getattr(layer, "reverse", False))

    return case


DIM = 8


def gates_of(**options: Any) -> Callable[[], nn.Module]:
    return lambda: GateLoopedAttention(DIM, **options)


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: CausalFullAttention(DIM, dim_head=4, heads=2, **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "channels": gates_of(),
    "channels, convolution": gates_of(gate="ring", conv_size=4, sub_ln=True, max_memory=16),
    "channels, long convolution backwards": gates_of(gate="paper", conv_size=7, reverse=True),
    "heads": gates_of(heads=2, gate="ring", conv_size=3, head_norm=True, qk_norm=True, max_memory=16),
    "heads backwards": gates_of(heads=4, conv_size=2, reverse=True, backend="chunkwise", add_swish_gating=False),
    "fixed gates": gates_of(gate="ring", fixed_gates=True, conv_size=3, conv_silu=True, qkv_bias=True, max_memory=16),
    "fixed gates of heads, backwards": gates_of(heads=2, gate="ring", fixed_gates=True, reverse=True, max_memory=16),
    "one tap": gates_of(heads=2, conv_size=1, dim_inner=4),
    "simple": lambda: SimpleGateLoopLayer(DIM),
    "simple backwards": lambda: SimpleGateLoopLayer(DIM, prenorm=False, post_ln=True, reverse=True, backend="eager"),
    "both ways": lambda: Bidirectional(GateLoopedAttention, DIM, heads=2, conv_size=3),
    "both ways, simple": lambda: Bidirectional(SimpleGateLoopLayer, DIM, merge="concat"),
    "attention": attention(),
    "attention, rotary": attention(rotary_emb=True, qk_norm=True, add_swish_gating=True),
    "attention, window": attention(rotary_emb=True, window=4),
    "attention, no softmax": attention(softmax_normalize=False, window=5),
    "attention, released position": attention(data_dependent_rel_pos=True, softmax_normalize=True),
    "attention, gate loop position": attention(data_dependent_rel_pos="gate_loop", rotary_emb=True),
    "attention, gate loop position, softmax": attention(
        data_dependent_rel_pos="gate_loop", softmax_normalize=True, window=6
    ),
}
for name, make in LAYERS.items():
    OPERATORS[f"{name}, from nothing"] = layer_case(make, False, False)
    OPERATORS[f"{name}, resets and a state"] = layer_case(make, True, True)

SIZES: dict[str, Any] = {"num_tokens": 11, "depth": 2, "dim_head": 4, "heads": 2, "conv_size": 3, "gate": "ring"}
GROUPS: dict[str, Any] = {}


def model_of(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(DIM, layer_pattern="gate attention", max_memory=16, **SIZES, **options).double()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def model_case(place: Place) -> None:
    """Logits, states and the loss of a whole mixed model, with resets."""
    model, resets = model_of(gate_loop_heads=2, rotary_emb=True), marks(2, place, 2)
    ids = (normal(1, 2, place.T + 1).abs() * 5).long() % 11
    logits, state = model(ids[:, :-1], return_state=True, resets=resets)
    loss = model(ids, return_loss=True, resets=torch.nn.functional.pad(resets, (0, 1)))
    loss.backward()
    expected = [x.clone() for x in gradients(model)]
    model.zero_grad()
    here = slice(place.steps.start, place.steps.stop + 1)
    with context_parallel(place.group):
        own, own_state = model(ids[:, place.steps], return_state=True, resets=resets[:, place.steps])
        marked = torch.nn.functional.pad(resets, (0, 1))[:, here]
        own_loss = model(ids[:, here], return_loss=True, resets=marked)
    close("logits", own, logits[:, place.steps])
    for n, (found, layer) in enumerate(zip(own_state.layers, state.layers, strict=True)):
        for name, value in layer._asdict().items():
            close(f"{name} of layer {n}", getattr(found, name).double(), value.double())
    # Targets that begin a document are passed over.
    targets = [(~x[:, 1:]).sum() for x in (torch.nn.functional.pad(resets, (0, 1)), marked)]
    share = own_loss * targets[1] / targets[0]
    share.backward()
    close("loss", place.summed(share), loss)
    for found, value in zip(gradients(model), expected, strict=True):
        close("gradient of a parameter", place.summed(found), value)


def data_parallel_case(place: Place) -> None:
    """Two by two: rows over one pair of ranks, time over the other."""
    model, ids = model_of(), (normal(1, 4, 15).abs() * 5).long() % 11
    model(ids, return_loss=True).backward()
    expected = [x.clone() for x in gradients(model)]
    model.zero_grad()
    rows, time = divmod(place.rank, 2)
    with context_parallel(GROUPS["context"]):
        loss = model(ids[rows * 2 : rows * 2 + 2, time * 7 : time * 7 + 8], return_loss=True)
    (loss / 4).backward()
    for found, value in zip(gradients(model), expected, strict=True):
        close("gradient of a parameter", place.summed(found), value)


def refused_case(place: Place) -> None:
    """What cannot be split says so, and what does not fit together is an error on every rank, not a wait."""
    x, marked = torch.rand(1, 4, DIM), torch.tensor([0, 4])
    mask = torch.ones(1, 4, dtype=torch.bool)
    layer, model = GateLoopedAttention(DIM), model_of()
    streamed = model.stream(torch.ones(1, 2, dtype=torch.long), 2)
    simple = SimpleGateLoopLayer(DIM)
    calls: dict[str, Callable[[], Any]] = {
        "cu_seqlens": lambda: linear_scan(x, x, cu_seqlens=marked),
        "resets": lambda: layer(x, cu_seqlens=marked),
        "mask": lambda: layer(x, mask=mask),
        "linear_scan": lambda: heinsen_scan(x, x),
        "associative_scan": lambda: associative_scan(lambda a, b: a, (x,)),
        "gate_loop": lambda: surrogate_attention(*[x.unsqueeze(-1)] * 3, x),
        "cache": lambda: simple(x, return_cache=True),
        "heinsen": lambda: SimpleGateLoopLayer(DIM, use_heinsen=True)(x),
        "generation": lambda: model.generate(torch.ones(1, 2, dtype=torch.long), 2),
        "outside of the block": lambda: next(streamed),
    }
    for word, call in calls.items():
        with pytest.raises(NotImplementedError, match=word), context_parallel(place.group):
            call()
    other = torch.rand(1 + place.rank, 4, DIM)
    with pytest.raises(ValueError, match=r"rank 1: linear_scan.*2"), context_parallel(place.group):
        linear_scan(other, other)
    other = x.double() if place.rank else x
    with pytest.raises(ValueError, match="float64"), context_parallel(place.group):
        linear_scan(other, other)


def blocks_case(place: Place) -> None:
    """Blocks end, nest and are suspended; checkpointing runs a part again in a block of its own."""
    x = torch.full((1, 2, 1), 0.5, dtype=torch.float64)
    alone = linear_scan(x, x)
    with context_parallel(place.group):
        with context_parallel(None):
            close("suspended", linear_scan(x, x), alone)
        together = linear_scan(x, x)
        with contextlib.suppress(KeyError), context_parallel(None):
            raise KeyError
        close("again", linear_scan(x, x), together)
    close("after", linear_scan(x, x), alone)
    assert place.rank == 0 or not torch.allclose(together, alone)
    x.requires_grad_()
    grads = []
    for checkpointed in (False, True):
        with context_parallel(place.group):
            if checkpointed:
                y = checkpoint(
                    linear_scan,
                    x,
                    x,
                    use_reentrant=False,
                    context_fn=lambda: (contextlib.nullcontext(), context_parallel(place.group)),
                )
            else:
                y = linear_scan(x, x)
        grads += torch.autograd.grad(y.square().sum(), x)
    close("gradient of a checkpoint", *grads)


def in_place_case(place: Place) -> None:
    """What an operator gives may be changed, as it may without ranks."""
    x = torch.rand(1, 3, 1, 2).requires_grad_()
    with context_parallel(place.group):
        y, _ = gate_loop(x, x, x, x[..., 0])
    y += 1
    y.sum().backward()
    assert x.grad is not None


def half_case(place: Place) -> None:
    """In bfloat16 states are handed on in float32."""
    torch.manual_seed(0)
    layer = GateLoopedAttention(DIM, heads=2, gate="ring", conv_size=3).bfloat16()
    x = normal(1, 2, place.T, DIM).bfloat16()
    expected = layer(x)
    with context_parallel(place.group):
        y, state = layer(x[:, place.steps], return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.real.dtype == torch.float32
    y.float().sum().backward()
    assert (y - expected[:, place.steps]).abs().max() < 0.05


def volume_case(place: Place) -> None:
    """What is sent does not depend on the length, and is what the documentation says."""
    sent: list[int] = []

    def counted(function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*tensors: Tensor, **options: Any) -> Any:
            sent.append(tensors[which].numel() * tensors[which].element_size())
            return function(*tensors, **options)

        return call

    B, H, K, taps = 2, 2, 4, 4
    layers = {
        (gate_loop, B * H * (1 + K * K) * 2 + B, 4 * B * H * K * K): GateLoopedAttention(DIM, heads=H),
        (channel_gate_loop, 4 * B * DIM + B, 4 * B * DIM): GateLoopedAttention(DIM),
        (simple_gate_loop, 2 * B * DIM + B, 2 * B * DIM): SimpleGateLoopLayer(DIM),
        ("taps", None, None): GateLoopedAttention(DIM, conv_size=taps),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", counted(dist.all_gather_single, 1))
        patch.setattr(dist, "reduce_scatter_single", counted(dist.reduce_scatter_single, 0))
        for (name, forward, backward), layer in layers.items():
            volumes = []
            for T in (4, 64):
                sent.clear()
                with context_parallel(place.group):
                    y = layer.double()(normal(1, B, T, DIM).requires_grad_())
                there = list(sent)
                y.sum().backward()
                volumes.append((there, sent[len(there) :]))
            assert volumes[0] == volumes[1], name
            if name == "taps":
                halo = B * (taps - 1) * DIM
                few = taps - 1 + B
                expected = [256, 8 * (halo + few), 32 * B * DIM + 8 * B], [32 * B * DIM, 8 * (halo + few)]
                assert volumes[0] == expected, volumes[0]
            else:
                assert volumes[0] == ([256, 8 * forward], [8 * backward]), (name, volumes[0])


def stretches_case(make: Callable[[], nn.Module], only_last: bool) -> Case:
    """Two stretches of a sequence, each split, the second from the state of the first, in one graph."""

    def case(place: Place) -> None:
        torch.manual_seed(0)
        layer = make().double()
        shared = {name: parameter.detach() for name, parameter in layer.named_parameters()}

        def function(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            first, second = given.pop("first"), given.pop("second")
            y, state = torch.func.functional_call(layer, given, first, {"return_state": True})
            z, state = torch.func.functional_call(layer, given, second, {"return_state": True, "state": state})
            return [z] if only_last else [y, z], [x for x in state if x.is_floating_point()]

        split = {"first": normal(1, 2, place.T, DIM), "second": normal(2, 2, place.T, DIM)}
        compare(place, function, split, {}, shared)

    return case


for name in ("channels, convolution", "heads", "simple", "attention, rotary", "attention, gate loop position"):
    OPERATORS[f"{name}, in two stretches"] = stretches_case(LAYERS[name], False)
    OPERATORS[f"{name}, the last of two stretches"] = stretches_case(LAYERS[name], True)

TOGETHER: dict[str, tuple[Case, Sequence[Sequence[int]]]] = {
    "two by two": (data_parallel_case, [(1, 1, 1, 1)]),
    "a model": (model_case, [LENGTHS["2"], LENGTHS["3"]]),
    "refused": (refused_case, [(1, 1)]),
    "blocks": (blocks_case, [(2, 2), (2, 2, 2)]),
    "in place": (in_place_case, [(1, 1)]),
    "half precision": (half_case, [LENGTHS["3"]]),
    "volume": (volume_case, [(1, 1), (1, 1, 1)]),
}

# Two partitions of each, in turn, so that kinds of cases meet all; `make slow` takes every one.
_PAIRS = list(itertools.combinations(LENGTHS.values(), 2))
CASES = TOGETHER | {name: (case, _PAIRS[n % len(_PAIRS)]) for n, (name, case) in enumerate(OPERATORS.items())}
EVERY = {name: (case, list(LENGTHS.values())) for name, case in OPERATORS.items()}


def rank_body(rank: int, folder: str, every: bool) -> None:
    """A process: all cases in turn, up to the first that goes wrong, since ranks then no longer meet."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    limit = timedelta(seconds=processes.LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3)} | {WORLD: dist.group.WORLD}
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    GROUPS["context"] = pairs[rank // 2]
    for name, (case, partitions) in (EVERY if every else CASES).items():
        for lengths in partitions:
            if rank >= len(lengths):
                continue
            try:
                case(Place(groups[len(lengths)], lengths))
            except BaseException:  # noqa: BLE001 - whatever it was, the test is told
                Path(folder, f"{rank}.json").write_text(json.dumps([name, f"{lengths}\n{traceback.format_exc()}"]))
                os._exit(1)
    os._exit(0)


def run_ranks(folder: Path, every: bool) -> dict[str, str]:
    """What went wrong, by case; ranks that end without a word are put down to the last."""
    wrong: dict[str, str] = {}
    for rank, code in enumerate(processes.together(WORLD, rank_body, str(folder), every)):
        path = folder / f"{rank}.json"
        if path.exists():
            name, text = json.loads(path.read_text())
            wrong[name] = wrong.get(name, "") + f"rank {rank}, parts {text}"
        elif code != 0:
            wrong.setdefault(list(CASES)[-1], f"rank {rank} ended with {code}")
    return wrong


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong, by case; a case that was not reached is one after those."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), every=False)


@pytest.mark.parametrize("name", CASES)
def test_ranks_give_what_one_gives(outcome: dict[str, str], name: str) -> None:
    assert name not in outcome, outcome[name]
    first = min((list(CASES).index(failed) for failed in outcome), default=len(CASES))
    assert list(CASES).index(name) < first, "not reached: a case before it went wrong"


@pytest.mark.slow
def test_ranks_give_what_one_gives_however_time_is_cut(tmp_path: Path) -> None:
    assert not run_ranks(tmp_path, every=True)


def test_what_is_no_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="process group"), context_parallel("gloo"):
        pass
