"""A model's gates and predictions on a text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gateloop_transformer.evaluation.positions import token_costs
from gateloop_transformer.generation import evaluating
from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.model import Transformer


class LayerGates(NamedTuple):
    """The record of one time mixer.

    layer: its number, from 1 on. mixer: what it is, in words. gates: (T, heads), complex, what the state was multiplied
    by at each token; None: it has none. note: what is to be known about them, or why there are none; may be empty.
    """

    layer: int
    mixer: str
    gates: npt.NDArray[np.complex128] | None
    note: str


class Trace(NamedTuple):
    """A text of T tokens that a model has read from an empty state.

    ids: (T,). layers: the time mixers. nats: (T,) what each token cost, NaN for the first, which nothing predicts.
    right: (T,) whether it was the likeliest.
    """

    ids: npt.NDArray[np.int64]
    layers: list[LayerGates]
    nats: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]


@torch.no_grad()
def trace(model: Transformer, ids: npt.NDArray[Any]) -> Trace:
    """Read tokens (T,) from an empty state, T at least 2.

    Args:
        model: is put in evaluation mode meanwhile.
        ids: the tokens.

    Raises:
        ValueError: there are fewer than 2 tokens.
        RuntimeError: a loss or a gate is not finite.
    """
    if len(ids) < 2:
        raise ValueError(f"a text of at least 2 tokens is needed, not of {len(ids)}: there is nothing to predict")
    row = torch.from_numpy(ids.astype(np.int64))[None].to(next(model.parameters()).device)
    with evaluating(model), _watched(model) as layers:
        logits = model(row)
    nats, right = token_costs(logits[:, :-1], row[:, 1:])
    found = [each.gates for each in layers if each.gates is not None]
    if not (np.isfinite(nats).all() and all(np.isfinite(gates).all() for gates in found)):
        raise RuntimeError("a loss or a gate of the model is not finite; its weights may be damaged")
    return Trace(row[0].cpu().numpy(), layers, np.insert(nats[0], 0, np.nan), np.insert(right[0], 0, False))


@contextlib.contextmanager
def _watched(model: Transformer) -> Iterator[list[LayerGates]]:
    """Record what the time mixers do inside of the block, in the order of the layers."""
    found: list[LayerGates] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
        found.append(_gates_of(len(found) + 1, module, args, kwargs))

    hooks = [
        module.register_forward_hook(watch, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (GateLoopedAttention, CausalFullAttention))
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _heads(count: int, size: int) -> str:
    return f"{count} heads of size {size}" if count > 1 else f"one head of size {size}"


def _gates_of(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerGates:
    """The gates of a mixer that was called with these arguments."""
    flags = {name: kwargs.get(name, False) for name in ("ablate_complex", "ablate_state_transition")}
    note = _ablated(**flags)
    if isinstance(module, GateLoopedAttention):
        kind = f"{module.gate} gates" if module.to_a is not None else f"fixed {module.gate} gates"
        mixer = f"gate loop, {kind}, {_heads(module.heads, module.dim_head)}"
        if module.to_a is None and not note:
            note = "the gates are learned and do not depend on the text"
        return LayerGates(layer, mixer, _array(module.gates(*args, **kwargs)), note)
    attention = cast(CausalFullAttention, module)
    mixer = f"attention, {_heads(attention.heads, attention.dim_head)}"
    if attention.data_dependent_rel_pos == "gate_loop":
        real, imaginary = attention._time_gates(*args, **flags)
        # Both channels of a pair share one.
        gates = torch.complex(real, imaginary)[..., ::2].flatten(-2)
        where = "they are its relative position, one for each pair of channels, here called a head"
        return LayerGates(layer, f"{mixer}, gates over time", _array(gates), f"{where}; {note}" if note else where)
    if attention.data_dependent_rel_pos:
        why = "its data-dependent position multiplies over channels, not over time: there is no memory to fade"
        return LayerGates(layer, mixer, None, why)
    return LayerGates(layer, mixer, None, "attention has no gates: nothing fades but by its own weights")


def _ablated(ablate_complex: bool, ablate_state_transition: bool) -> str:
    if ablate_state_transition:
        return "state transitions are ablated: all gates are 1 and nothing is ever forgotten"
    return "gates are real: phases are 0 or π" if ablate_complex else ""


def _array(gates: Tensor) -> npt.NDArray[np.complex128]:
    """Gates (1, T, heads) as (T, heads)."""
    return gates[0].to(torch.complex128).cpu().numpy()
